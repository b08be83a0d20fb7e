"""Measurements of a trained model. Reads a model, never changes it."""
