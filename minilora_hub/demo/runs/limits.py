"""What one visitor may ask of the page, and how many at once; a Space's owner says it in variables. No Gradio."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields

from minilora_hub.compare.engine import Sampling

MOST_AT_ONCE = 150
"""Visitors that run and wait, together: each keeps one of the server's workers."""

VARIABLES = {
    "prompt": "MINILORA_MAX_PROMPT",
    "tokens": "MINILORA_MAX_TOKENS",
    "rows": "MINILORA_MAX_ROWS",
    "at_once": "MINILORA_AT_ONCE",
    "waiting": "MINILORA_MAX_WAITING",
}


@dataclass(frozen=True)
class PageLimits:
    """Limits of the page, the API and the MCP tool alike.

    Attributes:
        prompt: the most characters of a prompt.
        tokens: the most new tokens of one answer.
        rows: the most answers of one comparison.
        at_once: comparisons that run in turns, one step each; others wait in line.
        waiting: the most that wait.
    """

    prompt: int = 8000
    tokens: int = 512
    rows: int = 8
    at_once: int = 16
    waiting: int = 32

    def __post_init__(self) -> None:
        """Refuse what no page could keep."""
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "waiting" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{field.name}={value!r}: must be a whole number of at least {least}")
        if self.at_once + self.waiting > MOST_AT_ONCE:
            raise ValueError(
                f"at_once={self.at_once} and waiting={self.waiting}: must be at most {MOST_AT_ONCE} together"
            )

    @classmethod
    def from_environment(cls) -> PageLimits:
        """Read the variables named in `VARIABLES`.

        Raises:
            ValueError: one is no whole number, or too small; the message names it.
        """
        defaults = cls()
        return cls(
            **{
                name: whole_number(variable, getattr(defaults, name), least=0 if name == "waiting" else 1)
                for name, variable in VARIABLES.items()
            }
        )

    def check(self, prompt: str, sampling: Sampling, rows: int) -> None:
        """Refuse a comparison that is too large, before anything of it is computed.

        Raises:
            ValueError: it is; the message says how large it may be.
        """
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise ValueError("prompt: must be a text that can be encoded, without halves of characters") from None
        if len(prompt) > self.prompt:
            raise ValueError(f"prompt of {len(prompt):,} characters: this page takes at most {self.prompt:,}")
        if sampling.max_new_tokens > self.tokens:
            raise ValueError(
                f"max_new_tokens={sampling.max_new_tokens}: this page gives at most {self.tokens} an answer"
            )
        self.check_columns(rows)

    def check_columns(self, rows: int) -> None:
        """Refuse a comparison, or a page, of too many columns.

        Raises:
            ValueError: there are; the message says how many there may be.
        """
        if not 1 <= rows <= self.rows:
            raise ValueError(f"{rows} answers: this page gives 1 to {self.rows} at once ({VARIABLES['rows']})")


def whole_number(variable: str, default: int, least: int = 1) -> int:
    """Read a whole number from the environment; unset or empty gives the default.

    Raises:
        ValueError: it is none, or below `least`.
    """
    text = os.environ.get(variable) or str(default)
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise ValueError(f"{variable}={text!r}: must be a whole number of at least {least}")
    return int(text)


def flag(variable: str) -> bool:
    """Read a switch from the environment: 1 or 0; unset or empty is 0.

    Raises:
        ValueError: it is something else.
    """
    text = os.environ.get(variable) or "0"
    if text not in ("0", "1"):
        raise ValueError(f"{variable}={text!r}: must be 0 or 1")
    return text == "1"
