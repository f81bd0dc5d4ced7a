"""Three small tasks, made from word lists: dates, numbers in words, and sentences that become JSON records.

They are chosen so that a reader sees the difference at once: the base answers in prose, the adapters with exactly the
date, the number or the record. Names, cities and years of the test items never occur in training.
"""

from __future__ import annotations

import json
import random
from typing import Any

TASKS = {
    "date": "Write a spoken date as YYYY-MM-DD",
    "number": "Write a number in words in digits",
    "record": "Write a sentence as a JSON record",
}
DATA = (
    "Made by minilora_hub.training.first_tasks from word lists: dates to write as YYYY-MM-DD, numbers to write in "
    "digits, sentences to write as JSON records. The names, cities, years and numbers of the test items never occur in "
    "training."
)

NAMES = "Maria Tom Aisha Liam Chen Sofia Omar Ines Jonas Priya Mateo Freya Kofi Hana Diego Nora Ivan Leila Hugo Amara"
CITIES = "Lisbon Oslo Nairobi Lima Kyoto Prague Dakar Quito Porto Turin Leeds Riga Accra Hanoi Malmo Izmir Bergen Tunis"
JOBS = "baker teacher nurse pilot carpenter chemist farmer painter lawyer plumber"
MONTHS = "January February March April May June July August September October November December"
ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth "
    "sixteenth seventeenth eighteenth nineteenth twentieth twenty-first twenty-second twenty-third twenty-fourth "
    "twenty-fifth twenty-sixth twenty-seventh twenty-eighth"
)
UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
HELD_OUT = 5
"""Every fifth name, city and year, and every number that it divides, is for testing only."""


def number_in_words(number: int) -> str:
    """An integer from 0 to 9999 in English words."""
    if number < 20:
        return UNITS.split()[number]
    if number < 100:
        tens, rest = divmod(number, 10)
        return TENS.split()[tens - 2] + (f"-{UNITS.split()[rest]}" if rest else "")
    size, word = (1000, "thousand") if number >= 1000 else (100, "hundred")
    head, rest = divmod(number, size)
    joint = " and " if rest and (size == 100 or rest < 100) else " "
    return f"{UNITS.split()[head]} {word}" + (f"{joint}{number_in_words(rest)}" if rest else "")


def _pick(rng: random.Random, values: list[Any], test: bool) -> Any:
    return rng.choice([value for i, value in enumerate(values) if (i % HELD_OUT == 0) == test])


def make_item(rng: random.Random, test: bool) -> dict[str, str]:
    """One task item: its task, prompt and completion. Test items use entities that training items never do."""
    task = rng.choice(["date", "number", "record"])
    if task == "date":
        months, ordinals = MONTHS.split(), ORDINALS.split()
        day, month, year = rng.randrange(28), rng.randrange(12), _pick(rng, list(range(1950, 2050)), test)
        spoken = rng.choice(
            [
                f"the {ordinals[day]} of {months[month]} {year}",
                f"{months[month]} {day + 1}, {year}",
                f"{day + 1} {months[month]} {year}",
            ]
        )
        return {
            "task": task,
            "prompt": f"Write this date as YYYY-MM-DD: {spoken}",
            "completion": f"{year}-{month + 1:02}-{day + 1:02}",
        }
    if task == "number":
        number = _pick(rng, list(range(20, 10000)), test)
        return {
            "task": task,
            "prompt": f"Write this number in digits: {number_in_words(number)}",
            "completion": str(number),
        }
    record = {
        "name": _pick(rng, NAMES.split(), test),
        "age": rng.randint(18, 80),
        "city": _pick(rng, CITIES.split(), test),
        "job": rng.choice(JOBS.split()),
    }
    sentence = rng.choice(
        [
            "{name} is a {age}-year-old {job} from {city}.",
            "In {city} lives {name}, a {job}, who is {age} years old.",
            "{name}, {age}, works as a {job} in {city}.",
        ]
    )
    return {
        "task": task,
        "prompt": f"Write a JSON record with name, age, city and job: {sentence.format(**record)}",
        "completion": json.dumps(record),
    }


def make_items(count: int, test: bool, seed: int) -> list[dict[str, str]]:
    """`count` items; the same for the same arguments."""
    rng = random.Random(seed)  # noqa: S311  (data, not secrets)
    return [make_item(rng, test) for _ in range(count)]
