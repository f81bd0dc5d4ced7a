"""The page's parts, from top to bottom. Each function builds one of them inside the open `gr.Blocks`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import gradio as gr

from minilora_hub.demo.ui.blind_bar import BLIND_OFF
from minilora_hub.demo.ui.components import component
from minilora_hub.demo.ui.settings import Settings, build_settings


@dataclass(frozen=True)
class Parts:
    """What is wired.

    Attributes:
        head: the headline.
        notice: what became of ``?adapter=`` in the page's address.
        prompt: what to answer.
        run: the button that starts a comparison.
        stop: the button that ends it.
        examples: prompts to start from.
        settings: how tokens are chosen.
        blind: the bar on which names are hidden and votes are cast.
        status: the line that is read aloud.
        stage: the columns, see `frames.py`.
        finished: a `gr.State`: the stage of the visitor's last comparison, once it has ended. Its `change` is the place
            to hang on what happens then.
    """

    head: gr.HTML
    notice: gr.HTML
    prompt: gr.Textbox
    run: gr.Button
    stop: gr.Button
    examples: list[gr.Button]
    settings: Settings
    blind: gr.HTML
    status: gr.HTML
    stage: gr.HTML
    finished: gr.State


def build_parts(headline: dict, opening: dict, examples: Sequence[str], max_new_tokens: int, most_tokens: int) -> Parts:
    """Lay out the page.

    Args:
        headline: from `describing.headline`.
        opening: what ``stage`` and ``status`` show at first.
        examples: prompts to start from.
        max_new_tokens: where the length setting starts.
        most_tokens: where it ends.
    """
    head = component("head", value=headline)
    notice = component("notice", value={"phase": "none", "words": ""}, elem_id="ml-notice")
    prompt, run, stop = build_asking()
    chips = build_examples(examples)
    settings = build_settings(max_new_tokens, most_tokens)
    with gr.Row(elem_id="ml-line"):
        line = component("status", value=opening["status"], elem_id="ml-status")
        blind = component("blind", value=BLIND_OFF, elem_id="ml-blind")
    columns = component("stage", value=opening["stage"], elem_id="ml-stage")
    return Parts(head, notice, prompt, run, stop, chips, settings, blind, line, columns, gr.State(None))


def build_asking() -> tuple[gr.Textbox, gr.Button, gr.Button]:
    """Build the prompt bar."""
    with gr.Row(elem_id="ml-ask"):
        prompt = gr.Textbox(
            show_label=False,
            label="Prompt",
            placeholder="Ask all of them something…",
            lines=1,
            max_lines=8,
            container=False,
            scale=8,
            min_width=260,
            elem_id="ml-prompt",
        )
        with gr.Row(elem_id="ml-buttons", scale=1):
            run = gr.Button("Run", variant="primary", elem_id="ml-run", min_width=110)
            stop = gr.Button("Stop", interactive=False, elem_id="ml-stop", min_width=110)
    return prompt, run, stop


def build_examples(examples: Sequence[str]) -> list[gr.Button]:
    """Build a button for each example."""
    with gr.Row(elem_id="ml-examples"):
        return [gr.Button(example, size="sm", min_width=0, elem_classes="ml-chip") for example in examples]
