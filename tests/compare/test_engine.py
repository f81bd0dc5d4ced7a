"""The comparison engine against `generate`, on models small enough to run in milliseconds."""

import re
import shutil
import threading
import weakref

import pytest
import tiny_stand_ins as tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import MptConfig, MptForCausalLM

from minilora_hub import DoraForCausalLM, MixLoraForCausalLM
from minilora_hub.compare import columns
from minilora_hub.compare.columns import shared_copy
from minilora_hub.compare.engine import CompareEngine, Row, Sampling, Update
from minilora_hub.compare.text_stream import TextStream
from minilora_hub.errors import AdapterError

PROMPT = "Why is the sky blue?"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny base and an adapter of each kind, as folders."""
    return tiny.save_base_and_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def engine(saved):
    """The base, a MixLoRA, a DoRA and a LoRA."""
    base, adapters = saved
    return CompareEngine(base, adapters, device="cpu")


@pytest.fixture
def parrots(tmp_path):
    """A base that babbles, and two adapters that repeat the prompt."""
    folders = tiny.save_parrots(tmp_path, {"dora": "dora", "mix": "mixlora"})
    return CompareEngine(tiny.ScriptedBase(), folders, tokenizer=tiny.byte_tokenizer())


def alone(folder):
    """An adapter folder as its own model, by transformers and PEFT."""
    if (folder / "adapter_config.json").is_file():
        return PeftModel.from_pretrained(tiny.tiny_llama(), folder).eval()
    if "auto_map" not in (folder / "config.json").read_text():
        return tiny.tiny_llama()
    kinds = {"mix": MixLoraForCausalLM, "dora": DoraForCausalLM}
    return kinds[folder.name].from_pretrained(folder, base_model=tiny.tiny_llama()).eval()


def answers(engine, sampling, prompt=PROMPT):
    """Run to the end: the updates of each row."""
    updates = list(engine.stream(prompt, sampling))
    return [[u for u in updates if u.row == index] for index in range(len(engine.columns))]


def tokens(updates):
    """The token ids in a column's updates."""
    return [u.token_id for u in updates if u.token_id is not None]


def generated(engine, model, **settings):
    """The same answer by `generate`, and its scores."""
    ids = torch.tensor([engine.prompt_ids(PROMPT)])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, output_logits=True, **settings
    )
    return out.sequences[0, ids.shape[1] :].tolist(), out.logits


def same_up_to_a_tie(ours, theirs, logits, margin=1e-4):
    """Whether the tokens agree up to the first step whose two best logits are closer than `margin`."""
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if mine != other:
            best = logits[step][0].topk(2).values
            return (best[0] - best[1]).item() < margin
    return True


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_equals_generate(engine, saved, penalty):
    """Token for token, in every row, and the log-probabilities are those of its logits."""
    ours = answers(engine, Sampling(max_new_tokens=40, repetition_penalty=penalty))
    assert len({tuple(tokens(updates)) for updates in ours}) == 4
    base, adapters = saved
    for folder, updates in zip([base, *adapters], ours, strict=True):
        model = alone(folder)
        theirs, logits = generated(engine, model, max_new_tokens=40, do_sample=False, repetition_penalty=penalty)
        assert len(theirs) == 40
        assert same_up_to_a_tie(tokens(updates), theirs, logits)
        first = torch.log_softmax(logits[0][0], dim=-1)
        best = first.topk(5)
        assert updates[0].logprob == pytest.approx(first[theirs[0]].item(), abs=1e-4)
        assert [token for token, _ in updates[0].alternatives] == best.indices.tolist()
        assert [share for _, share in updates[0].alternatives] == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.3, "top_k": 7, "top_p": 0.8}],
)
def test_sampling_equals_generate_with_the_same_seed(engine, saved, settings):
    """The processors and their order are those of `generate`, so the same random numbers give the same text."""
    ours = answers(engine, Sampling(max_new_tokens=30, seed=5, **settings))
    base, adapters = saved
    for folder, updates in zip([base, *adapters], ours, strict=True):
        model = alone(folder)
        torch.manual_seed(5)
        theirs, _ = generated(engine, model, max_new_tokens=30, do_sample=True, **{"top_k": 0, **settings})
        assert tokens(updates) == theirs


def test_seeds(engine):
    """The same seed gives the same text, another seed another."""
    first, again, other = (answers(engine, Sampling(20, temperature=1.0, seed=seed)) for seed in (1, 1, 2))
    assert list(map(tokens, first)) == list(map(tokens, again))
    assert list(map(tokens, first)) != list(map(tokens, other))


