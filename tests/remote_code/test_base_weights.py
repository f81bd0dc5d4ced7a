"""Whoever loads a base refuses one whose checkpoint lacks tensors, or a token that it does not know."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import tiny_stand_ins
import torch
from evaluation.small_tasks import TASKS
from safetensors.torch import load_file, save_file
from tiny_training import SHORT, write_base, write_rows

import minilora_hub
from minilora_hub.bases import resolve_base
from minilora_hub.bases.loading import load_base
from minilora_hub.bases.skeleton import find_base
from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.compare.engine import CompareEngine, Sampling
from minilora_hub.compare.prompting import Promptings
from minilora_hub.errors import BaseModelError
from minilora_hub.evaluation.lm_eval_tasks import _rows_of
from minilora_hub.evaluation.run import evaluate
from minilora_hub.formats import exporting
from minilora_hub.recording import logits
from minilora_hub.training.run import train

PACKAGE = Path(minilora_hub.__file__).parent
UP = "model.layers.1.mlp.up_proj.weight"
SPOILT = {
    "compiled": (lambda w: {f"_orig_mod.{n}": v for n, v in w.items()}, r"missing lm_head\.weight.*_orig_mod\.lm_head"),
    "lacking": (lambda w: {n: v for n, v in w.items() if n != UP}, re.escape(f"missing {UP}")),
}


@pytest.fixture
def adapters(saved):
    return {path.name: path for path in saved[1]}


def export(to, adapter):
    return lambda base, out, adapters: exporting.export_adapter(adapters[adapter], out, to, base=str(base))


def training(method):
    def run(base, out, adapters):
        data = write_rows(out.parent / "rows.jsonl")
        train(out, base=str(base), data=str(data), record=False, **SHORT | {"method": method, "max_steps": 1})

    return run


WAYS = {
    "compare": lambda base, out, adapters: CompareEngine(base, [adapters["lora"]], device="cpu"),
    "eval": lambda base, out, adapters: evaluate(tasks=["echo"], base=base, cache=False),
    "record": lambda base, out, adapters: load_base(resolve_base(base), dtype="float32"),
    "convert": lambda base, out, adapters: find_base(str(base)).load(),
    "export dora --to dense": export("dense", "dora"),
    "export lora --to dense": export("dense", "lora"),
    "export mixlora --to mixtral": export("mixtral", "mix"),
    "train lora": training("lora"),
    "train mixlora": training("mixlora"),
    "train rslora": training("rslora"),
}


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("way", WAYS)
def test_a_base_that_lacks_tensors_is_refused(way, how, adapters, tmp_path, monkeypatch):
    monkeypatch.setattr("minilora_hub.evaluation.tasks.registry.TASKS", TASKS)
    base = write_base(tmp_path / "base", hidden_size=32, intermediate_size=64)
    change, message = SPOILT[how]
    save_file(change(load_file(base / "model.safetensors")), base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((BaseModelError, ValueError), match=message):
        WAYS[way](base, tmp_path / "out", adapters)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_nobody_else_loads_a_base():
    """`load_checked` is the one place, except where minilora_hub cannot be imported.

    Verifying compares logits; the handler of an endpoint checks the base of a LoRA, and has the repo's code for others.
    """
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == "from_pretrained":
                owner = ast.unparse(node.value)
                if owner.startswith("AutoModel") or owner in ("loader", "cls.auto_class", "type(base)"):
                    found.add(f"{path.relative_to(PACKAGE).as_posix()}: {owner}")
    assert found == {
        "adapter_folder/endpoint/handler.py: AutoModelForCausalLM",
        "publish/verify/isolated_worker.py: AutoModelForCausalLM",
        "remote_code/base_loading.py: loader",
        "remote_code/base_loading.py: type(base)",
    }


def test_load_base_names_the_base_and_passes_arguments_on(tmp_path):
    base = write_base(tmp_path / "base")
    assert load_base(resolve_base(base), dtype=torch.bfloat16).dtype == torch.bfloat16
    (base / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(BaseModelError, match=rf"base '{base}' cannot be loaded"):
        load_base(resolve_base(base))


# ---- tokens that the base does not know ----


@pytest.fixture
def short_base(tmp_path):
    """A base whose tokenizer has one token more than its embedding has rows."""
    base = write_base(tmp_path / "base", vocab_size=258, eos_token_id=0)
    return base


def test_a_prompt_with_an_unknown_token_is_refused(short_base):
    engine = CompareEngine(short_base, device="cpu")
    message = r"token '<\|assistant\|>' has the id 258, but the base's embedding has 258 rows"
    with pytest.raises(ValueError, match=message):
        list(engine.stream("Hello", Sampling(2)))
    engine.tokenizer.chat_template = None  # no token beyond the base's
    assert list(engine.stream("Hello", Sampling(2)))
    with pytest.raises(ValueError, match=message):
        list(engine.stream("Hello <|assistant|>", Sampling(2)))


def test_an_evaluation_refuses_an_unknown_token_before_it_measures(short_base, monkeypatch):
    monkeypatch.setattr("minilora_hub.evaluation.tasks.registry.TASKS", TASKS)
    with pytest.raises(ValueError, match=r"'<\|assistant\|>' has the id 258, but the base's embedding has 258 rows"):
        evaluate(tasks=["echo"], base=short_base, cache=False)
    text = short_base / "text.txt"
    text.write_text("a text with <|assistant|> in it")
    (short_base / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"'<\|assistant\|>' has the id 258"):
        evaluate(tasks=["echo"], base=short_base, cache=False, perplexity=True, text=text)


def test_lm_eval_refuses_an_unknown_token():
    bank = AdapterBank(tiny_stand_ins.tiny_llama(vocab_size=258))
    prompting = Promptings(bank.model, tiny_stand_ins.byte_tokenizer()).base
    with _rows_of(bank, None, prompting):
        bank.model(torch.tensor([[257, 1]]))
        with pytest.raises(
            ValueError, match=r"'<\|assistant\|>' has the id 258, but the base's embedding has 258 rows"
        ):
            bank.model(torch.tensor([[258, 1]]))


def test_a_recording_refuses_an_unknown_token():
    tokenizer = tiny_stand_ins.byte_tokenizer()
    assert logits.prompt_ids(tokenizer, 259)
    with pytest.raises(ValueError, match="but the base's embedding has 80 rows"):
        logits.prompt_ids(tokenizer, 80)
