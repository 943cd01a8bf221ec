"""Schedules, solvers as affine tables, guidance, and the one denoising loop."""
