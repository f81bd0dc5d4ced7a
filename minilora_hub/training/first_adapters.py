"""The two adapters that ship with the first release: a DoRA and a MixLoRA, trained briefly on three small tasks.

    python -m minilora_hub.training.first_adapters --method mixlora --out model_cards/smollm2-135m-mixlora
    python -m minilora_hub.training.first_adapters --measure model_cards/smollm2-135m-mixlora

The first line trains, measures and writes results.json; the second measures a folder again.

The tasks are in `first_tasks`, the measurements in `measuring`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minilora_hub.errors import AdapterError
from minilora_hub.results import RESULTS_FILE, Base, DataSource, Results, Sample, Training
from minilora_hub.training import measuring
from minilora_hub.training.first_tasks import DATA, TASKS, make_items
from minilora_hub.training.outputs import EMBEDDED_NOTE as ROUNDED

MEASURE_COMMAND = "python -m minilora_hub.training.first_adapters --measure DIR"
FACTS_FILE = "training.json"
"""What an earlier version of this file wrote instead of results.json."""


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained; what is written beside it."""

    method: str
    adapter: dict[str, Any]
    steps: int = 200
    batch_size: int = 8
    learning_rate: float = 1e-3
    warmup_steps: int = 10
    seed: int = 0
    train_items: int = 1600
    test_items: int = 150


# Equal trainable parameters within 9%: 3.8 and 4.1 million.
RECIPES = {
    "dora": Recipe("dora", {"r": 12}),
    "mixlora": Recipe("mixlora", {"r": 8, "expert_r": 4, "num_experts": 4, "num_experts_per_tok": 2}),
}


def train(recipe: Recipe, out: Path, base: str = "embedded") -> Results:
    """Train, measure against the base, and write the folder as it would be published.

    Args:
        recipe: what to train and how.
        out: the folder.
        base: the base, as `resolve_base` takes it.

    Returns:
        What is also written to ``results.json``.
    """
    import torch
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from minilora_hub import DoraConfig, DoraForCausalLM, MixLoraConfig, MixLoraForCausalLM
    from minilora_hub.bases import resolve_base

    resolved = resolve_base(base)
    classes: dict[str, tuple[Any, Any]] = {
        "dora": (DoraConfig, DoraForCausalLM),
        "mixlora": (MixLoraConfig, MixLoraForCausalLM),
    }
    config_class, model_class = classes[recipe.method]
    tokenizer = AutoTokenizer.from_pretrained(resolved.path)
    model = model_class.from_base(base, config_class(**recipe.adapter), seed=recipe.seed)

    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup_steps,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        seed=recipe.seed,
        use_cpu=not torch.cuda.is_available(),
    )
    rows = [tokenized(tokenizer, item) for item in make_items(recipe.train_items, False, recipe.seed)]
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)
    started = time.perf_counter()
    trainer.train()
    seconds = round(time.perf_counter() - started)
    loss = [(entry["step"], round(entry["loss"], 4)) for entry in trainer.state.log_history if "loss" in entry]

    for parameter in model.adapter_parameters().values():  # half the bytes; measured after the cast
        if parameter.dim() > 1 or recipe.method == "mixlora":
            parameter.data = parameter.data.to(torch.bfloat16)
    # A published configuration names the real repo; the fingerprint says which weights it was trained on.
    model.config.base_model_name_or_path = resolved.hub_id or base
    model.save_pretrained(out, tokenizer=tokenizer)
    shutil.rmtree(out / "trainer", ignore_errors=True)
    training = describe_training(recipe, seconds, loss, rows, here=True)
    return measure(out, recipe, training, base)


def describe_training(
    recipe: Recipe, seconds: float, loss: list[Any], rows: list[dict[str, list[int]]], here: bool
) -> Training:
    """What results.json says about a training run; machine and libraries only if it ran `here`, in this setup."""
    saved = "bfloat16, magnitudes float32" if recipe.method == "dora" else "bfloat16"
    return Training(
        data=(
            DataSource(
                "dates, numbers and records", DATA, len(rows), sum(len(row["input_ids"]) for row in rows), "apache-2.0"
            ),
        ),
        hyperparameters={
            "optimizer": "AdamW",
            "learning rate": recipe.learning_rate,
            "schedule": "cosine",
            "warm-up steps": recipe.warmup_steps,
            "batch size": recipe.batch_size,
            "seed": recipe.seed,
            "trained in": "float32",
            "saved in": saved,
            "loss on": "completions only",
        },
        steps=recipe.steps,
        seconds=seconds,
        hardware=measuring.hardware() if here else None,
        libraries=measuring.library_versions() if here else {},
        loss=tuple((step, value) for step, value in loss),
    )


