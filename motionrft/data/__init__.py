"""Parquet schema, collation, deterministic sampling. No Ray here."""
