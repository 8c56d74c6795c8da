"""Recipes and the runner that turns one into a run directory."""
