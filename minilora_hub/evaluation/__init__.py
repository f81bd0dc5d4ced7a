"""Measure adapters against their base: tasks, metrics, the run over the adapter bank, and its results."""
