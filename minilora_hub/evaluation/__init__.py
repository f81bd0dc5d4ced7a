"""Measure adapters and their base: tasks, metrics, runs, and results."""
