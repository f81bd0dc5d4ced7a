"""Train adapters: `run.train` makes one run, `sweep.sweep` many."""
