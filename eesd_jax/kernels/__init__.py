"""Faster implementations of what `model/` computes; everything runs without them."""
