"""Answer one prompt with every column of an engine, as one object that a notebook shows as a table."""

from __future__ import annotations

import html
from dataclasses import dataclass

from minilora_hub.compare.answer import Column
from minilora_hub.compare.engine import CompareEngine, Sampling


@dataclass(frozen=True)
class SideBySide:
    """The answers to one prompt.

    Attributes:
        prompt: the prompt.
        columns: the models, the base first.
        texts: the answer of each.
        tokens: its number of tokens.
        reasons: why it ended: ``"eos"``, ``"length"``, ``"stop"`` or ``"error"``.
        errors: what went wrong; None where nothing did.
    """

    prompt: str
    columns: tuple[Column, ...]
    texts: tuple[str, ...]
    tokens: tuple[int, ...]
    reasons: tuple[str | None, ...]
    errors: tuple[str | None, ...]

    def _repr_html_(self) -> str:
        """Show a column for each model, in a notebook. Texts are escaped."""
        heads = [f"<th>{html.escape(one.name)}<br><small>{html.escape(one.kind)}</small></th>" for one in self.columns]
        cells = [
            f'<td style="white-space: pre-wrap; vertical-align: top">{html.escape(error or text)}<br>'
            f"<small>{count} tokens, {html.escape(str(reason))}</small></td>"
            for text, count, reason, error in zip(self.texts, self.tokens, self.reasons, self.errors, strict=True)
        ]
        return (
            f"<p>{html.escape(self.prompt)}</p>"
            f"<table><tr>{''.join(heads)}</tr><tr style='text-align: left'>{''.join(cells)}</tr></table>"
        )


def answer_side_by_side(engine: CompareEngine, prompt: str, sampling: Sampling) -> SideBySide:
    """Answer `prompt` with the base and all adapters of an engine, in one batch.

    Raises:
        ValueError: the prompt is empty, longer than the base's context, or has a token without an embedding.
    """
    columns = engine.columns
    texts, last = [""] * len(columns), {}
    for update in engine.stream(prompt, sampling):
        texts[update.row] += update.text
        last[update.row] = update
    ends = [last[row] for row in range(len(columns))]
    return SideBySide(
        prompt,
        columns,
        tuple(texts),
        tuple(end.tokens for end in ends),
        tuple(end.reason for end in ends),
        tuple(end.error for end in ends),
    )
