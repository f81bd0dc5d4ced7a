"""Recordings: the logits that an adapter computes on its base, stored beside it.

Training records, and publishing uses the recording: so this room is below both.
"""
