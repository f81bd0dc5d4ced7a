"""Token ids of their own for each adapter, so that the paged cache shares a common prefix within one adapter only.

transformers' cache knows a block of keys and values by its tokens. Two adapters have different ones for the same text,
and so has an adapter whose files were replaced. So the ids that the manager sees are ``space * vocabulary + id``: the
space says whose they are. A space that is used once shares nothing, which a prompt needs whose tokens are all scored.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Hashable
from typing import Final

import torch

LARGEST: Final = 2**31 - 2
"""The manager's ids are 32-bit integers, and one is its end token."""


class TokenSpaces:
    """Spaces for adapters. They run out: then all but those of running rows are given anew, and the cache is emptied.

    Args:
        vocabulary: number of tokens of the base.
        in_use: returns the spaces of rows that have not ended.
        used_up: called before spaces are given a second time; blocks that no row uses must be forgotten then.
    """

    def __init__(self, vocabulary: int, in_use: Callable[[], Collection[int]], used_up: Callable[[], None]) -> None:
        self._vocabulary, self._in_use, self._used_up = vocabulary, in_use, used_up
        self._most = (LARGEST + 1) // vocabulary
        self._lock = threading.Lock()
        self._next = 0
        self._spaces: dict[Hashable, int] = {}
        self._taken: Collection[int] = ()  # by rows that began when spaces were last given anew

    def of(self, owner: Hashable | None) -> int:
        """Return the space of an owner; None: one for a single row."""
        with self._lock:
            if owner is not None and owner in self._spaces:
                return self._spaces[owner]
            space = self._new()
            if owner is not None:
                self._spaces[owner] = space
            return space

    def _new(self) -> int:
        while True:
            if self._next == self._most:
                self._next = 0
                self._spaces.clear()
                self._used_up()
                self._taken = self._in_use()
            space, self._next = self._next, self._next + 1
            if space not in self._taken:
                return space

    def enter(self, token: int, space: int) -> int:
        """Return the id of a token in a space, for the manager."""
        return space * self._vocabulary + token

    def leave(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the tokens of ids of any space."""
        return ids % self._vocabulary
