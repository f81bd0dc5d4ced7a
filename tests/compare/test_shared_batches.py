"""Streams that run at the same time share forwards, and each answers as if it were alone."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import tiny_stand_ins as tiny
import torch
from compare.engine_answers import alone, same_up_to_a_tie

from minilora_hub.compare.engine import CompareEngine, Row, Sampling

PROMPTS = ("Why is the sky blue?", "Hi", "Count to three, please.", "A longer question about nothing in particular?")


@pytest.fixture(scope="module")
def engine(saved):
    base, folders = saved
    return CompareEngine(base, folders, device="cpu")


def rows_of(engine, prompt, tokens=12, **settings):
    return [column.row(prompt, Sampling(tokens, **settings)) for column in engine.columns]


def tokens_of(updates, count=4):
    rows = [[] for _ in range(count)]
    for update in updates:
        if update.token_id is not None:
            rows[update.row].append(update.token_id)
    return rows


def advance_all(streams):
    """Advance streams in turns to their ends: the updates of each, and its forwards."""
    seen, forwards, left = [[] for _ in streams], [0] * len(streams), list(enumerate(streams))
    while left:
        for index, steps in [*left]:
            step = next(steps, None)
            if step is None:
                left.remove((index, steps))
            else:
                seen[index] += step.updates
                forwards[index] += step.forwards
    return seen, forwards


def test_streams_share_forwards_and_answer_as_alone(engine, saved):
    """Prompts of four lengths and four kinds of rows: the tokens of `generate`, in a quarter of the forwards."""
    before = engine.forwards
    seen, forwards = advance_all([engine.stream_steps(rows_of(engine, prompt)) for prompt in PROMPTS])
    assert engine.forwards - before == 4 + 11  # each prompt is read by itself; then one forward a step
    assert forwards == [12, 12, 12, 12]
    folders = [saved[0], *saved[1]]
    for prompt, updates in zip(PROMPTS, seen, strict=True):
        ids = torch.tensor([engine.prompt_ids(prompt)])
        for ours, folder in zip(tokens_of(updates), folders, strict=True):
            out = alone(folder).generate(
                input_ids=ids, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
            assert same_up_to_a_tie(ours, out.sequences[0, ids.shape[1] :].tolist(), out.logits)
        assert {update.row: update.reason for update in updates if update.finished} == dict.fromkeys(range(4), "length")


def test_who_comes_later_and_who_ends_earlier(engine):
    """Rows join at any step and leave at any step, with seeds and settings of their own."""
    settings = [{"temperature": 0.8, "seed": seed, "top_k": 20} for seed in range(3)]
    lengths = (20, 5, 9)
    wanted = [
        tokens_of(list(engine.stream_rows(rows_of(engine, prompt, length, **setting))))
        for prompt, length, setting in zip(PROMPTS, lengths, settings, strict=False)
    ]
    first, second, third = (
        engine.stream_steps(rows_of(engine, prompt, length, **setting))
        for prompt, length, setting in zip(PROMPTS, lengths, settings, strict=False)
    )
    seen = [[], [], []]
    for _ in range(4):
        seen[0] += next(first).updates
    seen[1] += next(second).updates
    for _ in range(3):
        seen[1] += next(second).updates
    seen[2] += next(third).updates
    for index, rest in enumerate(advance_all([first, second, third])[0]):
        seen[index] += rest
    assert [tokens_of(updates) for updates in seen] == wanted


@pytest.mark.parametrize("way", ["stop", "halt", "close", "collect"])
def test_leaving_ends_own_rows_only(engine, way):
    """Within one step, and what the others answer is the same."""
    wanted = tokens_of(list(engine.stream_rows(rows_of(engine, PROMPTS[0], 16))))
    stop, halted = threading.Event(), set()
    stays = engine.stream_steps(rows_of(engine, PROMPTS[0], 16))
    leaves = engine.stream_steps(rows_of(engine, PROMPTS[1], 40), stop, halted)
    seen, left = [], []
    for _ in range(3):
        seen += next(stays).updates
        left += next(leaves).updates
    if way == "stop":
        stop.set()
        seen += next(stays).updates  # another stream's step ends them
        left += next(leaves).updates
        assert next(leaves, None) is None
        assert [update.reason for update in left[-4:]] == ["stopped"] * 4
    elif way == "halt":
        halted.add(2)
        seen += next(stays).updates
        left += next(leaves).updates
        assert [update.row for update in left if update.reason == "stopped"] == [2]
        assert {update.row for update in next(leaves).updates} == {0, 1, 3}
        leaves.close()
    elif way == "close":
        leaves.close()
    else:
        del leaves
        gc.collect()
    before = engine.forwards
    assert tokens_of(seen + [update for step in stays for update in step.updates]) == wanted
    assert engine.forwards - before <= 13


def test_closing_the_last_stream_frees_its_cache(engine):
    """Nobody steps afterwards who could do it."""
    steps = engine.stream_steps(rows_of(engine, PROMPTS[0], 40))
    next(steps)
    batch = weakref.ref(engine._batches._shares[0].batch)
    steps.close()
    gc.collect()
    assert batch() is None


def test_short_rows_are_not_padded_to_a_long_one(engine):
    """A cache of one long row and many short ones would mostly be padding: they take turns."""
    long = engine.stream_steps([Row("words " * 60, None, Sampling(6))])
    short = [engine.stream_steps(rows_of(engine, "Hi", 6)) for _ in range(3)]
    before = engine.forwards
    _, forwards = advance_all([long, *short])
    assert forwards == [6, 6, 6, 6]
    assert engine.forwards - before == 4 + 5 + 5


def test_layers_with_a_window_take_turns(tmp_path):
    """Their caches have lost what padding would have to stand before."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    base = MistralForCausalLM(
        MistralConfig(
            vocab_size=259,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=8,
            eos_token_id=257,
            pad_token_id=0,
            initializer_range=0.3,
        )
    ).eval()
    engine = CompareEngine(base, tokenizer=tiny.byte_tokenizer())
    wanted = [[update.token_id for update in engine.stream(prompt, Sampling(6))] for prompt in PROMPTS[:2]]
    before = engine.forwards
    seen, _ = advance_all([engine.stream_steps(rows_of(engine, prompt, 6)) for prompt in PROMPTS[:2]])
    assert [[update.token_id for update in updates] for updates in seen] == wanted
    assert engine.forwards - before == sum(map(len, wanted))
