"""Rows that join a running batch, and leave it, get the tokens that they get alone: caches of every kind."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from tiny import VOCABULARY, fill_adapter, tiny_config
from tiny_architectures import tiny_architecture
from tiny_stand_ins import byte_tokenizer
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from minilora_hub import DoraForCausalLM
from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.compare.answer import Answer, Row
from minilora_hub.compare.batch import Batch
from minilora_hub.compare.cache_rows import can_join
from minilora_hub.compare.sampling import Sampling

JOINABLE = ("llama", "mistral", "qwen3", "gemma2", "gemma3_text", "gemma3n_text", "gpt_oss", "bloom", "gpt2", "opt")
TOKENIZER = byte_tokenizer()
LENGTHS, LIMITS = (11, 27, 4, 40), (30, 12, 25, 8)
"""Rows whose prompts and answers have different lengths: some leave while others are in the middle."""


def small_window(name):
    """A base whose sliding window is shorter than the prompts."""
    base = tiny_architecture(name)
    if getattr(base.config, "sliding_window", None) or name == "mistral":
        base.config.sliding_window = 8
    return base


def answers(score_prompt=False):
    """The rows, each with a prompt of its own; every second one has the adapter."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]
    return [
        Answer(
            index, Row("", "dora" if index % 2 else None, Sampling(limit)), ids, limit, TOKENIZER, (), 2, score_prompt
        )
        for index, (ids, limit) in enumerate(zip(prompts, LIMITS, strict=True))
    ]


def run(batch, updates, steps=None):
    """Run some steps, or all."""
    for _ in itertools.islice(itertools.count(), steps):
        if batch.finished:
            return
        for update in batch.step():
            assert update.error is None
            updates.setdefault(update.row, []).append(update)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    def save(name, base):
        # GPT-OSS has experts that are no linears.
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if name == "gpt_oss" else "all-linear"
        model = DoraForCausalLM.from_base(base, tiny_config("dora", target_modules=targets))
        fill_adapter(model)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        return folder

    return save


def bank_of(name, folder_of):
    folder = folder_of(name, small_window(name))
    bank = AdapterBank(small_window(name))
    bank.load("dora", folder)
    return bank


@pytest.mark.filterwarnings("ignore::minilora_hub.remote_code.probe.TargetsWarning")
@pytest.mark.parametrize("name", JOINABLE)
def test_rows_join_and_leave(name, folder_of):
    bank = bank_of(name, folder_of)
    alone, together = {}, {}
    with bank.use(["dora"]):
        for answer in answers():
            run(Batch(bank, [answer]), alone)
        rows = answers()
        main = Batch(bank, rows[:1])
        run(main, together, 3)
        for row in rows[1:]:
            joining = Batch(bank, [row])
            run(joining, together, 1)
            run(main, together, 1)
            assert main.joinable
            assert joining.joinable
            main.join(joining)
            assert joining.finished
            run(main, together, 2)
        run(main, together)
    for index, mine in alone.items():
        assert [u.logprob for u in together[index]] == pytest.approx([u.logprob for u in mine], abs=2e-4)
        assert [u.token_id for u in together[index]] == [u.token_id for u in mine]


def test_the_cache_shrinks_with_the_longest_row(folder_of):
    """Padding that only a row that left had needed is removed, and a cancelled row leaves at once."""
    bank = bank_of("mistral", folder_of)
    rows = answers()
    with bank.use(["dora"]):
        batch = Batch(bank, rows[2:])
        run(batch, {}, 5)
        before = batch.cache_bytes
        batch.drop({rows[3]})
        assert batch.answers == [rows[2]]
        assert batch._decoding.mask.shape == (1, 4 + 5)
        assert batch.cache_bytes <= before / 2
        run(batch, {})
    assert batch.cache_bytes == 0


def test_only_keys_and_values_can_be_joined():
    """Not the states of a convolution or a recurrence, and nothing before the first forward."""
    assert can_join(SimpleNamespace(layers=[DynamicLayer(), DynamicSlidingWindowLayer(8)]))
    assert not can_join(SimpleNamespace(layers=[DynamicLayer(), LinearAttentionLayer()]))
    assert not can_join(SimpleNamespace(layers=[]))
    assert not can_join(None)


@pytest.mark.parametrize("pieces", [False, True])
def test_scores_of_a_prompt(folder_of, pieces, monkeypatch):
    """Read at once or in pieces, beside rows of other lengths."""
    if pieces:
        monkeypatch.setattr("minilora_hub.compare.batch.PREFILL_TOKENS", 16)
        monkeypatch.setattr("minilora_hub.compare.batch.PREFILL_LEAST", 5)
    bank = bank_of("llama", folder_of)
    rows = answers(score_prompt=True)
    with bank.use(["dora"]):
        run(Batch(bank, rows), {})
        for row in rows:
            prompt = row.ids[:, : row.prompt_tokens]
            with torch.no_grad(), bank.rows([row.row.adapter]):
                expected = torch.log_softmax(bank.model(prompt).logits[0], dim=-1)
            assert [score.token_id for score in row.prompt_scores] == prompt[0].tolist()
            assert row.prompt_scores[0].logprob is None
            theirs = expected[:-1].gather(1, prompt[0, 1:, None])[:, 0].tolist()
            assert [score.logprob for score in row.prompt_scores[1:]] == pytest.approx(theirs, abs=1e-4)
            best = expected[:-1].max(dim=-1).values.tolist()
            assert [score.alternatives[0][1] for score in row.prompt_scores[1:]] == pytest.approx(best, abs=1e-4)
