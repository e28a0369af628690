"""Integer operators: `reference` computes them exactly in floating point, `cpu` on oneDNN, `cuda` on a GPU."""
