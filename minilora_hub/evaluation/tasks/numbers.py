"""Numbers in words, as digits and back, by num2words.

1: English to 9,999. 2: English to 999,999, ordinals, years. 3: English to a billion, decimals, other languages.
Held out: Italian. No number is a year that dates are made of, or an age in a record.
"""

from __future__ import annotations

from minilora_hub.evaluation.tasks.items import Draw, Item, distinct, entities_of, entity_split, library

LANGUAGES = ("de", "fr", "es", "pt")
HELD_OUT = ("it",)
FORMS = {1: ("cardinal",), 2: ("cardinal", "cardinal", "ordinal", "year"), 3: ("cardinal", "decimal", "language")}


def make(split: str) -> tuple[Item, ...]:
    """Make all items of a split."""
    draw = Draw("numbers", split)
    return distinct(lambda: _item(draw, split), {"train": 2000, "validation": 120, "test": 500, "held_out": 200}[split])


def _item(draw: Draw, split: str) -> Item | None:
    say = library("num2words").num2words
    difficulty = draw.one([1, 1, 1, 2, 2, 2, 2, 3, 3, 3])
    form = draw.one(FORMS[difficulty])
    to_digits = draw.number(0, 1) == 0
    if split == "held_out":
        difficulty, form = 3, "language"
    if form == "decimal":
        whole, part = draw.number(100, 9999), draw.number(11, 99)
        entity = digits = f"{whole}.{part:02}"
        words = say(digits)  # a text: no rounding
    elif form == "language":
        number, to_digits = draw.number(100, 9999), True
        language = draw.one(HELD_OUT if split == "held_out" else LANGUAGES)
        entity = digits = str(number)
        form, words = language, say(number, lang=language)
    else:
        low, high = {1: (100, 9999), 2: (10_000, 999_999), 3: (1_000_000, 999_999_999)}[difficulty]
        if form == "ordinal":
            low, high = 100, 9999
        elif form == "year":
            low, high = 1100, 1899
        number = draw.number(low, high)
        entity, words = str(number), say(number, to=form)
        digits = say(number, to="ordinal_num") if form == "ordinal" else entity
        # Longer answers than these cost too much to write.
        to_digits = to_digits or number >= 1_000_000
    if 1900 <= float(entity) < 2080 or entity_split(entity) != entities_of(split):
        return None
    direction = "digits" if to_digits else "words"
    prompt, completion = (words, digits) if to_digits else (digits, words)
    what = "the year" if form == "year" else "this"
    labels = {"format": form, "direction": direction}
    return Item("numbers", split, f"Write {what} in {direction}: {prompt}", completion, difficulty, entity, labels)
