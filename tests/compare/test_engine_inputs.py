"""What an engine is given: models, adapters, settings, prompts; and what it refuses."""

import json
import re
import weakref

import pytest
import tiny_stand_ins as tiny
import torch
from compare.engine_answers import PROMPT, alone, answers
from safetensors.torch import save_file
from transformers import MptConfig, MptForCausalLM

from minilora_hub.compare import found_adapters as columns
from minilora_hub.compare.engine import CompareEngine, Row, Sampling
from minilora_hub.compare.found_adapters import shared_copy
from minilora_hub.errors import AdapterError


def test_bad_rows_are_named(engine):
    """Which one, before anything runs."""
    with pytest.raises(ValueError, match="rows=\\[\\]"):
        engine.stream_rows([])
    with pytest.raises(ValueError, match=r"must not be empty \(row 1\)"):
        engine.stream_rows([Row("a"), Row(" ")])
    assert engine.forwards == 0


def test_shared_copy_shares_every_tensor_and_nothing_else():
    """Same memory, own modules and configs; tied weights stay tied."""
    model = tiny.tiny_llama(tie_word_embeddings=True)
    copied = shared_copy(model)
    ours, theirs = (
        dict(model.named_parameters(remove_duplicate=False)),
        dict(copied.named_parameters(remove_duplicate=False)),
    )
    ours |= dict(model.named_buffers())
    theirs |= dict(copied.named_buffers())
    assert ours.keys() == theirs.keys()
    assert all(theirs[name].data_ptr() == tensor.data_ptr() for name, tensor in ours.items())
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert not {id(m) for m in model.modules()} & {id(m) for m in copied.modules()}
    assert copied.config is not model.config
    assert copied.generation_config is not model.generation_config
    copied.model.layers[0].mlp = torch.nn.Identity()
    copied.config.use_cache = False
    assert not isinstance(model.model.layers[0].mlp, torch.nn.Identity)
    assert model.config.use_cache
    reference = weakref.ref(model)
    del model, ours
    assert reference() is None  # the copy does not keep the original's modules alive


def test_the_callers_model_is_left_as_it_is():
    """No hook, no mode, no replaced module."""
    model = tiny.tiny_llama().train()
    engine = CompareEngine(model, tokenizer=tiny.byte_tokenizer())
    list(engine.stream(PROMPT, Sampling(2)))
    assert model.training
    assert not model.model._forward_pre_hooks
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_adapters_from_folders(saved):
    """Every kind, on one base in memory."""
    base, adapters = saved
    lines = []
    engine = CompareEngine(base, adapters, device="cpu", progress=lines.append)
    assert [(c.name, c.kind) for c in engine.columns] == [
        ("base", "base"),
        ("mix", "MixLoRA"),
        ("dora", "DoRA"),
        ("lora", "LoRA"),
    ]
    assert [c.adapter for c in engine.columns] == [None, "mix", "dora", "lora"]
    assert [c.detail for c in engine.columns[1:]] == ["rank 4, 4 experts, 2 active", "rank 4", "rank 4"]
    assert [c.parameters_added for c in engine.columns[1:3]] == [
        alone(folder).num_adapter_parameters() for folder in adapters[:2]
    ]
    assert lines[2:] == [
        "  answers end at <|end|> <|user|>",
        "  + mix: MixLoRA, rank 4, 4 experts, 2 active",
        "  + dora: DoRA, rank 4",
        "  + lora: LoRA, rank 4",
    ]
    memory = engine.memory()
    assert memory.base == sum(p.numel() * p.element_size() for p in tiny.tiny_llama().parameters()) + 2 * 4 * 4
    assert 0 < memory.adapters < memory.base
    with pytest.raises(ValueError, match="name='mix'"):
        engine.load("mix", adapters[0])


