"""CPU time per token in vLLM: rows of the base, a LoRA, a DoRA and a MixLoRA, with the plugin and without it.

Run in the environment of `.ci/vllm`:

    PYTHONPATH=tests FOLDER/bin/python tests/bench/bench_vllm.py

Two processes each hold a model, one with the plugin and one with vLLM as it is, and take turns: a round measures every
configuration for four tokens, so that other work on the machine slows all of them alike. CPU time, not wall time; one
thread; ratios are taken within a round, and their median and quartiles over the rounds are kept. Memory is what a
process grows by for each of COPIES adapters that are registered, none of which is in a slot. Writes vllm.json, from
which docs/vllm.md is rendered.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from pathlib import Path
from typing import Any

OUT = Path(__file__).with_name("vllm.json")
ROWS, NEW_TOKENS, COPIES = (1, 4, 16), 4, 16
METHODS = {"plugin": ("base", "lora", "dora", "mixlora"), "stock": ("base", "lora")}
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def serve(pipe: Any, kind: str) -> None:
    """Hold one model; answer (method, rows, start) with CPU seconds per token, and a method with bytes per adapter."""
    os.environ |= SETTINGS | ({"VLLM_PLUGINS": ""} if kind == "stock" else {})
    import psutil
    from engines.vllm.answers_here import base_folder, folder_of
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        base_folder(), dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=max(ROWS),
        enable_lora=True, max_loras=3, max_cpu_loras=3 + 3 * COPIES, max_lora_rank=16,
    )  # fmt: skip
    adapters = {
        method: LoRARequest(method, number, str(folder_of(method))) if number else None
        for number, method in enumerate(METHODS[kind])
    }
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)

    def seconds_per_token(method: str, rows: int, start: int) -> float:
        # Prompts of one token: nearly all of the time is decoding. Others each time, so that none is cached.
        prompts = [{"prompt_token_ids": [1000 + start + row]} for row in range(rows)]
        before = time.process_time()
        llm.generate(prompts, sampling, use_tqdm=False, lora_request=adapters[method])
        return (time.process_time() - before) / (rows * NEW_TOKENS)

    def bytes_per_adapter(method: str) -> float:
        me = psutil.Process()
        before = me.memory_full_info().uss
        for copy in range(COPIES):
            number = 100 + COPIES * METHODS[kind].index(method) + copy
            llm.llm_engine.add_lora(LoRARequest(f"{method} {copy}", number, str(folder_of(method))))
        return (me.memory_full_info().uss - before) / COPIES

    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        pipe.send(bytes_per_adapter(*asked) if len(asked) == 1 else seconds_per_token(*asked))


def spread(values: list[float]) -> dict[str, float]:
    """Return the median and the quartiles."""
    lower, median, upper = (round(value, 3) for value in statistics.quantiles(values, n=4))
    return {"median": median, "lower": lower, "upper": upper}


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Any] = {}
    for kind in METHODS:
        pipes[kind], there = context.Pipe()
        context.Process(target=serve, args=(there, kind), daemon=True).start()
        pipes[kind].recv()

    def ask(kind: str, *asked: Any) -> float:
        pipes[kind].send(asked)
        answer: float = pipes[kind].recv()
        return answer

    configurations = [(kind, method) for kind, methods in METHODS.items() for method in methods]
    seconds: dict[tuple[int, str, str], list[float]] = {}
    for number in range(rounds + 1):
        for rows in ROWS:
            # The other way round in every second round, so that no configuration always follows the same one.
            for kind, method in configurations[:: 1 if number % 2 else -1]:
                value = ask(kind, method, rows, max(ROWS) * number)
                print(f"round {number}: {rows} rows, {kind}, {method}: {1000 * value:.1f} ms a token", flush=True)
                if number:  # the first round loads the adapters
                    seconds.setdefault((rows, kind, method), []).append(value)

    def ratio(rows: int, one: tuple[str, str], other: tuple[str, str]) -> dict[str, float]:
        pairs = zip(seconds[rows, *one], seconds[rows, *other], strict=True)
        return spread([a / b for a, b in pairs])

    stock_base, lora = ("stock", "base"), ("plugin", "lora")
    ratios = {
        "a DoRA's token over a LoRA's": (("plugin", "dora"), lora),
        "a MixLoRA's token over a LoRA's": (("plugin", "mixlora"), lora),
        "a LoRA's token over the base's": (lora, ("plugin", "base")),
        "a token of the base with the plugin over one without": (("plugin", "base"), stock_base),
        "a LoRA's token with the plugin over one without": (lora, ("stock", "lora")),
    }
    from engines.vllm.answers_here import folder_of

    found = {
        "rounds": rounds,
        "tokens_per_cpu_second": {
            method: {str(rows): round(1 / statistics.median(seconds[rows, "plugin", method]), 2) for rows in ROWS}
            for method in METHODS["plugin"]
        },
        "ratios": {name: {str(rows): ratio(rows, *pair) for rows in ROWS} for name, pair in ratios.items()},
        "memory": {
            method: {
                "file_mb": round((folder_of(method) / "adapter_model.safetensors").stat().st_size / 1e6, 1),
                "registered_mb": round(ask("plugin", method) / 1e6, 1),
            }
            for method in METHODS["plugin"][1:]
        },
    }
    for pipe in pipes.values():
        pipe.send(None)
    OUT.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
