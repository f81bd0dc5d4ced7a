"""An OpenAI-compatible server: the base and adapters of any kind behind one address, in one batch."""
