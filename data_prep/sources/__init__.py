"""One file per source format: file -> clip."""
