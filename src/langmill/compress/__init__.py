"""Smaller models: weights in fewer bits."""
