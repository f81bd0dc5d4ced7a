"""English words in another form, from lemminflect's lexicon: plurals, verb forms, comparatives.

1: an ending is added. 2: the spelling changes with it. 3: irregular, at first as many as of 1 and 2 together.
Held out: the superlative. Words with several accepted forms are left out, because an item has one answer.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import zip_longest

from minilora_hub.evaluation.tasks.items import Draw, Item, entities_of, entity_split, library

FORMS = {
    "NNS": "plural",
    "VBD": "past tense",
    "VBN": "past participle",
    "VBG": "-ing form",
    "JJR": "comparative",
}
HELD_OUT = {"JJS": "superlative"}
ENDINGS = {"NNS": "s", "VBD": "ed", "VBN": "ed", "VBG": "ing", "JJR": "er", "JJS": "est"}
REGULAR = {"train": 800, "validation": 50, "test": 240, "held_out": 100}
"""The most items of difficulty 1, and of 2; of 3 all that the lexicon has."""


def make(split: str, avoid: frozenset[str] = frozenset()) -> tuple[Item, ...]:
    """Make all items of a split.

    Args:
        split: one of `items.SPLITS`.
        avoid: words that may occur in training only, such as those of other tasks.
    """
    tags = HELD_OUT if split == "held_out" else FORMS
    avoid = frozenset() if split == "train" else avoid | _trained_words()
    graded: dict[int, list[Item]] = {1: [], 2: [], 3: []}
    for lemma, tag, form in _lexicon():
        if tag not in tags or _split(lemma) != entities_of(split) or not avoid.isdisjoint((lemma, form)):
            continue
        prompt, labels = f"Write the {tags[tag]} of: {lemma}", {"format": tags[tag]}
        difficulty = _difficulty(lemma, tag, form)
        graded[difficulty].append(Item("inflection", split, prompt, form, difficulty, lemma, labels))
    draw = Draw("inflection", split)
    plain, changed = (draw.shuffled(graded[difficulty])[: REGULAR[split]] for difficulty in (1, 2))
    irregular = draw.shuffled(graded[3])
    rows = zip_longest(irregular[::2], plain, irregular[1::2], changed)
    return tuple(item for row in rows for item in row if item is not None)


@cache
def _lexicon() -> tuple[tuple[str, str, str], ...]:
    """Return (lemma, tag, form), sorted, for words with one form, in plain letters, that differs from the lemma."""
    lemminflect = library("lemminflect")
    codec = library("lemminflect.codecs.InflectionLUCodec").InflectionLUCodec
    found = []
    for lemma in sorted(codec.load(lemminflect.config.inflection_lu_fn)):
        if not re.fullmatch("[a-z]{3,11}", lemma):
            continue
        forms = lemminflect.getAllInflections(lemma)
        for tag in ENDINGS:
            if len(forms.get(tag, ())) == 1 and re.fullmatch("[a-z]+", forms[tag][0]) and forms[tag][0] != lemma:
                found.append((lemma, tag, forms[tag][0]))
    return tuple(found)


def _difficulty(lemma: str, tag: str, form: str) -> int:
    """Return 1 if the ending is only added, 2 if that changes the spelling, 3 if no rule gives this form."""
    ending = ENDINGS[tag]
    if form == lemma + ending:
        return 1
    changed = {lemma + lemma[-1] + ending, lemma.removesuffix("e") + ending}
    if ending == "s":
        changed = {lemma + "es"}
    if lemma.endswith("y"):
        changed.add(lemma[:-1] + ("ies" if ending == "s" else "i" + ending))
    if lemma.endswith("ey"):
        changed.add(lemma[:-2] + "i" + ending)
    if lemma.endswith("ie") and tag == "VBG":
        changed.add(lemma[:-2] + "ying")
    if lemma.endswith("c"):
        changed.add(lemma + "k" + ending)
    return 2 if form in changed else 3


@cache
def _split(lemma: str) -> str:
    """Return the split of a word: that of the irregular word in it, so that undergo and go are in one split."""
    irregular = _irregular()
    own, roots = irregular.get(lemma, {}), [lemma]
    for start in range(1, len(lemma) - 1):
        theirs = irregular.get(lemma[start:], {})
        if any(form.endswith(theirs.get(tag, "-")) for tag, form in own.items()):
            roots.append(lemma[start:])
    return entity_split(roots[-1])


@cache
def _irregular() -> dict[str, dict[str, str]]:
    """Return the irregular forms of every word that has some, by tag."""
    forms: dict[str, dict[str, str]] = {}
    for lemma, tag, form in _lexicon():
        if _difficulty(lemma, tag, form) == 3:
            forms.setdefault(lemma, {})[tag] = form
    return forms


@cache
def _trained_words() -> frozenset[str]:
    """Return every word of the training items."""
    return frozenset(word for lemma, _, form in _lexicon() if _split(lemma) == "train" for word in (lemma, form))