def test_a_long_prompt_is_read_in_pieces(monkeypatch):
    """Reading in pieces changes the work, not the answer."""
    engine = CompareEngine(tiny.tiny_llama(), tokenizer=tiny.byte_tokenizer())
    whole = answers(engine, Sampling(20))
    assert engine.forwards == 20
    monkeypatch.setattr("minilora_hub.compare.batch.PREFILL_TOKENS", 5)
    monkeypatch.setattr("minilora_hub.compare.batch.PREFILL_LEAST", 1)
    pieces = answers(engine, Sampling(20))
    assert tokens(whole[0]) == tokens(pieces[0])
    assert engine.forwards == 20 + 19 + -(-len(engine.prompt_ids(PROMPT)) // 5)


def test_updates_tell_text_counts_and_times(engine):
    """The pieces add up to the whole text, and every number is there at the end."""
    for updates in answers(engine, Sampling(25)):
        text = engine.tokenizer.decode(tokens(updates), skip_special_tokens=True)
        assert text.startswith("".join(u.text for u in updates))
        assert [u.tokens for u in updates] == list(range(1, 26))
        assert [u.finished for u in updates] == [False] * 24 + [True]
        last = updates[-1]
        assert last.reason == "length"
        assert last.seconds_to_first_token > 0
        assert last.tokens_per_second > 0
        assert 0 < last.milliseconds_per_step <= 1000 / last.tokens_per_second
        with pytest.raises(AttributeError):
            last.tokens = 3


def test_every_step_is_one_forward_for_all_rows(engine):
    """Rows come one token a step, in order, and the base runs once a step."""
    order = [u.row for u in engine.stream(PROMPT, Sampling(3))]
    assert order == [0, 1, 2, 3] * 3
    assert engine.forwards == 3


def test_a_row_ends_at_the_end_of_text_token_and_the_others_go_on(parrots):
    """The row leaves the batch; what the others write does not change."""
    base, dora, mix = answers(parrots, Sampling(60), "hi 👋🏽 🇩🇪!")
    for parrot in (dora, mix):
        assert parrot[-1].reason == "eos"
        assert parrot[-1].token_id == parrots.tokenizer.eos_token_id
        assert "".join(u.text for u in parrot) == "hi 👋🏽 🇩🇪!"
        assert not any("\ufffd" in u.text for u in parrot)
    assert base[-1].reason == "length"
    assert len(base) == 60


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (("blue",), "Why is the sky "),
        (("y?", "s the"), "Why i"),
        (("nothing",), PROMPT),
        (("blue?",), "Why is the sky "),
    ],
)
def test_stop_texts_end_a_row_and_are_never_shown(parrots, stop, text):
    """Not even their first half, which is held back until it is certain."""
    _, dora, _ = answers(parrots, Sampling(60, stop=stop))
    shown = ""
    for update in dora:
        shown += update.text
        assert text.startswith(shown)
    assert shown == text
    assert dora[-1].reason == ("eos" if text == PROMPT else "stop")


def test_rows_of_their_own(engine, saved):
    """Other prompts, adapters and settings per row, twice the same adapter: each as it would be alone."""
    rows = [
        Row("Short.", "mix", Sampling(12)),
        Row("A much longer prompt than the others have, with many more words.", None, Sampling(9, temperature=0.8)),
        Row(PROMPT, "lora", Sampling(15, temperature=1.0, top_p=0.9, seed=3)),
        Row("Hello there, my friend.", "mix", Sampling(4)),
        Row(PROMPT, "dora", Sampling(6, repetition_penalty=1.3)),
    ]
    together = list(engine.stream_rows(rows))
    for index, row in enumerate(rows):
        mine = [u for u in together if u.row == index]
        single = list(engine.stream_rows([row]))
        assert tokens(mine) == tokens(single)
        assert len(mine) == row.sampling.max_new_tokens
        assert [u.logprob for u in mine] == pytest.approx([u.logprob for u in single], abs=1e-4)


def test_bad_rows_are_named(engine):
    """Which one, before anything runs."""
    with pytest.raises(ValueError, match="rows=\\[\\]"):
        engine.stream_rows([])
    with pytest.raises(ValueError, match=r"must hold some text \(row 1\)"):
        engine.stream_rows([Row("a"), Row(" ")])
    assert engine.forwards == 0


def test_an_adapter_that_is_gone_ends_its_own_rows(engine):
    """Unknown, or its file damaged since it was registered."""
    updates = list(engine.stream_rows([Row(PROMPT, "nobody"), Row(PROMPT, "mix", Sampling(3))]))
    assert (updates[0].reason, updates[0].row) == ("error", 0)
    assert "'nobody': not registered" in updates[0].error
    assert len([u for u in updates if u.row == 1]) == 3


