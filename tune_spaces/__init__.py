"""One search space per question."""
