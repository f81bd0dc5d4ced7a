"""Measuring adapters against their base: tasks, metrics, the run over the adapter bank, and what is told of it."""
