"""Checks of a folder before it is published."""
