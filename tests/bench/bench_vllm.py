"""CPU time per token in vLLM (rows of the base, a LoRA, a DoRA and a MixLoRA, 16 in a batch), and memory per adapter.

Run in the environment of `.ci/vllm`:

    PYTHONPATH=tests FOLDER/bin/python tests/bench/bench_vllm.py

CPU time of vLLM's processes, not wall time, so that other work on the machine counts little; one thread; rounds take
turns. The plugin is on in all of them; `--without-plugin` measures the base and the LoRA in vLLM as it is.
Memory is what the resident memory of all processes grows by for each of COPIES adapters that are registered, none of
which is in a slot.
"""

from __future__ import annotations

import argparse
import os
import statistics

ROWS, NEW_TOKENS, COPIES = 16, 32, 24


def cpu_seconds() -> float:
    """CPU time of this process and all of its children so far."""
    import psutil

    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def resident_bytes() -> int:
    """Return the resident memory of this process and all of its children, shared pages counted once each."""
    import psutil

    me = psutil.Process()
    return sum(process.memory_full_info().pss for process in (me, *me.children(recursive=True)))


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without-plugin", action="store_true")
    options = parser.parse_args()
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | (
        {"VLLM_PLUGINS": ""} if options.without_plugin else {}
    )

    from engines.vllm.answers_here import base_folder, folder_of
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        base_folder(), dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=ROWS,
        enable_lora=True, max_loras=3, max_cpu_loras=3 + 3 * COPIES, max_lora_rank=16,
    )  # fmt: skip
    methods = ["base", "lora"] + ([] if options.without_plugin else ["dora", "mixlora"])
    requests = {
        method: None if method == "base" else LoRARequest(method, number, str(folder_of(method)))
        for number, method in enumerate(methods)
    }
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)

    def seconds_per_token(method: str, start: int) -> float:
        # A prompt of one token: nearly all of the time is decoding. Others than before, so that none is cached.
        prompts = [{"prompt_token_ids": [1000 + start + row]} for row in range(ROWS)]
        before = cpu_seconds()
        llm.generate(prompts, sampling, use_tqdm=False, lora_request=requests[method])
        return (cpu_seconds() - before) / (ROWS * NEW_TOKENS)

    found: dict[str, list[float]] = {method: [] for method in methods}
    for number in range(options.rounds + 1):
        for method in methods:
            value = seconds_per_token(method, ROWS * number)
            if number:  # the first round loads the adapters
                found[method].append(value)
    medians = {method: statistics.median(values) for method, values in found.items()}
    print("| rows | CPU ms a token | LoRA = 1 | range |\n| --- | ---: | ---: | --- |")
    for method, median in medians.items():
        low, high = (1000 * edge(found[method]) for edge in (min, max))
        print(f"| {method} | {1000 * median:.2f} | {median / medians['lora']:.3f} | {low:.2f} to {high:.2f} |")
    print("\n| adapter | file, MB | MB each registered |\n| --- | ---: | ---: |")
    for place, method in enumerate(methods[1:]):
        before = resident_bytes()
        for copy in range(COPIES):
            number = 100 + COPIES * place + copy
            llm.llm_engine.add_lora(LoRARequest(f"{method} {copy}", number, str(folder_of(method))))
        grown = (resident_bytes() - before) / COPIES / 1e6
        size = (folder_of(method) / "adapter_model.safetensors").stat().st_size / 1e6
        print(f"| {method} | {size:.1f} | {grown:.1f} |")


if __name__ == "__main__":
    main()
