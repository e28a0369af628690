"""Original checkpoints of the paper's models: read, mapped onto diffusers networks, made into pipelines."""
