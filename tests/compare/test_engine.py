"""The engine's streams: tokens, texts, ends of rows, against generate()."""

import pytest
import tiny_stand_ins as tiny
import torch
from compare.engine_answers import PROMPT, alone, answers, generated, same_up_to_a_tie, tokens

from minilora_hub.compare.engine import CompareEngine, Row, Sampling, Update


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


def test_an_update_is_small_and_plain():
    """Defaults for everything but the row."""
    assert Update(2) == Update(row=2, text="", tokens=0, finished=False)
