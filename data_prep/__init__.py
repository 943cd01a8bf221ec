"""Sources to Parquet shards with all three representations (Ray Data)."""
