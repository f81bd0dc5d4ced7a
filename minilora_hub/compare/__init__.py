"""Compare one base and several adapters on it side by side, in one batch. No user interface."""
