"""Clients that leave: rows are free within one step, whether a connection is closed or its process killed."""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import subprocess
import threading

import httpx
import pytest
from processes import wait_until
from serving.conftest import chat, gather, rows, run_async

from minilora_hub.compare.answer import Answer, Row
from minilora_hub.compare.sampling import Sampling
from minilora_hub.serving.rows import ServedRow


def test_a_cancelled_row_computes_at_most_the_step_that_runs(slow):
    """Of the scheduler itself: no step starts with a row that was cancelled, and its cache is freed."""
    server, _ = slow
    tokenizer = server.engine.tokenizer
    computed = threading.Semaphore(0)
    served = [
        ServedRow(
            Answer(10**9 + index, Row("", None, Sampling(300)), tokenizer("abc")["input_ids"], 300, tokenizer, ()),
            300,
            lambda update: computed.release(),
        )
        for index in range(3)
    ]
    for row in served:
        row.answer.ids = row.answer.ids.new_tensor([[257, 97, 256, 258]])  # a chat of one letter
        row.answer.prompt_tokens = 4
    server.scheduler.submit(served)
    for _ in range(9):
        assert computed.acquire(timeout=10)
    server.scheduler.cancel(served[:2])
    tokens = [row.answer.ids.shape[1] for row in served]
    wait_until(lambda: len(server.scheduler._rows) == 1)
    after = [row.answer.ids.shape[1] for row in served]
    assert all(late - early <= 1 for early, late in zip(tokens[:2], after[:2], strict=True))
    wait_until(lambda: served[2].answer.ids.shape[1] > after[2] + 3)
    assert [row.answer.ids.shape[1] for row in served[:2]] == after[:2]
    server.scheduler.cancel(served)
    wait_until(lambda: rows(server) == 0)
    wait_until(lambda: server.scheduler.load().cache_bytes == 0)
    load = server.scheduler.load()
    assert (load.running, load.waiting) == (0, 0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_closed_connection_frees_its_rows(slow, stream):
    """Other rows go on."""
    server, address = slow
    host, port = address.removeprefix("http://").split(":")
    body = b'{"model": "base", "prompt": "%s", "max_tokens": 400, "temperature": 0, "n": 3, "stream": %s}'
    body %= (b"x" * 90, b"true" if stream else b"false")
    raw = socket.create_connection((host, int(port)))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    raw.sendall(head.encode() + b"\r\n\r\n" + body)
    wait_until(lambda: len(server.scheduler._rows) == 3)
    done = []
    other = threading.Thread(
        target=lambda: done.extend(gather(address, [chat("dora", "still here", 60, temperature=0)]))
    )
    other.start()
    wait_until(lambda: len(server.scheduler._rows) == 4 or done)
    steps = server.scheduler._steps.count
    raw.close()
    wait_until(lambda: rows(server) <= 1)
    assert server.scheduler._steps.count - steps < 20  # it would have been 400
    other.join()
    assert done[0][1]["choices"][0]["message"]["content"] == "still here"
    # The request's own coroutine counts them, after the scheduler has let go of them.
    wait_until(lambda: 'minilora_cancelled_rows_total{model="base"} 3' in httpx.get(address + "/metrics").text)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_a_killed_client_frees_its_rows(slow):
    """SIGKILL of curl during a stream, and while it waits in the queue; others get whole answers."""
    server, address = slow
    body = '{"model": "base", "prompt": "x", "max_tokens": 400, "temperature": 0, "n": 2, "stream": true}'
    command = ["curl", "-sN", f"{address}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
    clients = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
    try:
        wait_until(lambda: rows(server) == 6)
        done = []
        other = threading.Thread(
            target=lambda: done.extend(gather(address, [chat("dora", "whole", 60, temperature=0)] * 2))
        )
        other.start()
        wait_until(lambda: rows(server) == 8)
        for client in clients:
            client.send_signal(signal.SIGKILL)
        other.join(20)
        assert [body["choices"][0]["message"]["content"] for _, body in done] == ["whole"] * 2
        wait_until(lambda: rows(server) == 0)
        assert server.scheduler._steps.count < 200  # 6 rows of 400 tokens, 4 at a time, would have been 800
    finally:
        for client in clients:
            client.kill()
            client.communicate()
        other.join()


def test_rows_that_wait_are_cancelled_too(slow):
    server, address = slow

    async def run():
        async with httpx.AsyncClient(base_url=address) as client:
            request = {"model": server.models.base, "prompt": "x", "max_tokens": 300, "temperature": 0, "n": 4}
            tasks = [asyncio.create_task(client.post("/v1/completions", json=request)) for _ in range(2)]
            while rows(server) < 8:
                await asyncio.sleep(0.01)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    run_async(run())
    wait_until(lambda: rows(server) == 0)
