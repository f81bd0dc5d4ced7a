"""Integrations with other libraries: transformers, PEFT, TRL, lm-eval."""
