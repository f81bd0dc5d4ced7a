"""Dates in words, as YYYY-MM-DD: babel's formats in seven languages, spelled-out dates, dates beside another date.

1: English dates. 2: other languages, and English in words only. 3: a date before or after another one, the last day
of a month, and other languages in words only. Held out: Swedish and Danish.
"""

from __future__ import annotations

from datetime import date, timedelta

from minilora_hub.evaluation.tasks.items import Draw, Item, distinct, entities_of, entity_split, library

FIRST, LAST = date(1900, 1, 1), date(2079, 12, 31)
ENGLISH = [
    *((locale, style) for locale in ("en_US", "en_GB") for style in ("full", "long", "medium")),
    ("en_US", "EEE MMM d yyyy"),
    ("en_GB", "EEE d MMM yyyy"),
]
OTHERS = [(locale, style) for locale in ("de", "fr", "es", "it", "pt", "nl") for style in ("full", "long", "medium")]
HELD_OUT = [(locale, style) for locale in ("sv", "da") for style in ("full", "long")]
IN_WORDS = {"es": "{day} de {month} de {year}", "fr": "le {day} {month} {year}", "it": "il {day} {month} {year}"}
STEPS = {
    "the day after": 1,
    "the day before": -1,
    "two days after": 2,
    "three days before": -3,
    "a week after": 7,
    "a week before": -7,
    "ten days after": 10,
    "two weeks before": -14,
}


def make(split: str) -> tuple[Item, ...]:
    """Make all items of a split."""
    draw = Draw("dates", split)
    return distinct(lambda: _item(draw, split), {"train": 2000, "validation": 120, "test": 500, "held_out": 200}[split])


def _item(draw: Draw, split: str) -> Item:
    difficulty = draw.one([1, 1, 1, 2, 2, 2, 2, 3, 3, 3])
    if split == "held_out":
        difficulty, (locale, style) = 2, draw.one(HELD_OUT)
        form, day = f"{locale} {style}", _day(draw, split)
        text = _formatted(day, locale, style)
    elif difficulty == 1:
        locale, style = draw.one(ENGLISH)
        form, day = f"{locale} {style}", _day(draw, split)
        text = _formatted(day, locale, style)
    elif difficulty == 2:
        locale, style = draw.one([*OTHERS, *[("en_US", "words")] * 5])
        form, day = f"{locale} {style}", _day(draw, split)
        text = _english_words(day) if style == "words" else _formatted(day, locale, style)
    else:
        form = draw.one(["step", "step", "step", "month end", "words"])
        if form == "step":
            phrase = draw.one(list(STEPS))
            day = _day(draw, split, STEPS[phrase])
            named = day - timedelta(days=STEPS[phrase])
            text = f"{phrase} {_formatted(named, *draw.one([('en_US', 'long'), ('en_GB', 'full')]))}"
        elif form == "month end":
            day = _day(draw, split, month_end=True)
            text = f"the last day of {_formatted(day, 'en_US', 'MMMM y')}"
        else:
            locale = draw.one(list(IN_WORDS))
            form, day = f"{locale} words", _day(draw, split)
            text = _words(day, locale)
    labels = {"format": form}
    answer = day.isoformat()
    return Item("dates", split, f"Write as YYYY-MM-DD: {text}", answer, difficulty, answer, labels)


def _day(draw: Draw, split: str, step: int = 0, month_end: bool = False) -> date:
    """Draw a date of the split; the date `step` days earlier, which a prompt names, is also of this split."""
    while True:
        day = FIRST + timedelta(days=draw.number(20, (LAST - FIRST).days - 20))
        if month_end:
            day = (day.replace(day=1) + timedelta(days=31)).replace(day=1) - timedelta(days=1)
        if {entity_split((day - timedelta(days=days)).isoformat()) for days in (0, step)} == {entities_of(split)}:
            return day


def _formatted(day: date, locale: str, style: str) -> str:
    text = library("babel.dates").format_date(day, format=style, locale=locale)
    return " ".join(text.split())  # some locales use other kinds of space


def _english_words(day: date) -> str:
    number = library("num2words").num2words
    month = _formatted(day, "en_US", "MMMM")
    return f"the {number(day.day, to='ordinal')} of {month}, {number(day.year, to='year')}"


def _words(day: date, locale: str) -> str:
    number = library("num2words").num2words
    return IN_WORDS[locale].format(
        day=number(day.day, lang=locale),
        month=_formatted(day, locale, "MMMM"),
        year=number(day.year, lang=locale),
    )
