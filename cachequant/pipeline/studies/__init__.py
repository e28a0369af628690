"""Studies of `cachequant report --study`: one module each, all in `cachequant.pipeline.studies.registry`."""
