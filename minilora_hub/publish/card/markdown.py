"""Text from outside, put into Markdown so that it is shown and never acts.

Names, prompts and answers on a card come from people and models: a table must not break at a `|`, a code block must not
end at the backticks of an answer, and `<script>` is something to read. Every such text passes through one of these.
"""

from __future__ import annotations

import html
import re

UNKNOWN = "unknown"

# Direction overrides and isolates make a text read differently from what it says.
INVISIBLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")
PUNCTUATION = re.compile(r"([\\`*_\[\]|~$#])")


def visible(text: str) -> str:
    """Write control and direction characters as escapes; line ends become plain ones."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    return INVISIBLE.sub(lambda found: f"\\u{ord(found[0]):04x}", lines)


def inline(value: object) -> str:
    """Plain text for a paragraph, a heading, a link or a table cell."""
    if value is None:
        return UNKNOWN
    one_line = " ".join(visible(str(value)).split())
    # The backslash comes before the entities, whose own `#` and `&` must stay as they are.
    return html.escape(PUNCTUATION.sub(r"\\\1", one_line), quote=False)


def cell(value: str) -> str:
    """Text of several lines in a table cell; its line breaks and indentation show."""
    lines = visible(value).strip("\n").split("\n")
    return "<br>".join("&nbsp;" * (len(line) - len(line.lstrip())) + inline(line) for line in lines)


def code(value: object) -> str:
    """Text in a code span, also inside a table cell; None becomes the bare word "unknown"."""
    if value is None:
        return UNKNOWN
    one_line = " ".join(visible(str(value)).split()) or " "
    if "|" in one_line:  # a table would split the cell here, and outside a table the escape would show
        return f"<code>{_entities(one_line)}</code>"
    ticks = "`" * (_longest_run(one_line, "`") + 1)
    pad = " " if one_line.startswith("`") or one_line.endswith("`") else ""
    return f"{ticks}{pad}{one_line}{pad}{ticks}"


def _entities(text: str) -> str:
    """Text between HTML tags in Markdown: nothing in it is read as HTML or as Markdown."""
    return re.sub(r"[^\w\s.,/-]|_", lambda found: f"&#{ord(found[0])};", text)


def block(text: str, language: str = "text") -> str:
    """A fenced block, with a fence that the text cannot close."""
    fence = "`" * max(3, _longest_run(text, "`") + 1)
    return f"{fence}{language}\n{visible(text).rstrip()}\n{fence}"


def _longest_run(text: str, character: str) -> int:
    return max((len(run) for run in re.findall(f"{re.escape(character)}+", text)), default=0)


def number(value: float | None) -> str:
    """A number as a reader likes it: thousands separated, four significant digits of a fraction."""
    if value is None:
        return UNKNOWN
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:.4g}"


def short(value: float) -> str:
    """A number to three significant digits, for the ends of an interval."""
    return f"{value:.3g}"


def between(interval: tuple[float, float] | None) -> str:
    """An interval's two ends."""
    return UNKNOWN if interval is None else f"{short(interval[0])} to {short(interval[1])}"


def percent(share: float | None) -> str:
    """A share in percent, two digits after the point."""
    return UNKNOWN if share is None else f"{100 * share:.2f}%"


def duration(seconds: float | None) -> str:
    """Seconds as hours, minutes and seconds."""
    if seconds is None:
        return UNKNOWN
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest, "s")]
    return " ".join(f"{value} {unit}" for value, unit in parts if value) or "0 s"
