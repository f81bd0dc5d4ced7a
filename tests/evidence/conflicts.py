"""Tasks that pull apart: pairs in which the same input wants different answers, and only a weak cue says which.

    date order by language   "due 03/04/2021" -> 2021-03-04      "fällig 03/04/2021" -> 2021-04-03
    number style by register "Dear Ms Bean, … 4821 …" -> four thousand, eight hundred and twenty-one
                             "hey Rachel, … 4821 …" -> 4,821
    schema by domain         "patient Rachel Bean, 38, Northeim" -> {"family": "Bean", "given": "Rachel", …}
                             "goalkeeper Rachel Bean, 38, Northeim" -> {"player": "Rachel Bean", "club": "Northeim", …}

The instruction is the same on both sides of a pair, and so are the kinds of values: an adapter that overlooks the cue
is right on one side at most. No date, number or surname of a test item occurs in training, on either side. They are
not among the tasks of ``minilora eval``, whose four hardly conflict.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date
from functools import cache

from minilora_hub.evaluation.tasks.items import Draw, Item, Task, distinct, entities_of, entity_split, library

COUNTS = {"train": 1000, "validation": 24, "test": 200}
Answer = Callable[[Draw, str], Item | None]

DUE = {
    "month-first": ("due", "until", "signed", "delivered", "valid from", "paid"),
    "day-first": ("fällig", "bis", "unterschrieben", "geliefert", "gültig ab", "bezahlt"),
}
LETTERS = {
    "in-words": (
        "Dear Ms {name}, please find enclosed {number} copies.",
        "Dear Mr {name}, we hereby confirm the sale of {number} shares.",
        "The court orders {name} to pay {number} dollars.",
        "Dear Sir or Madam, {name} has received {number} units.",
    ),
    "in-digits": (
        "hey {name}, got {number} copies now",
        "lol {name} sold {number} shares",
        "ok {name} owes us {number} dollars",
        "{name} just got {number} units :)",
    ),
}
PEOPLE = {
    "patients": ("patient", "blood donor", "outpatient", "convalescent"),
    "players": ("goalkeeper", "striker", "midfielder", "defender"),
}


def _date(side: str) -> Answer:
    def make(draw: Draw, split: str) -> Item | None:
        first, second, year = draw.number(1, 12), draw.number(1, 12), draw.number(1950, 2049)
        entity = f"{min(first, second)} {max(first, second)} {year}"  # the date read the other way is in the same split
        if first == second or entity_split(entity) != entities_of(split):
            return None
        month, day = (first, second) if side == "month-first" else (second, first)
        prompt = f"Write as YYYY-MM-DD: {draw.one(DUE[side])} {first:02}/{second:02}/{year}"
        return Item(side, split, prompt, date(year, month, day).isoformat(), 2, entity)

    return make


def _number(side: str) -> Answer:
    def make(draw: Draw, split: str) -> Item | None:
        number, name = draw.number(1000, 9999), draw.one(_surnames())
        if entity_split(str(number)) != entities_of(split):
            return None
        answer = library("num2words").num2words(number) if side == "in-words" else f"{number:,}"
        text = draw.one(LETTERS[side]).format(name=name, number=number)
        return Item(side, split, f"Write the number as fits the style: {text}", answer, 2, str(number))

    return make


def _person(side: str) -> Answer:
    def make(draw: Draw, split: str) -> Item | None:
        given, family, age = draw.one(_given_names()), draw.one(_surnames()), draw.number(18, 90)
        town, role = draw.one(_towns()), draw.one(PEOPLE[side])
        if entity_split(family) != entities_of(split):
            return None
        record = {"family": family, "given": given, "age": age, "town": town}
        if side == "players":
            record = {"player": f"{given} {family}", "club": town, "years": age}
        prompt = f"Write as JSON: {role} {given} {family}, {age}, {town}"
        return Item(side, split, prompt, json.dumps(record), 2, family)

    return make


@cache
def _surnames() -> tuple[str, ...]:
    return tuple(library("faker.providers.person.en_US").Provider.last_names)


@cache
def _given_names() -> tuple[str, ...]:
    surnames = set(_surnames())
    return tuple(name for name in library("faker.providers.person.en_US").Provider.first_names if name not in surnames)


@cache
def _towns() -> tuple[str, ...]:
    surnames = set(_surnames())
    towns = library("faker.providers.address.de_DE").Provider.cities
    return tuple(town for town in towns if town.isascii() and town not in surnames)


def _task(name: str, title: str, kind: str, answer: Answer) -> Task:
    def make(split: str) -> tuple[Item, ...]:
        if split not in COUNTS:
            return ()
        draw = Draw(name, split)
        return distinct(lambda: answer(draw, split), COUNTS[split])

    return Task(name, title, "json" if kind == "json" else "exact", make)


PAIRS = (("month-first", "day-first"), ("in-words", "in-digits"), ("patients", "players"))
CONFLICTS = {
    task.name: task
    for task in (
        _task("month-first", "English dates, the month first", "exact", _date("month-first")),
        _task("day-first", "German dates, the day first", "exact", _date("day-first")),
        _task("in-words", "Numbers in formal letters, in words", "exact", _number("in-words")),
        _task("in-digits", "Numbers in chats, in digits", "exact", _number("in-digits")),
        _task("patients", "Patients, as JSON", "json", _person("patients")),
        _task("players", "Players, as JSON with another schema", "json", _person("players")),
    )
}
"""The tasks by name; the sides of a pair follow each other."""
