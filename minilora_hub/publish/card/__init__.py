"""The model card of a published adapter."""
