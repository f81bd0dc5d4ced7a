"""Publish the comparison page as a Space."""
