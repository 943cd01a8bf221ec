"""Plans, curriculum and the rollout step."""
