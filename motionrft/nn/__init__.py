"""Transformer blocks, embeddings, frozen text encoders."""
