"""Continual learning: what both ends must agree on."""
