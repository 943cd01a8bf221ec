"""Plots, the HTML report, the motion player."""
