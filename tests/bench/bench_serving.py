"""Tokens per second of `minilora serve` with 1 to 64 concurrent requests, against `transformers serve`.

    python tests/bench/bench_serving.py [--clients 1 4 16 64] [--rounds 3]

Three servers on the embedded base, each a process with one thread: ours, with the shipped adapters; `transformers
serve`; and the same with `--continuous-batching`. The last two have the base alone, since they load no adapter of any
kind. Every round sends the same chats to each in turn, so many at once, greedily: to ours once all for the base, and
once spread over the base and the four adapters. Requests that take turns, one at a time, are the column of one client.

The figures are tokens per second of the server's CPU time, which other work on the machine changes little: with one
thread, an idle core needs hardly more wall time. Wall times are in the file beside them. Results of the numbers of
clients that are not measured stay in tests/bench/serving.json; tests/docs/generate.py writes the table.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import httpx

from minilora_hub.bases.resolving import resolve_base

RESULTS = Path(__file__).with_name("serving.json")
ADAPTERS = tuple(f"smollm2-135m-{method}" for method in ("lora", "dora", "mixlora", "mixdora"))
NEW_TOKENS = 16
OURS, PLAIN, BATCHED = "minilora serve", "transformers serve", "transformers serve --continuous-batching"
CACHE = ("--cb-block-size", "32", "--cb-num-blocks", "256", "--cb-max-batch-tokens", "1024")
"""Without these, it did not answer within a minute on a CPU (transformers 5.24)."""
MOST_CLIENTS = {PLAIN: 16}
"""It answers one request after the other: more clients only take longer."""


class Process:
    """A server in a process of its own.

    Args:
        arguments: of ``python -m``, without the port.
        path: answers 200 when the server is ready.
    """

    def __init__(self, arguments: list[str], path: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.address, self._path = f"http://127.0.0.1:{port}", path
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", *arguments, "--port", str(port)]
        self._process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def __enter__(self) -> Process:
        """Wait until it answers."""
        for _ in range(1200):
            if self._process.poll() is not None:
                raise SystemExit(f"the server ended with {self._process.returncode}")
            try:
                if httpx.get(self.address + self._path, timeout=5).status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.25)
        raise SystemExit("the server did not start")

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait()

    def cpu_seconds(self) -> float:
        """CPU time of the process so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(server: Process, models: list[str], clients: int, number: int) -> dict[str, float]:
    """Send one chat per client at once, and return what their answers took."""

    async def ask() -> list[int]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.address, timeout=900, limits=limits) as client:
            answers = await asyncio.gather(
                *(
                    client.post(
                        "/v1/chat/completions",
                        json={
                            "model": models[(index + number) % len(models)],
                            "messages": [
                                {"role": "user", "content": f"Tell me a long story, number {number} {index}."}
                            ],
                            "max_tokens": NEW_TOKENS,
                            "temperature": 0,
                        },
                    )
                    for index in range(clients)
                )
            )
        for answer in answers:
            answer.raise_for_status()
        return [answer.json()["usage"]["completion_tokens"] for answer in answers]

    cpu, wall = server.cpu_seconds(), time.perf_counter()
    tokens = sum(asyncio.run(ask()))
    return {
        "tokens": tokens,
        "cpu_rate": tokens / (server.cpu_seconds() - cpu),
        "wall_rate": tokens / (time.perf_counter() - wall),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=3, help="fewer with 16 clients and more")
    options = parser.parse_args()
    base = str(resolve_base("embedded").path)
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    transformers = ["transformers.cli.transformers", "serve", base, "--device", "cpu", "--dtype", "float32"]
    with ExitStack() as running:
        commands = {
            OURS: (["minilora_hub.cli", "serve", "--max-rows", "64"], "/health"),
            PLAIN: (transformers, "/health"),
            BATCHED: ([*transformers, "--continuous-batching", *CACHE], "/health"),
        }
        servers = {name: running.enter_context(Process(*command)) for name, command in commands.items()}
        listed = httpx.get(servers[OURS].address + "/v1/models", timeout=60).json()["data"]
        own = next(model["id"] for model in listed if model["kind"] == "base")
        works = {
            f"{OURS}, base": (OURS, [own]),
            f"{OURS}, base and four adapters mixed": (OURS, [own, *ADAPTERS]),
            f"{PLAIN}, base": (PLAIN, [base]),
            f"{BATCHED}, base": (BATCHED, [base]),
        }
        for server, models in works.values():  # the first answers are slower
            measure(servers[server], models, len(models), 0)
        for clients in options.clients:
            rounds: dict[str, list[dict[str, float]]] = {name: [] for name in works}
            for number in range(max(1, min(options.rounds, 32 // clients))):
                for name, (server, models) in works.items():
                    if clients <= MOST_CLIENTS.get(server, clients):
                        rounds[name].append(measure(servers[server], models, clients, 100 * clients + number))
            for name, each in rounds.items():
                if each:
                    rates = {key: [one[key] for one in each] for key in ("cpu_rate", "wall_rate")}
                    entry = {key: round(statistics.median(values), 2) for key, values in rates.items()}
                    entry |= {f"{key}_range": [round(min(v), 2), round(max(v), 2)] for key, v in rates.items()}
                    found.setdefault(name, {})[str(clients)] = entry | {
                        "tokens": each[-1]["tokens"],
                        "rounds": len(each),
                    }
                    print(
                        f"{clients:>3} clients  {name:<60} {entry['cpu_rate']:>7.1f} tokens per CPU second", flush=True
                    )
            RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print("python tests/docs/generate.py writes them into the docs")


if __name__ == "__main__":
    main()
