"""Training adapters: `run.train` is one run, `sweep.sweep` many."""
