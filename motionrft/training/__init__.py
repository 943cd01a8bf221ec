"""One training loop, the checkpoint format, recipes."""
