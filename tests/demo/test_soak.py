"""A day of visitors: a thousand comparisons in a row over HTTP, and the server's memory is as it was.

`pytest -m soak tests/demo/test_soak.py`; some minutes, on loopback.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from demo.serving import PageServer
from gradio_client import Client

pytestmark = pytest.mark.soak

COMPARISONS, WARM = 1000, 450
MOST_GROWTH = 8 * 2**20
"""Bytes. By the time of `WARM` as many visitors have come as the page remembers."""


def resident_bytes(process: int) -> int:
    """Memory of a process that is really there."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_thousand_comparisons_leave_nothing_behind():
    """Every tenth is cancelled halfway, every second comes from a new visitor."""
    with PageServer() as process:
        server = process.serve("scripted", delay=0)
        client, warm = Client(server.address, verbose=False), 0
        for number in range(COMPARISONS):
            if number == WARM:
                warm = resident_bytes(process.process.pid)
            if number % 2 == 0:
                client = Client(server.address, verbose=False)
            prompt = f"visitor {number}"
            if number % 10 == 0:
                job = client.submit(prompt, max_new_tokens=400, api_name="/compare")
                next(iter(job))
                job.cancel()
            else:
                rows = client.predict(prompt, max_new_tokens=30, api_name="/compare")["rows"]
                assert [row["text"] for row in rows[1:]] == [prompt] * 2
        server.settled()
        grown = resident_bytes(process.process.pid) - warm
        assert grown <= MOST_GROWTH, f"{grown / 2**20:.1f} MiB"
        print(f"{grown / 2**20:.1f} MiB in {COMPARISONS - WARM} comparisons")