def test_stop_takes_effect_within_one_step(engine):
    """After `stop.set()` no forward runs any more, and every row says so."""
    stop = threading.Event()
    stream = engine.stream(PROMPT, Sampling(200), stop)
    for _ in range(10):
        next(stream)
    before = engine.forwards
    stop.set()
    rest = list(stream)
    assert engine.forwards == before == 3
    assert [u.row for u in rest if u.finished] == [0, 1, 2, 3]
    assert all(u.reason == "stopped" and u.token_id is None and u.tokens == 3 for u in rest if u.finished)


def test_stop_before_the_start_computes_nothing(engine):
    """A visitor who gives up in the queue costs nothing."""
    stop = threading.Event()
    stop.set()
    assert [u.reason for u in engine.stream(PROMPT, Sampling(9), stop)] == ["stopped"] * 4
    assert engine.forwards == 0


def test_closing_the_stream_ends_the_work_and_frees_the_engine(engine):
    """A closed tab leaves nothing running, nothing locked and no adapter held."""
    stream = engine.stream(PROMPT, Sampling(200))
    next(stream)
    stream.close()
    assert engine.forwards == 1
    assert len(list(engine.stream(PROMPT, Sampling(2)))) == 8
    engine.unload("mix")
    assert [column.name for column in engine.columns] == ["base", "dora", "lora"]


def test_two_visitors_never_compute_at_once():
    """Two threads stream from one engine: forwards do not overlap, and both answers are right."""
    engine = CompareEngine(tiny.tiny_llama(), tokenizer=tiny.byte_tokenizer())
    alone = tokens(answers(engine, Sampling(30))[0])
    inside, overlaps, results = [], [], []
    model = engine.bank.model
    model.register_forward_pre_hook(lambda module, args: (overlaps.extend(inside), inside.append(1))[0])
    model.register_forward_hook(lambda module, args, output: inside.clear())

    def visit():
        results.append(tokens(list(engine.stream(PROMPT, Sampling(30)))))

    threads = [threading.Thread(target=visit) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert overlaps == []
    assert results == [alone, alone]


def test_a_row_with_nan_leaves_the_others_running(parrots):
    """The failed rows say what happened; the rest finishes."""
    base, dora, mix = answers(parrots, Sampling(12), "explode now")
    for parrot in (dora, mix):
        assert parrot[-1].reason == "error"
        assert "NaN" in parrot[-1].error
        assert parrot[-1].tokens == 5
        assert "".join(u.text for u in parrot) == "explo"
    assert len(tokens(base)) == 12


def test_an_adapter_that_computes_nan_touches_no_other_row(saved, tmp_path):
    """Finite weights, but their products overflow: next to it the same tokens as without it."""
    base, (_, dora, _) = saved
    shutil.copytree(dora, tmp_path / "huge")
    file = tmp_path / "huge" / "adapter_model.safetensors"
    save_file({name: tensor * 1e30 for name, tensor in load_file(file).items()}, file)
    engine = CompareEngine(base, [tmp_path / "huge", dora], device="cpu")
    without = answers(CompareEngine(base, [dora], device="cpu"), Sampling(10))
    plain, huge, same = answers(engine, Sampling(10))
    assert huge[-1].reason == "error"
    assert "NaN" in huge[-1].error
    assert tokens(plain) == tokens(without[0])
    assert tokens(same) == tokens(without[1])


def test_an_error_of_the_model_itself_ends_every_row(parrots):
    """Nothing tells whose fault it is; the engine stays usable."""

    def break_down(module, args, kwargs):
        raise RuntimeError("<b>boom</b>")

    hook = parrots.bank.model.register_forward_pre_hook(break_down, with_kwargs=True)
    updates = list(parrots.stream(PROMPT, Sampling(3)))
    assert [(u.reason, u.error) for u in updates] == [("error", "RuntimeError: <b>boom</b>")] * 3
    hook.remove()
    assert len(list(parrots.stream(PROMPT, Sampling(3)))) == 9


def test_experts_come_with_the_updates_of_a_mixture(engine, saved):
    """Per layer, who served the last position and with which weight, as the model alone says."""
    _, (folder, *_) = saved
    base, mixture, *others = answers(engine, Sampling(3))
    model, ids = alone(folder), engine.prompt_ids(PROMPT)
    for step, update in enumerate(mixture):
        with torch.no_grad():
            out = model(torch.tensor([ids + tokens(mixture)[:step]]), output_routing=True)
        assert update.experts == tuple(tuple(layer[0, -1].tolist()) for layer in out.selected_experts)
        for ours, theirs in zip(update.expert_weights, out.routing_weights, strict=True):
            assert ours == pytest.approx(theirs[0, -1].tolist(), abs=1e-5)
    assert all(u.experts is None for row in (base, *others) for u in row)


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
    assert [c.detail for c in engine.columns[1:]] == ["r 4, 4 experts, 2 active", "r 4", "r 4"]
    assert [c.parameters_added for c in engine.columns[1:3]] == [
        alone(folder).num_adapter_parameters() for folder in adapters[:2]
    ]
    assert len(lines) == 5
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
    "text", ["naïve café", "日本語のテキスト", "👩‍👩‍👧‍👦 and 🏳️‍🌈", "🇩🇪🇫🇷🇯🇵", "a\u0301e\u0301", "שלום عالم"]
)
def test_text_appears_in_whole_characters(text):
    """Byte by byte, and yet no torn character and no half flag is ever shown."""
    tokenizer = tiny.byte_tokenizer()
    stream, pieces = TextStream(tokenizer), []
    for token in tokenizer(text)["input_ids"]:
        pieces.append(stream.push(token))
        flags = sum(0x1F1E6 <= ord(c) < 0x1F200 for c in pieces[-1])
        assert "\ufffd" not in pieces[-1]
        assert flags % 2 == 0
    assert "".join(pieces) + stream.finish(complete=True) == text


