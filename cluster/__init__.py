"""Where it runs: hardware profiles and launcher files."""
