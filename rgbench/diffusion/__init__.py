"""Diffusion mathematics in pure torch: schedule, DDIM, consistency functions, samplers."""
