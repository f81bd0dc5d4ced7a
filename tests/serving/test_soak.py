"""A thousand requests in a row leave nothing behind.

`pytest -m soak tests/serving/test_soak.py`; about a minute on one thread.
"""

from __future__ import annotations

import gc
from pathlib import Path

import httpx
import pytest
import torch
from serving.conftest import chat, served

from minilora_hub.compare.engine import CompareEngine

pytestmark = pytest.mark.soak

MOST_GROWTH = 8 * 2**20
"""Bytes of resident memory over a thousand requests."""


def live_tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def ask(client, count):
    """Send requests one after another: whole, streamed, refused, scored, and streams that are left."""
    models = ("base", "mix", "dora", "lora")
    for index in range(count):
        model, words = models[index % 4], f"{index}: " + "word " * (index % 7)
        request = chat(model, words, 4 + index % 9, seed=index)
        if index % 10 == 9:
            assert client.post("/v1/chat/completions", json=chat(f"gone{index}", words, 4)).status_code == 404
        elif index % 10 == 8:
            request = {"model": model, "prompt": words, "max_tokens": 1, "echo": True, "logprobs": 2}
            assert client.post("/v1/completions", json=request).status_code == 200
        elif index % 2:
            with client.stream("POST", "/v1/chat/completions", json=request | {"stream": True}) as response:
                lines = response.iter_lines()
                if index % 10 == 7:
                    next(lines)
                    continue
                assert [line for line in lines if line][-1] == "data: [DONE]"
        else:
            assert client.post("/v1/chat/completions", json=request).status_code == 200


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's account of this process")
def test_a_thousand_requests_leave_nothing_behind(saved):
    engine = CompareEngine(saved[0], saved[1], device="cpu")
    with served(engine, saved[1]) as (server, address), httpx.Client(base_url=address, timeout=60) as client:
        ask(client, 300)
        gc.collect()
        tensors, things, resident, memory = live_tensors(), len(gc.get_objects()), resident_bytes(), engine.memory()
        ask(client, 1000)
        assert not server.scheduler._rows
        assert engine.memory() == memory
        assert live_tensors() <= tensors
        assert len(gc.get_objects()) <= things + 500  # caches of libraries that fill up late
        assert resident_bytes() <= resident + MOST_GROWTH
