"""The panel that shows that the base's column is the base."""

from __future__ import annotations

import gradio as gr

from minilora_hub.demo.runs.runner import Runner
from minilora_hub.formatting import inline

TITLE = "Is the base the base?"


def build_base_panel(runner: Runner) -> None:
    """Compare the base's column with the bare checkpoint, and build the panel, collapsed, with the result.

    There is none where the engine keeps no logits of the checkpoint.
    """
    proof = runner.engine.base_proof()
    if proof is None:
        return
    catalogue = runner.catalogue
    (weights,) = catalogue.weights(())
    with gr.Accordion(TITLE, open=False, elem_id="ml-proof"):
        gr.Markdown(
            f"{proof.described()}\n\n"
            f"Checkpoint: {inline(catalogue.base)}, fingerprint of its files `{weights.hash}`. Measured when this page "
            "started, against the model as transformers loaded it, before there was an adapter. The last token of each "
            "prompt is computed alone, as in generation."
        )
