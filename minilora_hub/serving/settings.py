"""Bounds of the server."""

from __future__ import annotations

from dataclasses import dataclass, fields

MOST_BODY_BYTES = 8 * 2**20
"""The largest body of a request."""


@dataclass(frozen=True)
class ServerLimits:
    """Bounds of the server. A *row* is one answer; a request has one for each of its prompts and each of its `n`.

    Args:
        rows: the most rows of requests in one batch.
        waiting: the most rows that wait for a place in it; a request beyond that is told to come back later (429).
        cache_tokens: tokens for which the key/value cache has room, which is allocated at the start. Where it is full,
            rows wait, and the newest may be put back and read again later. It bounds the length of a row, too.
        default_tokens: the most tokens of a chat answer where the request doesn't say; also limited by the context.
        answer_tokens: the most tokens that a request may ask for in an answer; None: what the context holds.
        prompt_characters: the most characters of a prompt; None: what the context holds.
        request_answers: the most answers of one request; None: `rows` and `waiting` together.
        page_rows: rows of a page's comparisons that may be in the batch as well; the page bounds them.

    Raises:
        ValueError: a bound is below 1.
    """

    rows: int = 32
    waiting: int = 256
    cache_tokens: int = 16384
    default_tokens: int = 512
    answer_tokens: int | None = None
    prompt_characters: int | None = None
    request_answers: int | None = None
    page_rows: int | None = None

    @property
    def batch_rows(self) -> int:
        """The most rows in one batch, with those of a page."""
        return self.rows + (self.page_rows or 0)

    def __post_init__(self) -> None:
        """Check the values."""
        for field in fields(self):
            value = getattr(self, field.name)
            if (value is not None or field.default is not None) and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{field.name}={value!r}: must be an integer of at least 1")
