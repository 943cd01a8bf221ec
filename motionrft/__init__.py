"""Reinforcement fine-tuning of text-to-motion generators. Importing this package loads no torch."""

__version__ = "0.1.0"
