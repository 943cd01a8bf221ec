"""Metrics, evaluators and protocols that measure and are never trained against."""
