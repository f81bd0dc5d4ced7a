"""Check answers against expected values, with the names of promptfoo's assertions.

    equals       the answer is the value, up to surrounding white space
    contains     the value occurs in the answer; icontains: in any case
    starts-with  the answer starts with the value, up to white space before it
    regex        the pattern matches somewhere in the answer
    is-json      the answer is JSON; it takes no value

Each can be negated: ``not-contains``. An answer passes if all assertions of its prompt hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import regex  # type: ignore[import-untyped]

from minilora_hub.documents import strict_json

KINDS = ("equals", "contains", "icontains", "starts-with", "regex", "is-json")
NOT = "not-"
SECONDS = 0.5
"""The longest time that a pattern may search an answer: some patterns need time exponential in its length."""


@dataclass(frozen=True)
class Assertion:
    """A check of an answer.

    Attributes:
        kind: one of `KINDS`, or one with `NOT` before it.
        value: what it checks for; empty for ``is-json``.

    Raises:
        ValueError: the kind is unknown, the value is missing or not used, or a pattern is no regular expression.
    """

    kind: str
    value: str = ""

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.kind.removeprefix(NOT) not in KINDS:
            raise ValueError(
                f"assertion {self.kind[:40]!r}: must be one of {', '.join(KINDS)}, or not- and one of them"
            )
        if (self.value == "") != (self.kind.removeprefix(NOT) == "is-json"):
            need = "takes no value" if self.value else "needs a value"
            raise ValueError(f"assertion {self.kind!r}: {need}")
        if self.kind.removeprefix(NOT) == "regex":
            try:
                regex.compile(self.value)
            except regex.error as error:
                raise ValueError(f"assertion regex {self.value[:60]!r}: {error}") from None

    @classmethod
    def parse(cls, text: str) -> Assertion:
        """Parse the form of promptfoo's CSV files: ``contains: Paris``, ``is-json``; other texts are to be equalled."""
        kind, colon, value = text.partition(":")
        kind = kind.strip()
        if colon and kind.removeprefix(NOT) in KINDS:
            return cls(kind, value.strip())
        return cls(kind) if kind.removeprefix(NOT) == "is-json" else cls("equals", text.strip())

    def holds(self, answer: str) -> bool:
        """Whether an answer passes. One on which a pattern takes too long does not, whatever the pattern is for."""
        try:
            return self._found(answer) != self.kind.startswith(NOT)
        except TimeoutError:
            return False

    def _found(self, answer: str) -> bool:
        kind, text = self.kind.removeprefix(NOT), answer.strip()
        if kind == "equals":
            return text == self.value.strip()
        if kind == "contains":
            return self.value in answer
        if kind == "icontains":
            return self.value.casefold() in answer.casefold()
        if kind == "starts-with":
            return text.startswith(self.value)
        if kind == "regex":
            return regex.search(self.value, answer, timeout=SECONDS) is not None
        try:
            strict_json(text)
        except ValueError:
            return False
        return True


def read_assertions(row: Mapping[str, Any]) -> tuple[Assertion, ...]:
    """Return the assertions of a row of a prompt file.

    Args:
        row: ``"expected"`` holds a value that the answer must equal, ``"__expected"`` one in promptfoo's form (see
            `Assertion.parse`), and ``"assert"`` a list of ``{"type", "value"}``.

    Raises:
        ValueError: one has another form; the message names the field.
    """
    found = []
    for name, make in (("expected", lambda text: Assertion("equals", text)), ("__expected", Assertion.parse)):
        value = row.get(name)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name}={str(value)[:40]!r}: must be a text")
        if value:
            found.append(make(value))
    listed = row.get("assert") or []
    if not isinstance(listed, list) or not all(
        isinstance(one, dict) and isinstance(one.get("type"), str) for one in listed
    ):
        raise ValueError('assert: must be a list of {"type": …, "value": …}')
    for one in listed:
        value = one.get("value", "")
        if not isinstance(value, str):
            raise ValueError(f"assert: value={str(value)[:40]!r}: must be a text")
        found.append(Assertion(one["type"], value))
    return tuple(found)


def passes(assertions: Sequence[Assertion], answer: str) -> bool | None:
    """Whether all assertions hold; None where there are none."""
    return all(one.holds(answer) for one in assertions) if assertions else None
