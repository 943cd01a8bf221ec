"""Shared vocabulary: types, protocols, errors, seeding, logging. Standard library and torch only."""
