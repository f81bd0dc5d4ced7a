"""Train adapters: `run.train` for one run, `sweep.sweep` for several with varied settings."""
