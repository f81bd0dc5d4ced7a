"""Comparisons that visitors run, and the queue of requests waiting for the model."""
