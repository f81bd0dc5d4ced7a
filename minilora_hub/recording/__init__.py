"""Recordings: reference logits of an adapter on its base, stored in its folder.

Training makes recordings and publishing uses them, so both import this package.
"""
