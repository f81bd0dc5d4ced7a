"""Build the page's components, from top to bottom; the other modules connect their events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import gradio as gr

from minilora_hub.demo.runs.examples import Example
from minilora_hub.demo.ui.blind_bar import BLIND_OFF
from minilora_hub.demo.ui.components import component
from minilora_hub.demo.ui.settings import Settings, build_settings

NO_NOTICE = {"phase": "none", "words": ""}


@dataclass(frozen=True)
class Parts:
    """The components."""

    headline: gr.HTML
    notice: gr.HTML  # result of ?adapter= or ?shared= in the page's URL
    prompt: gr.Textbox
    run: gr.Button
    stop: gr.Button
    examples: gr.HTML  # prompts to start from
    settings: Settings
    status: gr.HTML  # the line above the columns
    blind: gr.HTML  # the bar for blind votes
    stage: gr.HTML  # the columns, see `page_state.py`
    finished: gr.State  # stage of the visitor's last finished comparison; fires `change`


def build_parts(
    headline: dict, opening: dict, examples: Sequence[Example], max_new_tokens: int, most_tokens: int
) -> Parts:
    """Build the parts inside the open `gr.Blocks`.

    Args:
        headline: from `columns.headline`.
        opening: initial values of ``stage`` and ``status``.
        examples: example prompts.
        max_new_tokens: initial value of the length setting.
        most_tokens: maximum of the length setting.
    """
    with gr.Column(elem_id="ml-page"):
        head = component("headline", value=headline, elem_id="ml-head")
        notice = component("notice", value=NO_NOTICE, elem_id="ml-notice")
        with gr.Row(elem_id="ml-ask"):
            prompt = gr.Textbox(
                show_label=False,
                label="Prompt",
                placeholder="Ask all models…",
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
        shown = [{"label": one.label, "prompt": one.prompt} for one in examples]
        chips = component("examples", value=shown, elem_id="ml-examples")
        settings = build_settings(max_new_tokens, most_tokens)
        with gr.Row(elem_id="ml-line"):
            status = component("status_line", value=opening["status"], elem_id="ml-status")
            blind = component("blind_bar", value=BLIND_OFF, elem_id="ml-blind")
        stage = component("stage", value=opening["stage"], elem_id="ml-stage")
    return Parts(head, notice, prompt, run, stop, chips, settings, status, blind, stage, gr.State(None))