def known_training(folder: Path, trained_here: bool, base: str = "embedded") -> tuple[Recipe, Training]:
    """The recipe and the training facts that lie in a folder, in results.json or in an older training.json."""
    from transformers import AutoTokenizer

    from minilora_hub.bases import resolve_base

    if (folder / RESULTS_FILE).is_file():
        results = Results.load(folder)
        recipe = RECIPES.get(results.method)
        if recipe is None or results.training is None:
            raise AdapterError(f"{folder.name}: method={results.method!r}: was not trained by this file")
        return recipe, results.training
    if not (folder / FACTS_FILE).is_file():
        raise AdapterError(f"{folder.name}: neither {RESULTS_FILE} nor {FACTS_FILE}: nothing tells how it was trained")
    facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
    recipe = Recipe(**facts["recipe"])
    tokenizer = AutoTokenizer.from_pretrained(resolve_base(base).path)
    rows = [tokenized(tokenizer, item) for item in make_items(recipe.train_items, False, recipe.seed)]
    return recipe, describe_training(recipe, facts["train_seconds"], facts["loss"], rows, trained_here)


def measure(folder: Path, recipe: Recipe, training: Training, base: str = "embedded") -> Results:
    """Measure an adapter folder and its base on the test items, and write results.json into it.

    Args:
        folder: what `train` has written.
        recipe: how it was trained: its seed and sizes give the test items.
        training: the facts of the training run.
        base: the base, as `resolve_base` takes it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from minilora_hub import DoraForCausalLM, MixLoraForCausalLM
    from minilora_hub.bases import resolve_base

    resolved = resolve_base(base)
    tokenizer = AutoTokenizer.from_pretrained(resolved.path, padding_side="left")
    items = make_items(recipe.test_items, True, recipe.seed + 1)
    prompts = [item["prompt"] for item in items]
    # The dtype that the published configuration asks for, so that this measures what a visitor loads.
    plain: Any = AutoModelForCausalLM.from_pretrained(resolved.path, dtype="float32").eval()
    size = sum(parameter.numel() for parameter in plain.parameters())
    base_answers = measuring.answers(plain, tokenizer, prompts)
    model_class: Any = MixLoraForCausalLM if recipe.method == "mixlora" else DoraForCausalLM
    model = model_class.from_pretrained(folder, base_model=plain)
    adapter_answers = measuring.answers(model, tokenizer, prompts)

    shown = [next(i for i, item in enumerate(items) if item["task"] == task) for task in TASKS]
    results = Results(
        method=recipe.method,
        base=Base(
            id=model.config.base_model_name_or_path,
            revision=model.config.base_model_revision,
            fingerprint=model.config.base_fingerprint,
            parameters=size,
            license="apache-2.0" if resolved.embedded else None,
            note=ROUNDED if resolved.embedded else None,
        ),
        parameters=model.num_adapter_parameters(),
        share=round(model.num_adapter_parameters() / size, 5),
        license="apache-2.0" if resolved.embedded else None,
        language=("en",),
        training=training,
        evaluation=measuring.evaluations(
            measuring.exact_matches(adapter_answers, items),
            measuring.exact_matches(base_answers, items),
            TASKS,
            MEASURE_COMMAND,
        ),
        samples=tuple(Sample(prompts[i], base_answers[i], adapter_answers[i]) for i in shown),
        decoding=measuring.DECODING,
        expert_load=measuring.expert_load(model, tokenizer, prompts),
    )
    results.save(folder)
    (folder / FACTS_FILE).unlink(missing_ok=True)  # all of it is in results.json now
    return results


def tokenized(tokenizer: Any, item: dict[str, str]) -> dict[str, list[int]]:
    """A training row whose labels cover the completion only."""
    prompt = [{"role": "user", "content": item["prompt"]}]
    start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    answer = tokenizer(item["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return {
        "input_ids": start + answer,
        "attention_mask": [1] * len(start + answer),
        "labels": [-100] * len(start) + answer,
    }


def main() -> None:
    """Parse the command line and train, or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=RECIPES)
    parser.add_argument("--out", type=Path, help="folder that is written")
    parser.add_argument("--steps", type=int, help="default: the recipe's")
    parser.add_argument("--measure", type=Path, metavar="DIR", help="measure this trained folder; nothing is trained")
    parser.add_argument(
        "--trained-here", action="store_true", help="with --measure: it was trained on this machine, in this setup"
    )
    arguments = parser.parse_args()
    if arguments.measure:
        results = measure(arguments.measure, *known_training(arguments.measure, arguments.trained_here))
    elif arguments.method and arguments.out:
        recipe = RECIPES[arguments.method]
        if arguments.steps:
            recipe = Recipe(**(asdict(recipe) | {"steps": arguments.steps}))
        results = train(recipe, arguments.out)
    else:
        parser.error("--method and --out, or --measure, are required")
    print(json.dumps(results.to_dict()["evaluation"], indent=2))


if __name__ == "__main__":
    main()
