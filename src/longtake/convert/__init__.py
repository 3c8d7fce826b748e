"""Turning trained dense models into latent ones."""
