"""Flow-matching algebra and the few-step sampler."""
