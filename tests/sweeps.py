"""Sweeps over families, formats and settings, of which the quick run takes a part."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def sweep(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """Return the cases as parameters; all but those in `quick` are marked slow."""
    return [
        case if case in quick else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]
