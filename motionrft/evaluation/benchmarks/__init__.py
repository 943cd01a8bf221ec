"""Benchmarks that ship with the package: each has `run(...) -> dict[str, float]` for `motionrft bench NAME --json`."""
