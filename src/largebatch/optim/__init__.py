"""Layerwise adaptive optimizers."""
