"""The paper's three motion representations, their conversions and normalisers."""
