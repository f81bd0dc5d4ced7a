"""Rows of the server get the tokens that each gets alone, for bases of every kind, packed or row by row."""

from __future__ import annotations

import copy
import queue

import pytest
import torch
import transformers
from packaging.version import Version
from tiny import VOCABULARY, fill_adapter, tiny_config
from tiny_architectures import tiny_architecture
from tiny_stand_ins import byte_tokenizer
from transformers import AutoModelForCausalLM

from minilora_hub import DoraForCausalLM, MixLoraForCausalLM
from minilora_hub.compare.answer import Answer, Row
from minilora_hub.compare.decoding import DecodingBatch
from minilora_hub.compare.engine import CompareEngine
from minilora_hub.compare.sampling import Sampling
from minilora_hub.serving.rows import ServedRow
from minilora_hub.serving.scheduler import PACKS, Scheduler
from minilora_hub.serving.settings import ServerLimits

PACKED = ("llama", "mistral", "qwen3", "gemma2", "gemma3_text", "gpt_oss", "gpt2")
ROW_BY_ROW = ("bloom", "opt", "gemma3n_text", "falcon_mamba")
LIKE_OTHERS = ("mistral", "qwen3", "gemma2", "gpt2", "falcon_mamba")
TOKENIZER = byte_tokenizer()
LENGTHS, LIMITS = (11, 27, 4, 40, 19), (30, 12, 25, 8, 17)
"""Rows whose prompts and answers have different lengths: some leave while others are in the middle."""
SMALL = ServerLimits(rows=4, waiting=9, cache_tokens=160)
"""Less cache than the rows need together, so that some are put back and read again."""


def make_engine(name, tmp_path):
    """A tiny base whose sliding window, if it has one, is shorter than the prompts, and a DoRA on it."""
    config = tiny_architecture(name).config
    if getattr(config, "sliding_window", None) or name == "mistral":
        config.sliding_window = 8
    # GPT-OSS has experts that are no linears.
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if name == "gpt_oss" else "all-linear"
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).eval()
    model = DoraForCausalLM.from_base(copy.deepcopy(base), tiny_config("dora", target_modules=targets))
    fill_adapter(model)
    model.save_pretrained(tmp_path / "dora")
    return CompareEngine(base, [tmp_path / "dora"], tokenizer=TOKENIZER)


def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


def alone(engine, adapter, ids, limit):
    """The tokens of a greedy row alone, and the distance of each to the second best, by a plain batch of one row."""
    batch, tokens, margins = DecodingBatch(engine.bank, [adapter]), [], []
    with engine.bank.use([adapter]):
        batch.append([ids])
        for _ in range(limit):
            best = batch.read()[0].float().topk(2)
            tokens.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
            batch.append([tokens[-1:]])
    return tokens, margins


def serve(scheduler, adapters, scored=False):
    """Run the rows, and return the answers."""
    done = queue.Queue()
    answers = [
        Answer(index, Row("", adapter, Sampling(limit)), ids, limit, TOKENIZER, (), 2, scored)
        for index, (adapter, ids, limit) in enumerate(zip(adapters, prompts(), LIMITS, strict=True))
    ]
    scheduler.start()
    try:
        scheduler.submit([ServedRow(answer, limit, done.put) for answer, limit in zip(answers, LIMITS, strict=True)])
        left = len(answers)
        while left:
            update = done.get(timeout=120)
            assert update.error is None
            left -= update.finished
    finally:
        scheduler.stop()
    return answers


@pytest.mark.filterwarnings("ignore::minilora_hub.remote_code.probe.TargetsWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in LIKE_OTHERS else n for n in PACKED + ROW_BY_ROW]
)
def test_rows_get_their_own_tokens(name, tmp_path):
    engine = make_engine(name, tmp_path)
    adapters = [None, "dora", None, "dora", "dora"]
    expected = [alone(engine, *row) for row in zip(adapters, prompts(), LIMITS, strict=True)]
    scheduler = Scheduler(engine, SMALL)
    packs = name in PACKED and Version(transformers.__version__) >= PACKS
    assert (scheduler.row_by_row is None) == packs, scheduler.row_by_row
    require_same_tokens(serve(scheduler, adapters), expected)


def require_same_tokens(answers, expected):
    """Up to a tie, after which two answers may go apart."""
    for answer, (tokens, margins) in zip(answers, expected, strict=True):
        found = answer.ids[0, answer.prompt_tokens :].tolist()
        for place, (mine, theirs, margin) in enumerate(zip(found, tokens, margins, strict=True)):
            if mine != theirs:
                assert margin < 1e-3, (answer.index, place)
                break


def test_rows_with_routed_linears(tmp_path):
    """Packed beside others: each linear's router decides for its own tokens."""
    engine = make_engine("llama", tmp_path)
    config = tiny_config("mixlora", router_scope="linear", num_experts=[2, 3])
    model = MixLoraForCausalLM.from_base(AutoModelForCausalLM.from_config(tiny_architecture("llama").config), config)
    fill_adapter(model)
    model.save_pretrained(tmp_path / "mola")
    engine.load("mola", tmp_path / "mola")
    adapters = [None, "mola", "dora", "mola", "mola"]
    expected = [alone(engine, *row) for row in zip(adapters, prompts(), LIMITS, strict=True)]
    require_same_tokens(serve(Scheduler(engine, SMALL), adapters), expected)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_scores_of_prompts(name, tmp_path, monkeypatch):
    """Read in pieces, beside rows of other lengths, and some twice where the cache is full."""
    monkeypatch.setattr("minilora_hub.serving.batching_manager.STEP_TOKENS", 16)
    engine = make_engine(name, tmp_path)
    adapters = [None, "dora", None, "dora", "dora"]
    for row in serve(Scheduler(engine, SMALL), adapters, scored=True):
        prompt, adapter = row.ids[:, : row.prompt_tokens], row.row.adapter
        with torch.inference_mode(), engine.bank.use([adapter]), engine.bank.rows([adapter]):
            expected = torch.log_softmax(engine.bank.model(prompt).logits[0], dim=-1)
        assert [score.token_id for score in row.prompt_scores] == prompt[0].tolist()
        assert row.prompt_scores[0].logprob is None
        theirs = expected[:-1].gather(1, prompt[0, 1:, None])[:, 0].tolist()
        assert [score.logprob for score in row.prompt_scores[1:]] == pytest.approx(theirs, abs=1e-4)
        best = expected[:-1].max(dim=-1).values.tolist()
        assert [score.alternatives[0][1] for score in row.prompt_scores[1:]] == pytest.approx(best, abs=1e-4)
