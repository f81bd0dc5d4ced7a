"""Check seeds of random generators, so that a wrong one is told by name before anything is read."""

from __future__ import annotations


def require_seed(seed: object) -> None:
    """Check the argument `seed`.

    Raises:
        ValueError: it is no integer, negative (it would mean the numbers of another seed), or too large for torch.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed!r}: must be an integer from 0 to 2**63 - 1")
