"""One frozen dataclass per fine-tuning method; each gives a plan."""
