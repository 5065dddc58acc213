"""Comparison tables, plots, image grids and the page, from result files alone."""
