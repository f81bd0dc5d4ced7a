"""Long runs: what a server does all day must not grow.

`pytest -m soak tests/compare/test_soak.py`; about a minute on one thread.
"""

import gc
import itertools
from pathlib import Path

import pytest
import tiny_stand_ins as tiny
import torch

from minilora_hub.compare.engine import CompareEngine, Row, Sampling

pytestmark = pytest.mark.soak

MOST_GROWTH = 8 * 2**20
"""Bytes of resident memory. The logits of a token, kept for 10,000 of them, are 10 MB already in the tiny base."""


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


@pytest.fixture
def engine(tmp_path):
    base, adapters = tiny.save_base_and_adapters(tmp_path)
    return CompareEngine(base, adapters, device="cpu")


@pytest.fixture
def unchanged(engine):
    """Check after the test that memory is as it was at the end of `warm`, which the test calls."""
    before = []

    def warm():
        before.extend((live_tensors(), len(gc.get_objects()), resident_bytes(), engine.memory()))

    yield warm
    tensors, things, resident, memory = before
    assert engine.memory() == memory
    assert live_tensors() <= tensors
    assert len(gc.get_objects()) <= things + 500  # caches of libraries that fill up late
    assert resident_bytes() <= resident + MOST_GROWTH


def generate(engine, tokens: int) -> None:
    """Answers of rows that come and go, some of which are given up halfway."""
    seeds = itertools.count()
    while tokens > 0:
        seed = next(seeds)
        rows = [
            Row("x" * (5 + 11 * index), column.adapter, Sampling(20 + 15 * index, temperature=1.0, seed=seed))
            for index, column in enumerate(engine.columns)
        ]
        stream = engine.stream_rows(rows)
        for update in itertools.islice(stream, 60 if seed % 3 == 2 else None):
            tokens -= update.token_id is not None
        stream.close()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's account of this process")
def test_ten_thousand_tokens_leave_nothing_behind(engine, unchanged):
    """No tensor, no object, no resident memory."""
    generate(engine, 1_500)
    unchanged()
    generate(engine, 10_000)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's account of this process")
def test_five_hundred_adapters_come_and_go(engine, unchanged, tmp_path):
    """Each under a name of its own, answers once and goes; every tenth is refused since its name is taken."""

    once = Sampling(1)

    def cycles(names):
        for number, name in enumerate(names):
            engine.load(name, tmp_path / ("mix", "dora", "lora")[number % 3])
            if number % 10 == 0:
                with pytest.raises(ValueError, match="is registered"):
                    engine.load(name, tmp_path / "lora")
            assert [u.error for u in engine.stream_rows([Row("hi", name, once), Row("hi", None, once)])] == [None] * 2
            engine.unload(name)

    cycles(f"warm-{number}" for number in range(60))
    unchanged()
    cycles(f"adapter-{number}" for number in range(500))
    assert [column.name for column in engine.columns] == ["base", "mix", "dora", "lora"]
