"""Uniform affine quantisation: grids, range search, layers and their conversion."""
