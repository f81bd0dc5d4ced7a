"""Format numbers, sizes, durations and texts from outside, for the terminal and for Markdown.

Names, prompts and answers on a card come from people and models: a `|` must not break a table, the backticks of an
answer must not end a code block, and `<script>` must not act. Every such text passes through a function of this module.
"""

from __future__ import annotations

import html
import re
from typing import Any

UNKNOWN = "unknown"

# Direction overrides and isolates make a text read differently from what it says.
# Not the joiners U+200C and U+200D, which emoji and several scripts are written with.
INVISIBLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]")
PUNCTUATION = re.compile(r"([\\`*_\[\]|~$#])")


def visible(text: str) -> str:
    """Write control and direction characters as escapes; all line ends become newlines."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    return INVISIBLE.sub(lambda found: f"\\u{ord(found[0]):04x}", lines)


def one_line(text: str) -> str:
    """Return a text as `visible`, in one line without runs of white space."""
    return " ".join(visible(text).split())


def lone_surrogate(value: Any) -> str | None:
    """Return the first lone surrogate in a value's strings, at any depth, as a JSON escape."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            try:
                one.encode()
            except UnicodeEncodeError as error:
                return ascii(one[error.start])[1:-1]
        elif isinstance(one, (dict, list)):
            left += reversed([*one, *one.values()] if isinstance(one, dict) else one)
    return None


def require_encodable(value: Any, name: str) -> None:
    """Check that strings from outside are text: JSON and command lines can hold what no tokenizer can encode.

    Raises:
        ValueError: a string in `value` has a lone surrogate.
    """
    if found := lone_surrogate(value):
        raise ValueError(f"{name}: must not contain lone surrogates ({found}), which UTF-8 cannot encode")


def inline(value: object) -> str:
    """Escape a value for a paragraph, a heading, a link or a table cell."""
    if value is None:
        return UNKNOWN
    # Backslashes before entities, whose own `#` and `&` must stay.
    return html.escape(PUNCTUATION.sub(r"\\\1", one_line(str(value))), quote=False)


def cell(value: str) -> str:
    """Escape a text of several lines for a table cell; its line breaks and indentation are kept."""
    lines = visible(value).strip("\n").split("\n")
    return "<br>".join("&nbsp;" * (len(line) - len(line.lstrip())) + inline(line) for line in lines)


def code(value: object) -> str:
    """Put a value into a code span, also inside a table cell; None becomes the plain word "unknown"."""
    if value is None:
        return UNKNOWN
    text = one_line(str(value)) or " "
    if "|" in text:  # in a code span it would end a table cell, and outside a table its escape would be shown
        entities = re.sub(r"[^\w\s.,/-]|_", lambda found: f"&#{ord(found[0])};", text)
        return f"<code>{entities}</code>"
    ticks = "`" * (_longest_run_of_ticks(text) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def block(text: str, language: str = "text") -> str:
    """Put a text into a code block whose fence it cannot close."""
    fence = "`" * max(3, _longest_run_of_ticks(text) + 1)
    return f"{fence}{language}\n{visible(text).rstrip()}\n{fence}"


def _longest_run_of_ticks(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def number(value: float | None) -> str:
    """Format a number with separated thousands and four significant digits of a fraction."""
    if value is None:
        return UNKNOWN
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:.4g}"


def short(value: float) -> str:
    """Format a number with three significant digits."""
    return f"{value:.3g}"


def between(interval: tuple[float, float] | None) -> str:
    """Format an interval."""
    return UNKNOWN if interval is None else f"{short(interval[0])} to {short(interval[1])}"


def percent(share: float | None) -> str:
    """Format a share in percent with two decimals."""
    return UNKNOWN if share is None else f"{100 * share:.2f}%"


def duration(seconds: float | None) -> str:
    """Format seconds as hours, minutes and seconds."""
    if seconds is None:
        return UNKNOWN
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest, "s")]
    return " ".join(f"{value} {unit}" for value, unit in parts if value) or "0 s"


def counted(count: int, noun: str) -> str:
    """Return a number with its noun: 1 step, 2 steps."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def size(count: float) -> str:
    """Format a number of bytes in decimal units, as the Hub does."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
