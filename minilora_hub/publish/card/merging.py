"""Merge the free text of an adapter's own card with that of the card on the Hub, section by section.

A push notes in the card which texts it wrote, as hashes. A text on the Hub with another hash was written there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256

from minilora_hub.errors import AdapterError
from minilora_hub.publish.card import free_text
from minilora_hub.publish.card.render import README, SETTINGS, settings_of

PUSHED = re.compile(r'^<!-- minilora:pushed (\{(?:"[a-z0-9-]+": "[0-9a-f]{16}"(?:, )?)*\}) -->$', re.MULTILINE)


@dataclass(frozen=True)
class KeptCard:
    """What a new card keeps of the earlier ones.

    Attributes:
        sections: {section: text}.
        pushed: {section: hash} of the texts that the new card notes as written by a push; empty texts are left out.
        space: the Space that an earlier card names.
    """

    sections: Mapping[str, str] = field(default_factory=dict)
    pushed: Mapping[str, str] = field(default_factory=dict)
    space: str | None = None

    @property
    def text(self) -> str:
        """The sections as a card has them."""
        return "\n".join(free_text.section(name, text) for name, text in self.sections.items())

    def noted_in(self, card: str) -> str:
        """Return a rendered card with the note of the texts that a push wrote."""
        found = SETTINGS.search(card)
        assert found is not None
        note = f"<!-- minilora:pushed {json.dumps(dict(self.pushed))} -->"
        return f"{card[: found.end()]}\n{note}{card[found.end() :]}"


def merge_cards(own: str | None, published: str | None, notes: list[str]) -> KeptCard:
    """Return what the next card keeps of the folder's own card and of the one in the repo.

    An empty section takes the other's text, and one that is as the last push wrote it takes a newer one.

    Args:
        own: the folder's README.md.
        published: the repo's README.md.
        notes: notes for the author; those about replaced cards and texts are added.

    Raises:
        AdapterError: a section was written on both sides, or is not closed.
    """
    if own and settings_of(own) is None:
        notes.append(f"the folder's own {README} was not written by minilora: a new one replaces it")
        own = None
    if published and settings_of(published) is None:
        notes.append(f"the {README} in the repo was not written by minilora: a new one replaces it")
        published = None
    here, there = free_text.sections_of(own or ""), free_text.sections_of(published or "")
    before = _pushed_in(published or "")
    sections, pushed, both = {}, {}, []
    for name in dict.fromkeys([*here, *there]):
        mine, theirs, last = here.get(name, ""), there.get(name, ""), (before or {}).get(name, "")
        edited_here = before is None or _hash(mine) != last
        edited_there = before is None or _hash(theirs) != last
        if mine == theirs:
            ours = True
        elif not mine or not theirs:
            ours = bool(mine) and edited_here
            if not theirs and not ours:
                notes.append(f"the free-text section {name!r} was emptied on the Hub, and stays empty")
        elif before is None:
            ours = True
            notes.append(
                f"the free-text section {name!r} of the folder's {README} replaces another text on the Hub, which may "
                "have been written there: the card is of an earlier version"
            )
        elif edited_here and edited_there:
            both.append(name)
            continue
        else:
            ours = edited_here
        sections[name], pushed[name] = (mine, _hash(mine)) if ours else (theirs, last)
    if both:
        raise AdapterError(
            f"nothing was sent: the free-text section {both[0]!r} of {README} was written on the Hub's page, and holds "
            "another text in the folder: put the text that you want into one of the two, and empty the other"
        )
    spaces = [(settings_of(card) or {}).get("space") for card in (own, published) if card]
    kept = {name: digest for name, digest in pushed.items() if digest}
    return KeptCard(sections, kept, next((space for space in spaces if space), None))


def _pushed_in(card: str) -> dict[str, str] | None:
    """Return the hashes that a push noted in a card; None in one of an earlier version."""
    found = PUSHED.search(card)
    try:
        return dict(json.loads(found[1])) if found else None
    except ValueError:
        return None


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:16] if text else ""
