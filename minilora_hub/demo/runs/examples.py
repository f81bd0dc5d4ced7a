"""Example prompts of the page, with the expected answers, and whether an answer is right. No Gradio."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from minilora_hub.evaluation.metrics import exact_match, json_field_f1


@dataclass(frozen=True)
class Example:
    """A prompt to start from.

    Attributes:
        prompt: the prompt.
        label: one or two words that name it.
        expected: the one right answer; None where there is none.
    """

    prompt: str
    label: str = ""
    expected: str | None = None


EXAMPLES = (
    # Items of the test split of the tasks that the shipped adapters were trained on, on which the adapters differ.
    Example("Write this in words: 534.38", "Number", "five hundred and thirty-four point three eight"),
    Example("Write as YYYY-MM-DD: the day after Monday, 27 September 2027", "Date", "2027-09-28"),
    Example("Write the -ing form of: even", "Verb", "evening"),
    Example(
        "JSON with name, age, home {city, country}: Stacy Peck, 24, moved from Forchheim to Siegen in France.",
        "JSON",
        '{"name": "Stacy Peck", "age": 24, "home": {"city": "Siegen", "country": "France"}}',
    ),
    # All adapters fail here.
    Example("Write as YYYY-MM-DD: a week after September 18, 2002", "Too hard", "2002-09-25"),
    # They were not trained on this.
    Example("Why is the sky blue?", "Not trained"),
)


def expected_answers(examples: Iterable[Example]) -> dict[str, str]:
    """Return the expected answer of each prompt that has one."""
    return {one.prompt: one.expected for one in examples if one.expected is not None}


def is_right(answer: str, expected: str) -> bool:
    """Whether an answer is the expected one: the same text, or the same JSON fields and values."""
    if exact_match(answer, expected):
        return True
    return expected.startswith(("{", "[")) and json_field_f1(answer, expected) == 1
