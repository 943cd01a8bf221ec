"""Text-to-motion generators, one file per family."""
