"""Run configuration: schema, presets, loading."""
