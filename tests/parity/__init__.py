"""Comparisons with PyTorch references, all marked `torch`."""
