"""Limits of the page, the API and the MCP tool, configured by environment variables."""

from __future__ import annotations

import os
from dataclasses import dataclass

from minilora_hub.compare.engine import Sampling
from minilora_hub.formatting import require_encodable

MOST_AT_ONCE = 150
"""Maximum number of running and waiting comparisons: each of them occupies one of the server's threads."""


VARIABLES = {
    "prompt": "MINILORA_MAX_PROMPT",
    "tokens": "MINILORA_MAX_TOKENS",
    "rows": "MINILORA_MAX_ROWS",
    "at_once": "MINILORA_AT_ONCE",
    "waiting": "MINILORA_MAX_WAITING",
    "link_megabytes": "MINILORA_LINK_MEGABYTES",
    "link_adapters": "MINILORA_LINK_ADAPTERS",
    "shared": "MINILORA_SHARED",
    "shared_megabytes": "MINILORA_SHARED_MEGABYTES",
    "kept_megabytes": "MINILORA_KEPT_MEGABYTES",
    "file_prompts": "MINILORA_BATCH_ROWS",
}


@dataclass(frozen=True)
class PageLimits:
    """Limits on the requests of visitors and API clients."""

    prompt: int = 8000  # characters of a prompt
    tokens: int = 512  # new tokens of one answer
    rows: int = 8  # answers of one comparison
    at_once: int = 16  # comparisons that run together
    waiting: int = 32  # comparisons in the queue
    link_megabytes: float = 200  # weights of one adapter from the Hub
    link_adapters: int = 8  # adapters from the Hub that stay in memory
    shared: int = 2000  # shared comparisons on the disk
    shared_megabytes: float = 200  # total size of the shared comparisons
    kept_megabytes: float = 500  # histories of all visitors in memory; one visitor may use a tenth
    file_prompts: int = 50  # prompts in one file

    def __post_init__(self) -> None:
        """Check that the server has threads for all comparisons."""
        if self.at_once + self.waiting > MOST_AT_ONCE:
            raise ValueError(
                f"at_once={self.at_once} and waiting={self.waiting}: must be at most {MOST_AT_ONCE} together"
            )

    @classmethod
    def from_environment(cls) -> PageLimits:
        """Read the variables.

        Raises:
            ValueError: a variable is not a whole number, or too small; the message names it.
        """
        return cls(
            **{
                name: whole_number(variable, getattr(cls, name), 0 if name == "waiting" else 1)
                for name, variable in VARIABLES.items()
            }
        )

    def check(self, prompt: str, sampling: Sampling, rows: int) -> None:
        """Check the size of a comparison before anything is computed.

        Raises:
            ValueError: the prompt, the length of the answers or their number is above the limit.
        """
        require_encodable(prompt, "prompt")
        if len(prompt) > self.prompt:
            raise ValueError(f"prompt of {len(prompt):,} characters: this page takes at most {self.prompt:,}")
        if sampling.max_new_tokens > self.tokens:
            raise ValueError(
                f"max_new_tokens={sampling.max_new_tokens}: this page gives at most {self.tokens} an answer"
            )
        self.check_columns(rows)

    def check_columns(self, rows: int) -> None:
        """Raise ValueError if a comparison, or a page, has too many columns or none."""
        if not 1 <= rows <= self.rows:
            raise ValueError(f"{rows} answers: this page gives 1 to {self.rows} at once (MINILORA_MAX_ROWS)")


def whole_number(variable: str, default: int, least: int = 1) -> int:
    """Read a whole number from the environment; unset or empty gives the default.

    Raises:
        ValueError: it is not a whole number, or below `least`.
    """
    text = os.environ.get(variable) or str(default)
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise ValueError(f"{variable}={text!r}: must be a whole number of at least {least}")
    return int(text)


def flag(variable: str) -> bool:
    """Read a switch from the environment; unset or empty is off.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    text = os.environ.get(variable) or "0"
    if text not in ("0", "1"):
        raise ValueError(f"{variable}={text!r}: must be 0 or 1")
    return text == "1"
