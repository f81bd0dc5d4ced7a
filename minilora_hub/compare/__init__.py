"""Side-by-side comparison: one base and several adapters on it answer the same prompt. No user interface in here."""
