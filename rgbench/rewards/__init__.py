"""Reward models: what an image is worth for a prompt, and the latent proxy that learns it."""
