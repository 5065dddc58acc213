"""Probes for over-optimisation, one file each."""
