"""Networks: the chunk-causal DiT, the small video VAE and text encoder, and their contracts."""
