"""A server over a tiny base and an adapter of each kind, in a thread of this process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import tiny_stand_ins
import uvicorn

from minilora_hub.compare.engine import CompareEngine
from minilora_hub.serving.app import Server, build_app
from minilora_hub.serving.metrics import Metrics
from minilora_hub.serving.models import Models
from minilora_hub.serving.scheduler import Scheduler
from minilora_hub.serving.settings import ServerLimits


@contextlib.contextmanager
def served(engine, adapters=(), api_key=None, limits=None, allow_loading=True, base_names=(), folders=()):
    """Serve an engine at a free port; yields the parts and the address."""
    scheduler = Scheduler(engine, limits or ServerLimits())
    models = Models(engine, adapters, base_names)
    for folder in folders:
        models.register_folder(folder)
    server = Server(engine, scheduler, models, Metrics(), allow_loading)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(build_app(server, api_key), log_level="error", ws="none", timeout_graceful_shutdown=2)
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        while not running.started:
            time.sleep(0.01)
        try:
            yield server, f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            running.should_exit = True
            scheduler.stop_soon()
            thread.join()


@pytest.fixture(scope="module")
def running(saved):
    """The base, a MixLoRA, a DoRA and a LoRA behind one address."""
    base, adapters = saved
    engine = CompareEngine(base, adapters, device="cpu")
    with served(engine, adapters, base_names=["me/base"]) as parts:
        yield parts


@pytest.fixture(scope="module")
def http(running):
    """A plain HTTP client, as curl."""
    with httpx.Client(base_url=running[1], timeout=60) as client:
        yield client


@pytest.fixture
def slow(tmp_path):
    """A base whose forward takes 20 ms and never ends its answers, with two adapters; 4 rows, 4 that wait."""
    folders = tiny_stand_ins.save_parrots(tmp_path, {"dora": "dora", "mix": "mixlora"})
    engine = CompareEngine(tiny_stand_ins.ScriptedBase(delay=0.02), folders, tokenizer=tiny_stand_ins.byte_tokenizer())
    with served(engine, folders, limits=ServerLimits(rows=4, waiting=4)) as parts:
        yield parts


def run_async(coroutine):
    """Run a coroutine in a thread: a browser that other tests have opened keeps an event loop in this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def gather(address, requests, path="/v1/chat/completions", read=httpx.Response.json):
    """POST all requests at once: statuses and bodies in their order."""

    async def run():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as client:
            return await asyncio.gather(*(client.post(path, json=request) for request in requests))

    return [(done.status_code, read(done)) for done in run_async(run())]


def chat(model, words, tokens, **fields):
    """A request."""
    return {"model": model, "messages": [{"role": "user", "content": words}], "max_tokens": tokens} | fields


def rows(server):
    """Rows that run or wait."""
    return len(server.scheduler._rows)
