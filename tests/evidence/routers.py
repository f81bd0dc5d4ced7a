"""Find out why a MixLoRA's routers stay flat: one cause at a time, measured by `routing_measures.py`.

    python tests/evidence/routers.py run                               # what is missing; goes on after a stop
    python tests/evidence/routers.py run --cause ratio-10 --seed 1     # one of them, another seed
    python tests/evidence/routers.py run --steps 240 --rows 8 --items 100 --windows 64     # at full length
    python tests/evidence/routers.py report                            # the tables, also in docs/evidence.md

Each run has the size, the data and the learning rate of the MixLoRA in compare_methods.py, and one setting of its own.
``shipped`` measures the adapter in model_cards/, ``fresh`` an adapter before its first step. ``tasks`` is the best that
routing by task can do at this size: a LoRA of a quarter of the rank for each task, trained for a quarter of the steps,
and the right one chosen. ``apart`` starts from these four as experts, and so has twice the steps: compare it with
``--cause baseline`` of twice the ``--steps``.

Base and adapters are in float32, which a CPU without bfloat16 products multiplies several times faster.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from evidence.causes import CAUSES, FOLDER, Sizes
from evidence.measure import finish, work_folder
from evidence.plan import ADAPTERS, MIX, TASKS
from evidence.routing_measures import (
    by_chance,
    encoded,
    general_text,
    gradients,
    information,
    read,
    rounded,
    without_choice,
)
from evidence.store import CODE, command_line, keep
from peft import PeftModel
from transformers import AutoModelForCausalLM

from minilora_hub import DoraForCausalLM, MixLoraConfig, MixLoraForCausalLM
from minilora_hub.bases.resolving import resolve_base
from minilora_hub.evaluation.metrics import exact_match
from minilora_hub.evaluation.tasks.items import Item
from minilora_hub.evaluation.tasks.registry import TASKS as KNOWN_TASKS
from minilora_hub.formats.importing import import_as_experts
from minilora_hub.remote_code.adapter_files import ADAPTER_FILE, read_adapter
from minilora_hub.training.models import load_tokenizer

SHIPPED = Path(__file__).parents[2] / "model_cards" / "smollm2-135m-mixlora"
SETTINGS: dict[str, Any] = {
    "base": "embedded",
    "learning_rate": 1.5e-3,
    "attention": "eager",
    "keep_checkpoints": 1,
    "record": False,
}
QUARTER = {"method": "lora", "r": ADAPTERS["mixlora"]["r"] // len(TASKS)}
MARGIN = 8
"""Tokens that an answer may have beyond the longest reference of its task."""


def trained_on(rows: Path, out: Path, **settings: Any) -> Path:
    """Train an adapter into `out`, or go on with it."""
    halves = {"save_every": max(1, settings["max_steps"] // 2)}
    return finish(out, data=str(rows), **SETTINGS | halves | settings)


def adapter_of(name: str, work: Path, sizes: Sizes, seed: int) -> dict[str, Path]:
    """Return {task: the adapter that answers it}, made where it is missing."""
    cause, out = CAUSES[name], work / "adapters" / f"{name}-seed{seed}-steps{sizes.steps}-rows{sizes.rows}"

    def trained(out: Path, data: str, steps: int, **settings: Any) -> Path:
        settings |= {"seed": seed, "batch_size": sizes.rows, "max_steps": steps}
        return trained_on(work / "data" / f"{data}.train.jsonl", out, **settings)

    if cause.kind == "shipped":
        return dict.fromkeys(TASKS, SHIPPED)
    if cause.kind == "fresh":
        return dict.fromkeys(TASKS, _fresh(out, seed))
    mixture = {"method": "mixlora", **ADAPTERS["mixlora"]}
    if cause.kind == "trained":
        return dict.fromkeys(TASKS, trained(out, MIX, sizes.steps, **mixture | cause.changed))
    each = sizes.steps // len(TASKS)
    folders = {task: out.with_name(out.name.replace(name, task, 1)) for task in TASKS}
    singles = {task: trained(folder, task, each, **QUARTER) for task, folder in folders.items()}
    if cause.kind == "tasks":
        return singles
    start = out.with_name(out.name + "-start")
    if not start.is_dir():
        import_as_experts(list(singles.values()), start, base=SETTINGS["base"], attention="mean", seed=seed)
    settings = {"method": "mixlora", "from_adapter": str(start)} | cause.changed
    return dict.fromkeys(TASKS, trained(out, MIX, sizes.steps, **settings))


def _fresh(out: Path, seed: int) -> Path:
    if not out.is_dir():
        config = MixLoraConfig(**ADAPTERS["mixlora"])
        MixLoraForCausalLM.from_base(SETTINGS["base"], config, seed=seed).save_pretrained(out)
    return out


def loaded(folder: Path) -> Any:
    """Return the base with an adapter in it: one of ours, or a LoRA in PEFT's format."""
    if (folder / "config.json").is_file():
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        model_class: Any = MixLoraForCausalLM if kind == "mixlora" else DoraForCausalLM
        return model_class.from_pretrained(folder, base_model=SETTINGS["base"], dtype=torch.float32).eval()
    base = AutoModelForCausalLM.from_pretrained(resolve_base(SETTINGS["base"]).path, dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(folder)).eval()