def test_without_a_chat_template_the_prompt_is_continued():
    """A base that is no chat model gets the prompt as it is."""
    engine = CompareEngine(tiny.tiny_llama(), tokenizer=tiny.byte_tokenizer(chat=False))
    assert engine.tokenizer.decode(engine.prompt_ids(PROMPT)) == PROMPT


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("repetition_penalty", 0),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", None),
        ("stop", ["text"]),
        ("stop", "text"),
    ],
)
def test_bad_settings_are_named(argument, value):
    """The message holds the argument and the value."""
    with pytest.raises(ValueError, match=re.escape(f"{argument}={value!r}: must be")):
        Sampling(**{argument: value})


@pytest.mark.parametrize(("prompt", "message"), [("  \n", "must not be empty"), ("x" * 600, "context of 512 tokens")])
def test_bad_prompts_are_refused_before_anything_runs(engine, prompt, message):
    """At the call, not at the first token."""
    with pytest.raises(ValueError, match=message):
        engine.stream(prompt, Sampling())
    assert engine.forwards == 0


def test_the_context_ends_the_answer():
    """Never a position beyond the last."""
    model = tiny.tiny_llama(max_position_embeddings=40)
    engine = CompareEngine(model, tokenizer=tiny.byte_tokenizer())
    updates = answers(engine, Sampling(100))[0]
    assert len(updates) == 40 - len(engine.prompt_ids(PROMPT))
    assert updates[-1].reason == "length"


def test_what_cannot_be_loaded(tmp_path):
    """Each names the folder and what is wrong with it."""
    (tmp_path / "empty").mkdir()
    for name, content in {"list": "[]", "half": '{"model_type"', "bert": '{"model_type": "bert"}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    (tmp_path / "prefix").mkdir()
    (tmp_path / "prefix" / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING"}')
    cases = {
        "gone": "no such folder",
        "empty": "neither config.json nor adapter_config.json",
        "list": "must hold a JSON object",
        "half": "cannot be read",
        "bert": "model_type='bert'",
        "prefix": "peft_type='PREFIX_TUNING'",
    }
    for name, message in cases.items():
        with pytest.raises(AdapterError, match=message) as caught:
            CompareEngine(tiny.tiny_llama(), [tmp_path / name], tokenizer=tiny.byte_tokenizer())
        assert name in str(caught.value)
    with pytest.raises(ValueError, match="tokenizer=None"):
        CompareEngine(tiny.tiny_llama())


def test_shipped_adapters_are_found_in_a_wheel_and_in_a_checkout(tmp_path, monkeypatch):
    """Folders that hold an adapter, the simplest kind first; none at all is an error, and so is a damaged one."""
    monkeypatch.setattr(columns, "__file__", str(tmp_path / "minilora_hub" / "compare" / "columns.py"))
    (tmp_path / "model_cards" / "notes").mkdir(parents=True)
    (tmp_path / "model_cards" / "notes" / "config.json").write_text("{}")
    with pytest.raises(AdapterError, match="ships no adapters"):
        columns.shipped_adapters()
    for cards in (tmp_path / "model_cards", tmp_path / "minilora_hub" / "model_cards"):  # the wheel's own come first
        for name, file, config in (
            ("a", "config.json", {"model_type": "mixlora", "use_dora": True}),
            ("b", "config.json", {"model_type": "mixlora"}),
            ("c", "config.json", {"model_type": "dora"}),
            ("d", "adapter_config.json", {"peft_type": "LORA"}),
        ):
            (cards / name).mkdir(parents=True)
            (cards / name / file).write_text(json.dumps(config))
            save_file({"weight": torch.zeros(1)}, cards / name / "adapter_model.safetensors")
        assert columns.shipped_adapters() == [cards / name for name in "dcba"]
    (cards / "a" / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(AdapterError, match="not a readable safetensors file"):
        columns.shipped_adapters()


def test_the_context_of_a_family_with_a_name_of_its_own_for_it():
    """MPT says max_seq_len, and fails beyond it."""
    torch.manual_seed(0)
    config = MptConfig(d_model=32, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=40, vocab_size=259)
    engine = CompareEngine(MptForCausalLM(config).eval(), tokenizer=tiny.byte_tokenizer(chat=False))
    last = list(engine.stream_rows([Row("x" * 30, None, Sampling(50))]))[-1]
    assert (last.reason, last.tokens) == ("length", 10)
