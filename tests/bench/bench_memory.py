"""Peak memory and loading time of each method: a process of its own for each, on the embedded base.

    python tests/bench/bench_memory.py [--json FILE]

Memory is the process's peak resident size (Linux) while the adapter is put onto the loaded base, in a prefill of 512
tokens, and in one training step of 2 x 128 tokens, each less the resident size with the base alone. Loading is the time
to put the adapter of a folder onto a base that is loaded, the median of three.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

METHODS = ("base", "LoRA", "DoRA", "MixLoRA", "PEFT LoRA", "PEFT DoRA")


def resident_bytes(kind: str) -> int:
    """VmRSS, resident now, or VmHWM, the peak since `forget_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


def forget_peak() -> None:
    """Give freed memory back to the system, so that it is not found resident, and start the peak from here."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def save_all(folder: Path) -> None:
    """One adapter of each kind, as folders."""
    from bench_bank import save_adapters
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from minilora_hub.bases import resolve_base

    base = AutoModelForCausalLM.from_pretrained(resolve_base("embedded").path).eval()
    save_adapters(base, folder, 16)
    settings = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "use_dora": True}
    get_peft_model(base, LoraConfig(**settings)).save_pretrained(folder / "PEFT DoRA")


def put_on(base, method: str, folder: Path):
    """Load a method's adapter from its folder onto `base`."""
    if method == "base":
        return base
    if method == "LoRA":
        from minilora_hub.adapter_folder.folders import read_folder
        from minilora_hub.bases.skeleton import BaseSource
        from minilora_hub.formats.reading import read_adapter
        from minilora_hub.remote_code.attach import attach

        config, tensors, sites = read_adapter(read_folder(folder / "LoRA"), BaseSource.of_model(base))
        base.requires_grad_(False)
        attach(base, config, sites, tensors)
        return base
    if method.startswith("PEFT"):
        from peft import PeftModel

        name = "PEFT DoRA" if method == "PEFT DoRA" else "LoRA"
        return PeftModel.from_pretrained(base, folder / name, is_trainable=True)
    from minilora_hub import DoraForCausalLM, MixLoraForCausalLM

    kind = {"DoRA": DoraForCausalLM, "MixLoRA": MixLoraForCausalLM}[method]
    return kind.from_pretrained(folder / method, base_model=base)


def measure_one(method: str, folder: Path) -> dict[str, float]:
    """What one process needs; called in a process of its own."""
    import torch
    from transformers import AutoModelForCausalLM

    from minilora_hub.bases import resolve_base
    from minilora_hub.compare.found_adapters import shared_copy

    base = AutoModelForCausalLM.from_pretrained(resolve_base("embedded").path, dtype=torch.float32).eval()
    put_on(shared_copy(base), method, folder)  # imports are not the adapter's cost
    seconds = []
    for _ in range(3):
        copy = shared_copy(base)
        started = time.perf_counter()
        put_on(copy, method, folder)
        seconds.append(time.perf_counter() - started)
    del copy
    with torch.no_grad():  # the matrix library's own buffers are not the adapter's cost either
        base(input_ids=torch.arange(512)[None] + 100, use_cache=False)
    forget_peak()
    alone = resident_bytes("VmRSS")
    found = {"load_seconds": statistics.median(seconds)}
    model = put_on(shared_copy(base), method, folder)
    found["loading"] = resident_bytes("VmHWM") - alone
    forget_peak()
    with torch.no_grad():
        model(input_ids=torch.arange(512)[None] + 100, use_cache=False)
    found["prefill"] = resident_bytes("VmHWM") - alone
    if method != "base":
        ids = torch.arange(256).view(2, 128) + 100
        forget_peak()
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        found["training"] = resident_bytes("VmHWM") - alone
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    if arguments.one:
        print(json.dumps(measure_one(arguments.one, arguments.folder)))
        return
    results = {}
    with tempfile.TemporaryDirectory() as name:
        save_all(Path(name))
        for method in METHODS:
            command = [sys.executable, "-W", "ignore", __file__, "--one", method, "--folder", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results[method] = json.loads(done.stdout.splitlines()[-1])
    print("peak memory over the loaded base, in MiB; loading in seconds")
    for method, found in results.items():
        parts = [f"{key} {found[key] / 2**20:7.0f}" for key in ("loading", "prefill", "training") if key in found]
        print(f"  {method:10} {found['load_seconds']:6.2f} s  " + "  ".join(parts))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
