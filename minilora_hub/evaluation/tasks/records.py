"""A sentence about people, as a JSON record: names, jobs and countries from Faker.

1: three fields. 2: nested, or with fields that the sentence leaves out and that must be null. 3: two people: both as a
list, or one of them, identified by the job. Held out: sentences in the first person.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

from minilora_hub.evaluation.tasks.items import Draw, Item, distinct, entities_of, entity_split, library

FLAT = (
    "{name} is {age} and lives in {city}.",
    "{name}, {age}, comes from {city}.",
    "In {city} lives {name}, aged {age}.",
    "Age {age}, home {city}: {name}.",
)
NESTED = (
    "{name}, {age}, moved from {other} to {city} in {country}.",
    "{name} ({age}) lives in {city}, {country}, near a cousin of {cousin}.",
)
MISSING = (
    ("job", "{name} lives in {city} and is {age}."),
    ("age", "{name} works as {job} in {city}."),
    ("city", "{name} is {age} and works as {job}."),
)
PAIR = (
    "{name} is {age}, {second} is {older}.",
    "{second} ({older}) is a friend of {name} ({age}).",
    "{name}, {age}, works with {second}.",
)
AMONG = (
    "{name}, {age}, is {job} in {city}, {second} is {task} in {other}.",
    "{second} of {other} is {task}, while {name} of {city} is {job} and {age}.",
)
PROFESSIONS = ("er", "or", "ist", "ian", "ant", "ect")
HELD_OUT = ("My name is {name}, I am {age}, from {city}.", "Hi, {name} here, {age}. I live in {city}.")


@dataclass(frozen=True)
class _Pools:
    first: tuple[str, ...]
    last: tuple[str, ...]
    cities: tuple[str, ...]
    countries: tuple[str, ...]
    jobs: tuple[str, ...]


def make(split: str) -> tuple[Item, ...]:
    """Make all items of a split."""
    draw, pools = Draw("records", split), _pools(entities_of(split))
    return distinct(
        lambda: _item(draw, split, pools), {"train": 2000, "validation": 120, "test": 500, "held_out": 200}[split]
    )


@cache
def _pools(split: str) -> _Pools:
    people = library("faker.providers.person.en_US").Provider
    names = {*people.first_names_female, *people.first_names_male}
    surnames = {*people.last_names} - names
    countries = library("faker.providers.address").Provider.countries
    towns = library("faker.providers.address.de_DE").Provider.cities
    jobs = library("faker.providers.job").Provider.jobs
    return _Pools(
        first=tuple(sorted(name for name in names if name.isascii() and entity_split(name) == split)),
        last=tuple(sorted(name for name in surnames if entity_split(name) == split)),
        cities=tuple(sorted({town for town in towns if town.isascii() and town.isalpha()} - names - surnames)),
        countries=tuple(sorted({land for land in countries if land.isascii() and land.isalpha()} - names - surnames)),
        jobs=tuple(sorted({job.lower() for job in jobs if job.isalpha() and job.endswith(PROFESSIONS)})),
    )


def _item(draw: Draw, split: str, pools: _Pools) -> Item | None:
    def person() -> str:
        return f"{draw.one(pools.first)} {draw.one(pools.last)}"

    def job() -> str:
        title = draw.one(pools.jobs)
        return f"{'an' if title[0] in 'aeiou' else 'a'} {title}"

    known: dict[str, Any] = {
        "name": person(),
        "second": person(),
        "cousin": person(),
        "age": draw.number(18, 54),
        "older": draw.number(55, 90),
        "city": draw.one(pools.cities),
        "other": draw.one(pools.cities),
        "country": draw.one(pools.countries),
        "job": job(),
        "task": job(),
    }
    if known["name"] == known["second"] or known["city"] == known["other"] or known["job"] == known["task"]:
        return None
    difficulty = 1 if split == "held_out" else draw.one([1, 1, 2, 2, 2, 3, 3, 3])
    record: Any = {field: known[field] for field in ("name", "age", "city")}
    asked, form = "name, age, city", "flat"
    if split == "held_out":
        form, text = "first person", draw.one(HELD_OUT)
    elif difficulty == 1:
        text = draw.one(FLAT)
    elif difficulty == 2 and draw.number(0, 1):
        form, text, asked = "nested", draw.one(NESTED), "name, age, home {city, country}"
        record = {"name": known["name"], "age": known["age"], "home": {x: known[x] for x in ("city", "country")}}
    elif difficulty == 2:
        missing, text = draw.one(MISSING)
        form, asked = "missing", "name, age, job, city"
        values = known | {"job": known["job"].split()[1], missing: None}
        record = {field: values[field] for field in ("name", "age", "job", "city")}
    elif draw.number(0, 1):
        form, text, asked = "two people", draw.one(PAIR), "list of name, age"
        older = known["older"] if "{older}" in text else None
        record = [{"name": known["name"], "age": known["age"]}, {"name": known["second"], "age": older}]
        if text.startswith("{second}"):
            record.reverse()
    else:
        form, text, asked = "one of two", draw.one(AMONG), f"name, age, city of the {known['job'].split()[1]}"
    return Item(
        "records",
        split,
        f"JSON with {asked}: {text.format(**known)}",
        json.dumps(record),
        difficulty,
        known["name"],
        {"format": form},
    )