def moved(before: Path, after: Path) -> list[float]:
    """Return the norm of what training changed of each router, divided by that of the router before."""
    old, new = (read_adapter(folder / ADAPTER_FILE) for folder in (before, after))
    routers = sorted((name for name in old if name.endswith(".router")), key=lambda name: int(name.split(".")[1]))
    return rounded([float((new[name].float() - old[name]).norm() / old[name].norm()) for name in routers], 3)


@torch.inference_mode()
def exact(model: Any, tokenizer: Any, items: Sequence[Item]) -> str:
    """Return a 1 for each item whose greedy answer is the reference, else a 0."""
    turns = [[{"role": "user", "content": item.prompt}] for item in items]
    batch = tokenizer.apply_chat_template(
        turns,
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
        tokenizer_kwargs={"padding_side": "left"},
    )
    limit = MARGIN + max(len(tokenizer(item.completion, add_special_tokens=False)["input_ids"]) for item in items)
    found = model.generate(**batch, max_new_tokens=limit, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    answers = tokenizer.batch_decode(found[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return "".join(str(int(exact_match(answer, item.completion))) for answer, item in zip(answers, items, strict=True))


def measured(name: str, work: Path, sizes: Sizes, seed: int) -> dict[str, Any]:
    """Make an adapter and measure it."""
    started, tokenizer = time.process_time(), load_tokenizer(resolve_base(SETTINGS["base"]))
    cause, folders = CAUSES[name], adapter_of(name, work, sizes, seed)
    items = {task: KNOWN_TASKS[task].items("test", sizes.items) for task in TASKS}
    result: dict[str, Any] = {"cause": name, "changed": cause.changed, "seed": seed, **asdict(sizes), "code": CODE}
    if cause.kind == "tasks":
        result["losses"], result["exact"] = [], {}
        for task, folder in folders.items():
            model = loaded(folder)
            result["losses"] += rounded(read(model, encoded(items[task], tokenizer)).losses)
            result["exact"][task] = exact(model, tokenizer, items[task])
        return result | {"cpu_seconds": round(time.process_time() - started)}
    model = loaded(folders[TASKS[0]])
    every = [item for some in items.values() for item in some]
    examples, tasks = encoded(every, tokenizer), [item.task for item in every]
    found = read(model, examples)
    chance, most = by_chance(found.counts, tasks)
    load = found.counts.sum(1) / found.counts.sum((1, 2))[:, None]
    result |= {
        "losses": rounded(found.losses),
        "entropy": rounded(found.entropy),
        "information": rounded(information(found.counts, tasks)),
        "information_by_chance": rounded(chance),
        "information_by_chance_at_most": rounded(most),
        "load": [rounded(layer, 4) for layer in load],
    }
    if cause.kind != "fresh":  # whose experts compute what the base does
        result["without_choice"] = without_choice(model, examples, thirds=cause.kind == "shipped")
    if cause.kind not in ("fresh", "shipped"):  # compare_methods.py has measured that one, on all items
        result["exact"] = {task: exact(model, tokenizer, some) for task, some in items.items()}
        text, windows = general_text(tokenizer, sizes.windows)
        losses = read(model, windows).losses
        result["general_text"] = {"name": text.name, "sha256": text.sha256, "losses": rounded(losses)}
    if cause.kind == "fresh" and seed == 0:  # the shipped adapter's seed
        result["moved_in_training"] = moved(folders[TASKS[0]], SHIPPED)
    if name in ("shipped", "baseline"):
        rows = [json.loads(line) for line in (work / "data" / f"{MIX}.train.jsonl").read_text().splitlines()[-32:]]
        result["gradients"] = gradients(model, encoded([Item(**row) for row in rows], tokenizer))
    return result | {"cpu_seconds": round(time.process_time() - started)}


def main() -> None:
    """Parse the command line."""
    parser = command_line(__doc__)
    parser.add_argument("--cause", action="append", choices=CAUSES, help="only these; again for more")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=4, help="rows of a step")
    parser.add_argument("--items", type=int, default=16, help="test items of each task")
    parser.add_argument("--windows", type=int, default=16, help="windows of general text")
    arguments = parser.parse_args()
    if arguments.what == "report":
        from evidence.routing_report import report

        print(report())
        return
    work = work_folder(arguments.work)
    sizes = Sizes(arguments.steps, arguments.rows, arguments.items, arguments.windows)
    for name in arguments.cause or CAUSES:
        keep(FOLDER / sizes.file(name, arguments.seed), partial(measured, name, work, sizes, arguments.seed))


if __name__ == "__main__":
    main()
