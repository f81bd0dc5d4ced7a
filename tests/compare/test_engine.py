"""The comparison engine against `generate`, on models small enough to run in milliseconds."""

import threading
import weakref
from types import SimpleNamespace

import pytest
import tiny_stand_ins as tiny
import torch

from minilora_hub import MixLoraConfig, MixLoraForCausalLM
from minilora_hub.compare import columns
from minilora_hub.compare.engine import Column, CompareEngine, Sampling, Update, shared_copy
from minilora_hub.compare.text_stream import TextStream
from minilora_hub.errors import AdapterError

PROMPT = "Why is the sky blue?"


@pytest.fixture
def engine():
    """A base and two other random models beside it."""
    columns = [Column("two", "DoRA", tiny.tiny_llama(1)), Column("three", "MixLoRA", tiny.tiny_llama(2))]
    return CompareEngine(tiny.tiny_llama(0), columns, tokenizer=tiny.byte_tokenizer())


def answers(engine, sampling, prompt=PROMPT):
    """Run to the end: the updates of each column."""
    updates = list(engine.stream(prompt, sampling))
    return [[u for u in updates if u.column == index] for index in range(len(engine.columns))]


def tokens(updates):
    """The token ids in a column's updates."""
    return [u.token_id for u in updates if u.token_id is not None]


def generated(engine, column, **settings):
    """The same answer by `generate`, and its scores."""
    ids = torch.tensor([engine.prompt_ids(PROMPT)])
    out = column.model.generate(
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
def test_greedy_equals_generate(engine, penalty):
    """Token for token, in every column."""
    ours = answers(engine, Sampling(max_new_tokens=40, repetition_penalty=penalty))
    for column, updates in zip(engine.columns, ours, strict=True):
        theirs, logits = generated(engine, column, max_new_tokens=40, do_sample=False, repetition_penalty=penalty)
        assert len(theirs) == 40
        assert same_up_to_a_tie(tokens(updates), theirs, logits)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.3, "top_k": 7, "top_p": 0.8}],
)
def test_sampling_equals_generate_with_the_same_seed(engine, settings):
    """The processors and their order are those of `generate`, so the same random numbers give the same text."""
    ours = answers(engine, Sampling(max_new_tokens=30, seed=5, **settings))
    for column, updates in zip(engine.columns, ours, strict=True):
        torch.manual_seed(5)
        theirs, _ = generated(engine, column, max_new_tokens=30, do_sample=True, **{"top_k": 0, **settings})
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
    monkeypatch.setattr("minilora_hub.compare.engine.PREFILL_CHUNK", 5)
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
        assert 0 < last.milliseconds_per_token <= 1000 / last.tokens_per_second
        with pytest.raises(AttributeError):
            last.tokens = 3


def test_columns_take_turns(engine):
    """Prompts first, then one token a column and round."""
    order = [u.column for u in engine.stream(PROMPT, Sampling(3))]
    assert order == [0, 1, 2] * 3


def test_ends_at_the_end_of_text_token():
    """The end is the model's own `generation_config`, and the others go on."""
    tokenizer = tiny.byte_tokenizer()
    engine = CompareEngine(tiny.tiny_llama(), [Column("p", "DoRA", tiny.Parrot())], tokenizer=tokenizer)
    base, parrot = answers(engine, Sampling(60), "hi 👋🏽 🇩🇪!")
    assert parrot[-1].reason == "eos"
    assert parrot[-1].token_id == tokenizer.eos_token_id
    assert "".join(u.text for u in parrot) == "hi 👋🏽 🇩🇪!"
    assert not any("\ufffd" in u.text for u in parrot)
    assert base[-1].reason == "length"


def test_stop_takes_effect_within_one_step(engine):
    """After `stop.set()` no forward runs any more, and every column says so."""
    stop = threading.Event()
    stream = engine.stream(PROMPT, Sampling(200), stop)
    for _ in range(10):
        next(stream)
    before = engine.forwards
    stop.set()
    rest = list(stream)
    assert engine.forwards == before == 10
    assert sorted((u.column, u.reason) for u in rest) == [(0, "stopped"), (1, "stopped"), (2, "stopped")]
    assert all(u.token_id is None and u.finished and u.tokens in (3, 4) for u in rest)


def test_stop_before_the_start_computes_nothing(engine):
    """A visitor who gives up in the queue costs nothing."""
    stop = threading.Event()
    stop.set()
    assert [u.reason for u in engine.stream(PROMPT, Sampling(9), stop)] == ["stopped"] * 3
    assert engine.forwards == 0


def test_closing_the_stream_ends_the_work_and_frees_the_engine(engine):
    """A closed tab leaves nothing running and nothing locked."""
    stream = engine.stream(PROMPT, Sampling(200))
    next(stream)
    stream.close()
    assert engine.forwards == 1
    assert len(list(engine.stream(PROMPT, Sampling(2)))) == 6


