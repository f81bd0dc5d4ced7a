"""The sampling settings, with switches for greedy decoding and a fixed seed."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from minilora_hub.compare.engine import Sampling
from minilora_hub.demo.ui.components import QUIET

LARGEST_SEED = 2**31 - 1
LONGEST_SYSTEM = 4000
INPUTS = ("max_new_tokens", "greedy", "temperature", "top_p", "top_k", "repetition_penalty", "seed")


@dataclass(frozen=True)
class Settings:
    """The components; a component named like a field of `Sampling` holds its value."""

    max_new_tokens: gr.Slider
    greedy: gr.Checkbox  # always take the most probable token; the next three have no effect then
    temperature: gr.Slider
    top_p: gr.Slider
    top_k: gr.Slider
    repetition_penalty: gr.Slider
    seed: gr.Number  # seed of the last or the next run
    keep_seed: gr.Checkbox  # if off, each run draws a seed and shows it
    system: gr.Textbox  # system prompt, before the conversation

    @property
    def inputs(self) -> list:
        """The arguments of `sampling_from`, in their order."""
        return [getattr(self, name) for name in INPUTS]

    def restored(self, sampling: Mapping[str, Any]) -> dict:
        """Return the components' values for stored settings; components without a stored value are not changed."""
        values: dict = {getattr(self, name): sampling[name] for name in INPUTS if name in sampling}
        if "temperature" in sampling:
            values[self.greedy] = sampling["temperature"] == 0
            values[self.temperature] = sampling["temperature"] or gr.skip()
            values[self.system] = sampling.get("system_prompt", "")
        return values


def build_settings(max_new_tokens: int, most_tokens: int) -> Settings:
    """Build the settings, collapsed; `max_new_tokens` is the initial length and `most_tokens` the maximum."""

    def slider(least: float, most: float, value: float, step: float, label: str, **fields: Any) -> gr.Slider:
        return gr.Slider(least, most, value, step=step, label=label, min_width=200, **fields)

    with gr.Accordion("Settings", open=False, elem_id="ml-settings"):
        system = gr.Textbox(
            "",
            label="System prompt",
            placeholder="Empty: that of the model's chat template",
            lines=1,
            max_lines=6,
            max_length=LONGEST_SYSTEM,
        )
        with gr.Row():
            tokens = slider(1, most_tokens, min(max_new_tokens, most_tokens), 1, "Max new tokens")
            penalty = slider(1, 2, 1, 0.05, "Repetition penalty (1 is none)")
            info = "Always take the most probable token, so that answers are reproducible."
            greedy = gr.Checkbox(True, label="Greedy", info=info, min_width=200)
        with gr.Row():
            temperature = slider(0.05, 2, 0.7, 0.05, "Temperature", interactive=False)
            top_p = slider(0.05, 1, 1, 0.05, "Top-p", interactive=False)
            top_k = slider(0, 200, 0, 1, "Top-k (0 keeps all)", interactive=False)
        with gr.Row():
            seed = gr.Number(
                0, precision=0, minimum=0, maximum=LARGEST_SEED, label="Seed", min_width=200, interactive=False
            )
            info = "If off, every run draws a new seed and shows it here."
            keep_seed = gr.Checkbox(False, label="Keep the seed", info=info, min_width=200, interactive=False)
    sampled = [temperature, top_p, top_k, seed, keep_seed]
    greedy.change(
        lambda locked: [gr.update(interactive=not locked)] * len(sampled), greedy, sampled, queue=False, **QUIET
    )
    return Settings(tokens, greedy, temperature, top_p, top_k, penalty, seed, keep_seed, system)


def sampling_from(
    tokens: float, greedy: bool, temperature: float, top_p: float, top_k: float, penalty: float, seed: float | None
) -> Sampling:
    """Return the settings; raise ValueError if one is out of range."""
    heat = 0.0 if greedy else float(temperature)
    return Sampling(int(tokens), heat, float(top_p), int(top_k), float(penalty), int(seed or 0))


def next_seed(greedy: bool, keep: bool, seed: float | None) -> int:
    """Return the seed of the next run: unchanged if it is kept or has no effect, otherwise random."""
    return int(seed or 0) if greedy or keep else secrets.randbelow(LARGEST_SEED)
