"""Sampling settings of single columns, which replace the common ones. No Gradio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from minilora_hub.compare.engine import Sampling
from minilora_hub.documents import Scalar
from minilora_hub.errors import PageError

SETTINGS = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
"""What a column may have of its own. The length of answers and the system prompt are those of the comparison."""

DRAWING = ("top_p", "top_k", "seed")
"""Those that only have an effect at a temperature above 0."""


def with_own(sampling: Sampling, own: Mapping[str, Any]) -> Sampling:
    """Return the settings of a column: the common ones, with its own in their place.

    Raises:
        ValueError: a setting is unknown or out of range; the message names it.
    """
    unknown = [name for name in own if name not in SETTINGS]
    if unknown:
        raise ValueError(f"setting {str(unknown[0])[:40]!r} of a column: must be one of {', '.join(SETTINGS)}")
    return replace(sampling, **own)


class OwnSampling:
    """The columns of one page that have settings of their own."""

    def __init__(self) -> None:
        self._of: dict[str, dict[str, Scalar]] = {}

    def set(self, about: Mapping[str, Any], own: Any) -> None:
        """Give a column settings of its own; none: it has the common ones again.

        Raises:
            PageError: a setting is unknown or out of range.
        """
        if not isinstance(own, dict):
            raise PageError(f"sampling={own!r:.60}: must be settings")
        try:
            with_own(Sampling(), own)
        except ValueError as error:
            raise PageError(f"{error}") from None
        self._of.pop(about["name"], None)
        if own:
            self._of[about["name"]] = {name: own[name] for name in SETTINGS if name in own}

    def adopt(self, stage: Mapping[str, Any]) -> None:
        """Set those of a comparison, to run it again; its other columns have the common ones."""
        for column in stage["columns"]:
            own = column.get("sampling") or {}
            self.set(column["about"], {name: own[name] for name in SETTINGS if name in own})

    def of(self, about: Sequence[Mapping[str, Any]]) -> list[dict[str, Scalar]]:
        """Return the own settings of each of these columns."""
        return [dict(self._of.get(one["name"], {})) for one in about]


def settings_of(sampling: Sampling, system: str = "") -> dict[str, Scalar]:
    """Return the settings that are stored with a comparison: of sampling, and the system prompt if there is one."""
    fields = {name: value for name, value in asdict(sampling).items() if name != "stop"}
    return fields | ({"system_prompt": system} if system.strip() else {})


def differing(common: Mapping[str, Scalar], fields: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return the settings in which `fields` differ from the common ones; one that only these have is empty.

    Those that have no effect are left out: without a temperature tokens are not drawn.
    """
    idle = DRAWING if not fields["temperature"] else ()
    absent: dict[str, Scalar] = dict.fromkeys((name for name in common if name not in fields), "")
    return {name: value for name, value in fields.items() if common.get(name) != value and name not in idle} | absent


def in_words(own: Mapping[str, Any]) -> str:
    """Return settings as words, without those that have no effect."""
    idle = DRAWING if own.get("temperature") == 0 else ()
    shown = {name: "none" if value == "" else value for name, value in own.items() if name not in idle}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items())
