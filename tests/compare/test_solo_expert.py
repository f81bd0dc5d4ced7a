"""One expert forced: against a plain model into whose weights that expert, and nothing else, was merged."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_stand_ins import byte_tokenizer, tiny_llama

from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.compare.engine import CompareEngine, Row, Sampling


@pytest.fixture
def folders(saved):
    return {path.name: path for path in saved[1]}


def merged(folder, expert):
    """The tiny base with the attention's LoRA and one expert added to its weights, from the file's own tensors."""
    model = tiny_llama()
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    added = 0
    with torch.no_grad():
        for name, a in tensors.items():
            if not name.endswith("lora_A") and "lora_A" not in name:
                continue
            b = tensors[name.replace("lora_A", "lora_B")]
            stacked = a.dim() == 3
            r = a.shape[-2]
            alpha = (config.get("expert_alpha") if stacked else None) or config["lora_alpha"]
            update = (alpha / r) * (b[expert] @ a[expert] if stacked else b @ a)
            layer = int(name.split("layers.")[1].split(".")[0])
            projection = next(p for p in ("q", "k", "v", "o", "gate", "up", "down") if f"{p}_proj" in name)
            block = model.model.layers[layer]
            block = block.mlp if projection in ("gate", "up", "down") else block.self_attn
            getattr(block, f"{projection}_proj").weight += update
            added += 1
    assert added == 14  # two layers of seven projections
    return model


@pytest.mark.parametrize("expert", [0, 2, 3])
def test_a_solo_row_is_the_base_with_that_expert_merged(folders, expert):
    bank = AdapterBank(tiny_llama())
    bank.load("mix", folders["mix"])
    ids = torch.tensor([[5, 80, 33, 7, 120]])
    with bank.use(["mix"]), bank.rows([None, "mix", "mix", "mix"], [None, None, expert, 1]) as rows:
        logits = bank.model(input_ids=ids.expand(4, -1)).logits
        routes = {group.solo: routing for group, routing in rows.routing.items()}
    expected = merged(folders["mix"], expert)(input_ids=ids).logits
    torch.testing.assert_close(logits[2:3], expected, atol=2e-4, rtol=1e-4)
    assert (logits[1] - logits[2]).abs().max() > 0.1  # which is not what the router decides
    assert {int(index) for layer in routes[expert].values() for one in layer for index in one.selected.flatten()} == {
        expert
    }
    with bank.use(["mix"]), bank.rows(["mix"]):
        alone = bank.model(input_ids=ids).logits
    torch.testing.assert_close(logits[1:2], alone, atol=2e-4, rtol=1e-4)  # the neighbour's router is left alone


def test_solo_rows_stream_with_their_expert(folders):
    engine = CompareEngine(tiny_llama(), [folders["mix"]], tokenizer=byte_tokenizer())
    rows = [Row("Hello", "mix", Sampling(8), solo_expert=expert) for expert in (1, 0, None, 3)]
    tokens = {index: [] for index in range(4)}
    for update in engine.stream_rows(rows):
        assert update.error is None
        if update.token_id is not None:
            tokens[update.row].append(update.token_id)
            solo = rows[update.row].solo_expert
            if solo is not None:
                assert set(update.experts) == {(solo,)}
                assert set(update.expert_weights) == {(1.0,)}
    ids = engine.prompt_ids("Hello")
    for index, expert in ((0, 1), (1, 0), (3, 3)):
        model, sequence = merged(folders["mix"], expert), torch.tensor([ids])
        for token in tokens[index]:
            logits = model(input_ids=sequence).logits[0, -1]
            assert logits.max() - logits[token] < 1e-3  # greedy, up to a tie
            sequence = torch.cat([sequence, torch.tensor([[token]])], dim=1)


@pytest.mark.parametrize(
    ("adapter", "expert", "need"),
    [
        ("mix", 4, "from 0 to 3"),
        ("mix", -1, "from 0 to 3"),
        ("dora", 0, "it has no experts"),
        (None, 0, "for the base"),
    ],
)
def test_an_expert_that_is_not_there_is_refused(folders, adapter, expert, need):
    engine = CompareEngine(tiny_llama(), [folders["mix"], folders["dora"]], tokenizer=byte_tokenizer())
    with pytest.raises(ValueError, match=rf"solo_expert={expert}: .*{need}"):
        engine.stream_rows([Row("Hello", adapter, Sampling(8), solo_expert=expert)])


def test_forwards_alone_is_what_each_row_alone_takes(folders, monkeypatch):
    monkeypatch.setattr("minilora_hub.compare.batch.PREFILL_TOKENS", 20)
    engine = CompareEngine(tiny_llama(), list(folders.values()), tokenizer=byte_tokenizer())
    prompt, told = "a prompt of several pieces", {}
    for update in engine.stream(prompt, Sampling(9)):
        told[update.row] = update.forwards_alone or told.get(update.row)
    for index, column in enumerate(engine.columns):
        before = engine.forwards
        for _ in engine.stream_rows([Row(prompt, column.adapter, Sampling(9))]):
            pass
        assert told[index] == engine.forwards - before
