"""Composition roots: model, data and loss of each stage."""
