"""Publish an adapter: build, check, commit."""
