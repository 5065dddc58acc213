"""Evaluation of trained models: targets, generation, one pass through all metrics, results, statistics."""
