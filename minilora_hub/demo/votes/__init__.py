"""Blind votes, their ranking, and sharing."""