def test_two_visitors_never_compute_at_once():
    """Two threads stream from one engine: forwards do not overlap, and both answers are right."""
    engine = CompareEngine(tiny.tiny_llama(), tokenizer=tiny.byte_tokenizer())
    alone = tokens(answers(engine, Sampling(30))[0])
    inside, overlaps, results = [], [], []
    model = engine.columns[0].model
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


def test_one_columns_error_leaves_the_others_running():
    """The failed column says what happened; the rest finishes."""
    columns = [Column("p", "DoRA", tiny.Parrot()), Column("q", "MixLoRA", tiny.tiny_llama(1))]
    engine = CompareEngine(tiny.tiny_llama(), columns, tokenizer=tiny.byte_tokenizer())
    base, parrot, other = answers(engine, Sampling(12), "explode now")
    assert (parrot[-1].reason, parrot[-1].error) == ("error", "RuntimeError: <b>boom</b>")
    assert parrot[-1].tokens == 5
    assert "".join(u.text for u in parrot) == "explo"
    assert len(tokens(base)) == len(tokens(other)) == 12


def test_nan_logits_are_an_error_and_not_a_text():
    """A damaged model is named as such."""
    broken = tiny.tiny_llama(1)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    engine = CompareEngine(tiny.tiny_llama(), [Column("b", "DoRA", broken)], tokenizer=tiny.byte_tokenizer())
    base, bad = answers(engine, Sampling(3))
    assert bad[0].reason == "error"
    assert "NaN" in bad[0].error
    assert base[-1].reason == "length"


def test_experts_come_with_the_update_when_asked_for():
    """Per layer, the experts of the last position."""

    class Routed(tiny.Parrot):
        def forward(self, input_ids, past_key_values=None, use_cache=None, return_dict=None, output_routing=False):
            out = super().forward(input_ids, past_key_values)
            chosen = torch.zeros(1, input_ids.shape[1], 2, dtype=torch.long)
            chosen[0, -1] = torch.tensor([3, 1])
            unused = torch.full_like(chosen[..., :1], -1)  # a slot that top-p did not need
            layers = (chosen, torch.cat((chosen + 1, unused), dim=-1))
            return SimpleNamespace(**vars(out), selected_experts=layers if output_routing else None)

    def first(routing):
        column = Column("r", "MixLoRA", Routed())
        engine = CompareEngine(tiny.tiny_llama(), [column], tokenizer=tiny.byte_tokenizer(), routing=routing)
        base, mixture = answers(engine, Sampling(1))
        assert base[0].experts is None
        return mixture[0].experts

    assert first(True) == ((3, 1), (4, 2))
    assert first(False) is None


@pytest.mark.parametrize(
    ("strategy", "detail"),
    [
        ({"num_experts_per_tok": 3}, "r 4, 4 experts, 3 active"),
        ({"routing_strategy": "top_p", "router_top_p": 0.7}, "r 4, 4 experts, top-p 0.7"),
        ({"routing_strategy": "switch"}, "r 4, 4 experts, 1 active"),
    ],
)
def test_a_column_says_how_many_experts_serve_a_token(strategy, detail, tmp_path):
    config = MixLoraConfig(r=4, num_experts=4, **strategy)
    MixLoraForCausalLM.from_base(tiny.tiny_llama(), config).save_pretrained(tmp_path / "mix")
    assert columns.load_adapter(columns.find_adapter(tmp_path / "mix"), tiny.tiny_llama()).detail == detail


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


def test_adapters_from_folders(tmp_path):
    """Every kind, on one base in memory; each answers as its own model does with `generate`."""
    base, adapters = tiny.save_base_and_adapters(tmp_path)
    lines = []
    engine = CompareEngine(base, adapters, device="cpu", routing=True, progress=lines.append)
    assert [(c.name, c.kind) for c in engine.columns] == [
        ("base", "base"),
        ("mix", "MixLoRA"),
        ("dora", "DoRA"),
        ("lora", "LoRA"),
    ]
    assert [c.parameters_added > 0 for c in engine.columns] == [False, True, True, True]
    assert len(lines) == 5
    ours = answers(engine, Sampling(20))
    assert len({tuple(tokens(updates)) for updates in ours}) == 4
    for column, updates in zip(engine.columns, ours, strict=True):
        theirs, logits = generated(engine, column, max_new_tokens=20, do_sample=False)
        assert same_up_to_a_tie(tokens(updates), theirs, logits)
    assert [len(layer) for layer in ours[1][0].experts] == [2, 2]
    assert ours[0][0].experts is ours[2][0].experts is None
    assert engine.forwards == 4 * (20 + 20)  # ours and generate's, all seen by the counter

    def embedding(column):
        return next(p for n, p in column.model.named_parameters() if n.endswith("embed_tokens.weight")).data_ptr()

    assert len(set(map(embedding, engine.columns))) == 1
    base_bytes, everything = engine.memory()
    assert base_bytes < everything < 2 * base_bytes


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
    ],
)
def test_bad_settings_are_named(argument, value):
    """The message holds the argument and the value."""
    with pytest.raises(ValueError, match=f"{argument}={value!r}: must be"):
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
    """Defaults for everything but the column."""
    assert Update(2) == Update(column=2, text="", tokens=0, finished=False)
