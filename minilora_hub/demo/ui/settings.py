"""The sampling settings: two locks (greedy, seed), and what the rest of the page reads from and writes to them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from minilora_hub.compare.engine import Sampling

LARGEST_SEED = 2**31 - 1


@dataclass(frozen=True)
class Settings:
    """The components.

    Attributes:
        tokens: the most tokens of an answer.
        greedy: whether the most probable token is always taken; the next three are without effect then.
        temperature: above 0.
        top_p: of nucleus sampling.
        top_k: 0 keeps all.
        penalty: on repetition, 1 is none.
        seed: of the last or the next run.
        keep_seed: whether the next run takes the same seed; otherwise it draws one, and shows it.
    """

    tokens: gr.Slider
    greedy: gr.Checkbox
    temperature: gr.Slider
    top_p: gr.Slider
    top_k: gr.Slider
    penalty: gr.Slider
    seed: gr.Number
    keep_seed: gr.Checkbox

    @property
    def inputs(self) -> list:
        """What `sampling_from` takes, in its order."""
        return [self.tokens, self.greedy, self.temperature, self.top_p, self.top_k, self.penalty, self.seed]


def build_settings(max_new_tokens: int, most_tokens: int) -> Settings:
    """Build them, closed; `max_new_tokens` is where the length starts, `most_tokens` where it ends."""
    with gr.Accordion("Settings", open=False, elem_id="ml-settings"):
        with gr.Row():
            tokens = gr.Slider(
                1, most_tokens, min(max_new_tokens, most_tokens), step=1, label="Max new tokens", min_width=200
            )
            penalty = gr.Slider(1, 2, 1, step=0.05, label="Repetition penalty (1 is none)", min_width=200)
            greedy = gr.Checkbox(
                True, label="Greedy", info="Always the most probable token: the same answer every time.", min_width=200
            )
        with gr.Row():
            temperature = gr.Slider(0.05, 2, 0.7, step=0.05, label="Temperature", min_width=200, interactive=False)
            top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", min_width=200, interactive=False)
            top_k = gr.Slider(0, 200, 0, step=1, label="Top-k (0 keeps all)", min_width=200, interactive=False)
        with gr.Row():
            seed = gr.Number(
                0, precision=0, minimum=0, maximum=LARGEST_SEED, label="Seed", min_width=200, interactive=False
            )
            keep_seed = gr.Checkbox(
                False,
                label="Keep the seed",
                info="Otherwise every run draws another one, and shows it here.",
                min_width=200,
                interactive=False,
            )
    settings = Settings(tokens, greedy, temperature, top_p, top_k, penalty, seed, keep_seed)
    sampled = [temperature, top_p, top_k, seed, keep_seed]
    greedy.change(
        lambda locked: [gr.update(interactive=not locked)] * len(sampled),
        greedy,
        sampled,
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
    return settings


def sampling_from(
    tokens: float, greedy: bool, temperature: float, top_p: float, top_k: float, penalty: float, seed: float | None
) -> Sampling:
    """Read the settings.

    Raises:
        ValueError: one is out of range; the message names it.
    """
    warmth = 0.0 if greedy else float(temperature)
    return Sampling(int(tokens), warmth, float(top_p), int(top_k), float(penalty), int(seed or 0))


def next_seed(greedy: bool, keep: bool, seed: float | None) -> int:
    """Return the seed of the next run: the same where it is kept or without effect, otherwise another."""
    return int(seed or 0) if greedy or keep else secrets.randbelow(LARGEST_SEED)


def restored(sampling: Mapping[str, Any]) -> list:
    """Return values for `Settings.inputs`, from what a record wrote down; what is missing stays as it is."""
    warmth = sampling.get("temperature")
    greedy = gr.skip() if warmth is None else warmth == 0
    values = [
        sampling.get("max_new_tokens", gr.skip()),
        greedy,
        warmth or gr.skip(),
        sampling.get("top_p", gr.skip()),
        sampling.get("top_k", gr.skip()),
        sampling.get("repetition_penalty", gr.skip()),
        sampling.get("seed", gr.skip()),
    ]
    return values
