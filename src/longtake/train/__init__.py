"""Training: optimisers, a resumable loop, and the stages (video VAE, cached latents, chunk-causal DiT)."""
