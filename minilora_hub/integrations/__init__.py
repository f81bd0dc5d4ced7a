"""Connections to other libraries: transformers, PEFT, TRL, lm-eval."""
