"""Parse ``--objective NAME[:key=value,…]``: which terms are added to the loss, with which values. Torch is not loaded.

`objectives` computes them. To add one: its keys here, its class there.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora_hub.errors import TrainingError

KEYS: dict[str, dict[str, Any]] = {
    "distill": {"teacher": None, "weight": 1.0, "temperature": 1.0, "labels": 1.0},
    "orthogonal": {"weight": 0.5},
    "anchor": {"data": None, "weight": 1.0, "rows": 2, "length": 128},
    "dpo": {"beta": 0.1, "weight": 1.0, "labels": 1.0},
}
"""Objective -> its keys and their defaults; None: it must be given."""
MAY_BE_ZERO = ("labels",)


@dataclass(frozen=True)
class ObjectiveSpec:
    """An objective that a run asks for: its `name`, and the `values` of all its keys."""

    name: str
    values: dict[str, Any]

    def shown(self) -> str:
        """Return it in one line, with the names of files and adapters in place of their paths."""
        parts = []
        for key, value in self.values.items():
            if value != KEYS[self.name][key]:
                text = Path(value).name if isinstance(value, str) and Path(value).expanduser().exists() else value
                parts.append(f"{key}={text if isinstance(text, str) else format(text, 'g')}")
        return self.name + (f": {', '.join(parts)}" if parts else "")


def parse_objectives(texts: Sequence[str]) -> tuple[ObjectiveSpec, ...]:
    """Parse objectives, each of which may be named once.

    Raises:
        TrainingError: a name or key is unknown, a value is missing or out of range.
    """
    specs = tuple(_parse(text) for text in texts)
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise TrainingError(f"objective: {name!r} is given twice: leave one out")
    return specs


def _parse(text: str) -> ObjectiveSpec:
    name, _, rest = text.partition(":")
    if name not in KEYS:
        raise TrainingError(f"objective={text!r}: must be one of {', '.join(KEYS)}, e.g. distill:teacher=DIR")
    known, values = KEYS[name], {}
    for part in rest.split(",") if rest else ():
        key, equals, value = part.partition("=")
        if not equals or not value:
            raise TrainingError(f"objective={text!r}: {part!r} must be key=value; the keys are {', '.join(known)}")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; the keys are {', '.join(known)}"
            raise TrainingError(f"objective={text!r}: {name} has no key {key!r}{hint}")
        if key in values:
            raise TrainingError(f"objective={text!r}: {key} is given twice: leave one out")
        values[key] = value if known[key] is None else _number(text, key, value, known[key])
    for key, default in known.items():
        if default is None and key not in values:
            raise TrainingError(f"objective={text!r}: {key} is missing: {name}:{key}=…")
    return ObjectiveSpec(name, known | values)


def _number(text: str, key: str, value: str, default: float) -> float:
    kind = type(default)
    try:
        number = kind(value)
    except ValueError:
        number = math.nan
    least = "at least 0" if key in MAY_BE_ZERO else "above 0"
    if not math.isfinite(number) or number < 0 or (number == 0 and key not in MAY_BE_ZERO):
        whole = "whole number" if kind is int else "number"
        raise TrainingError(f"objective={text!r}: {key}={value!r} must be a {whole} {least}")
    return number