def test_a_cut_character_is_dropped_and_a_written_one_kept():
    """Three bytes of an emoji: dropped if the answer was cut there, shown if the model ended it there."""
    tokenizer = tiny.byte_tokenizer()
    ids = tokenizer("a😀")["input_ids"][:-1]
    for complete, rest in ((False, ""), (True, "\ufffd")):
        stream = TextStream(tokenizer)
        assert "".join(map(stream.push, ids)) == "a"
        assert stream.finish(complete) == rest


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
        ("stop", ("",)),
        ("stop", "text"),
    ],
)
def test_bad_settings_are_named(argument, value):
    """The message holds the argument and the value."""
    with pytest.raises(ValueError, match=re.escape(f"{argument}={value!r}: must be")):
        Sampling(**{argument: value})


@pytest.mark.parametrize(("prompt", "message"), [("  \n", "must hold some text"), ("x" * 600, "context of 512 tokens")])
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
        "empty": "no config.json",
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
    """Folders that hold an adapter of ours, and nothing else; none at all is an error."""
    monkeypatch.setattr(columns, "__file__", str(tmp_path / "minilora_hub" / "compare" / "columns.py"))
    (tmp_path / "model_cards" / "notes").mkdir(parents=True)
    (tmp_path / "model_cards" / "notes" / "config.json").write_text("{}")
    with pytest.raises(AdapterError, match="ships no adapters"):
        columns.shipped_adapters()
    for cards in (tmp_path / "model_cards", tmp_path / "minilora_hub" / "model_cards"):  # the wheel's own come first
        for name in ("b", "a"):
            (cards / name).mkdir(parents=True)
            (cards / name / "config.json").write_text('{"model_type": "dora", "auto_map": {}}')
        assert columns.shipped_adapters() == [cards / "a", cards / "b"]


def test_an_update_is_small_and_plain():
    """Defaults for everything but the row."""
    assert Update(2) == Update(row=2, text="", tokens=0, finished=False)


@pytest.mark.parametrize(
    ("text", "stop", "shown"), [("foo😀bar", "foo😀", ""), ("x a🇩🇪b", "a🇩🇪", "x "), ("x😀😀y", "😀😀", "x")]
)
def test_a_stop_text_that_ends_in_a_torn_character(text, stop, shown):
    """Its beginning is held back also while its last character is only half there."""
    tokenizer = tiny.byte_tokenizer()
    stream, pieces = TextStream(tokenizer, (stop,)), ""
    for token in tokenizer(text)["input_ids"]:
        pieces += stream.push(token)
        if stream.stopped:
            break
    assert stream.stopped
    assert pieces + stream.finish(complete=False) == shown


def test_stop_before_the_start_of_an_adapter_that_is_gone(engine):
    """Put away while its visitor waited and gave up: stopped, and no error."""
    stop = threading.Event()
    stop.set()
    assert [u.reason for u in engine.stream_rows([Row(PROMPT, "nobody"), Row(PROMPT, "mix")], stop)] == ["stopped"] * 2


def test_the_context_of_a_family_with_a_name_of_its_own_for_it():
    """MPT says max_seq_len, and fails beyond it."""
    torch.manual_seed(0)
    config = MptConfig(d_model=32, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=40, vocab_size=259)
    engine = CompareEngine(MptForCausalLM(config).eval(), tokenizer=tiny.byte_tokenizer(chat=False))
    last = list(engine.stream_rows([Row("x" * 30, None, Sampling(50))]))[-1]
    assert (last.reason, last.tokens) == ("length", 10)
