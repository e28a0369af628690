"""Feature reuse between sampler steps: the cache itself and the networks that skip what is cached."""
