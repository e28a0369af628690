"""The pipeline: one module per stage, `run(context) -> outputs`."""
