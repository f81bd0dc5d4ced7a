"""The answers of all columns as one object."""

import re

from minilora_hub.compare.engine import CompareEngine, Sampling
from minilora_hub.compare.side_by_side import SideBySide, answer_side_by_side


def test_it_holds_what_is_streamed_and_shows_it_escaped(saved):
    base, adapters = saved
    engine = CompareEngine(base, adapters, device="cpu")
    found = answer_side_by_side(engine, "<b>Hello</b>", Sampling(5))
    streamed = ["", "", "", ""]
    for update in engine.stream("<b>Hello</b>", Sampling(5)):
        streamed[update.row] += update.text
    assert list(found.texts) == streamed
    assert found.tokens == (5,) * 4
    assert found.reasons == ("length",) * 4
    texts = ("<i>", *streamed[1:])
    shown = SideBySide("<b>?", found.columns, texts, found.tokens, found.reasons, found.errors)._repr_html_()
    assert "<p>&lt;b&gt;?</p>" in shown
    assert "&lt;i&gt;" in shown
    assert "<i>" not in shown
    assert re.findall(r"<th>(\w+)<br><small>(\w+)", shown) == [
        ("base", "base"), ("mix", "MixLoRA"), ("dora", "DoRA"), ("lora", "LoRA"),
    ]  # fmt: skip
