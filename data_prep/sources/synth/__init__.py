"""Captioned motion made by rule: body, actions, classes, and the source that strings them together."""
