"""Integer operators. Today: the reference backend, which simulates integers in floating point, exactly."""
