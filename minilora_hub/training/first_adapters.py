"""The two adapters that ship with the first release: a DoRA and a MixLoRA, trained briefly on three small tasks.

    python -m minilora_hub.training.first_adapters --method mixlora --out model_cards/smollm2-135m-mixlora

The tasks are chosen so that a reader sees the difference at once: the base answers in prose, the adapters with exactly
the date, the number or the JSON record. Names, cities and years of the test items never occur in training.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NAMES = "Maria Tom Aisha Liam Chen Sofia Omar Ines Jonas Priya Mateo Freya Kofi Hana Diego Nora Ivan Leila Hugo Amara"
CITIES = "Lisbon Oslo Nairobi Lima Kyoto Prague Dakar Quito Porto Turin Leeds Riga Accra Hanoi Malmo Izmir Bergen Tunis"
JOBS = "baker teacher nurse pilot carpenter chemist farmer painter lawyer plumber"
MONTHS = "January February March April May June July August September October November December"
ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth "
    "sixteenth seventeenth eighteenth nineteenth twentieth twenty-first twenty-second twenty-third twenty-fourth "
    "twenty-fifth twenty-sixth twenty-seventh twenty-eighth"
)
UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
HELD_OUT = 5
"""Every fifth name, city and year, and every number that it divides, is for testing only."""


def number_in_words(number: int) -> str:
    """An integer from 0 to 9999 in English words."""
    if number < 20:
        return UNITS.split()[number]
    if number < 100:
        tens, rest = divmod(number, 10)
        return TENS.split()[tens - 2] + (f"-{UNITS.split()[rest]}" if rest else "")
    size, word = (1000, "thousand") if number >= 1000 else (100, "hundred")
    head, rest = divmod(number, size)
    joint = " and " if rest and (size == 100 or rest < 100) else " "
    return f"{UNITS.split()[head]} {word}" + (f"{joint}{number_in_words(rest)}" if rest else "")


def _pick(rng: random.Random, values: list[Any], test: bool) -> Any:
    return rng.choice([value for i, value in enumerate(values) if (i % HELD_OUT == 0) == test])


def make_item(rng: random.Random, test: bool) -> dict[str, str]:
    """One task item: its task, prompt and completion. Test items use entities that training items never do."""
    task = rng.choice(["date", "number", "record"])
    if task == "date":
        months, ordinals = MONTHS.split(), ORDINALS.split()
        day, month, year = rng.randrange(28), rng.randrange(12), _pick(rng, list(range(1950, 2050)), test)
        spoken = rng.choice(
            [
                f"the {ordinals[day]} of {months[month]} {year}",
                f"{months[month]} {day + 1}, {year}",
                f"{day + 1} {months[month]} {year}",
            ]
        )
        return {
            "task": task,
            "prompt": f"Write this date as YYYY-MM-DD: {spoken}",
            "completion": f"{year}-{month + 1:02}-{day + 1:02}",
        }
    if task == "number":
        number = _pick(rng, list(range(20, 10000)), test)
        return {
            "task": task,
            "prompt": f"Write this number in digits: {number_in_words(number)}",
            "completion": str(number),
        }
    record = {
        "name": _pick(rng, NAMES.split(), test),
        "age": rng.randint(18, 80),
        "city": _pick(rng, CITIES.split(), test),
        "job": rng.choice(JOBS.split()),
    }
    sentence = rng.choice(
        [
            "{name} is a {age}-year-old {job} from {city}.",
            "In {city} lives {name}, a {job}, who is {age} years old.",
            "{name}, {age}, works as a {job} in {city}.",
        ]
    )
    return {
        "task": task,
        "prompt": f"Write a JSON record with name, age, city and job: {sentence.format(**record)}",
        "completion": json.dumps(record),
    }


def make_items(count: int, test: bool, seed: int) -> list[dict[str, str]]:
    """`count` items; the same for the same arguments."""
    rng = random.Random(seed)  # noqa: S311  (data, not secrets)
    return [make_item(rng, test) for _ in range(count)]


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


def train(recipe: Recipe, out: Path, base: str = "embedded") -> dict[str, Any]:
    """Train, measure against the base, and write the folder as it would be published.

    Args:
        recipe: what to train and how.
        out: the folder.
        base: the base, as `resolve_base` takes it.

    Returns:
        The facts that are also written to ``training.json``.
    """
    import torch
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from minilora_hub import DoraConfig, DoraForCausalLM, MixLoraConfig, MixLoraForCausalLM
    from minilora_hub.bases import resolve_base

    resolved = resolve_base(base)
    classes = {"dora": (DoraConfig, DoraForCausalLM), "mixlora": (MixLoraConfig, MixLoraForCausalLM)}
    config_class, model_class = classes[recipe.method]
    tokenizer = AutoTokenizer.from_pretrained(resolved.path)
    padded_left = AutoTokenizer.from_pretrained(resolved.path, padding_side="left")
    model = model_class.from_base(base, config_class(**recipe.adapter), seed=recipe.seed)
    test_items = make_items(recipe.test_items, True, recipe.seed + 1)
    facts: dict[str, Any] = {"recipe": asdict(recipe), "parameters": model.num_adapter_parameters()}
    facts["exact_match_before"] = exact_match(model, padded_left, test_items)

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
    facts["train_seconds"] = round(time.perf_counter() - started)
    facts["loss"] = [[entry["step"], round(entry["loss"], 4)] for entry in trainer.state.log_history if "loss" in entry]

    for parameter in model.adapter_parameters().values():  # half the bytes; measured after the cast
        if parameter.dim() > 1 or recipe.method == "mixlora":
            parameter.data = parameter.data.to(torch.bfloat16)
    model.eval()
    facts["exact_match_after"] = exact_match(model, padded_left, test_items)
    # A published configuration names the real repo; the fingerprint says which weights it was trained on.
    model.config.base_model_name_or_path = resolved.hub_id or base
    model.save_pretrained(out, tokenizer=tokenizer)
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(out / "trainer", ignore_errors=True)
    return facts


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


def exact_match(model: Any, tokenizer: Any, items: list[dict[str, str]], batch_size: int = 25) -> dict[str, float]:
    """Share of items whose greedy answer is exactly the completion, per task. The tokenizer must pad on the left."""
    import torch

    right: dict[str, list[bool]] = {}
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        chats = [[{"role": "user", "content": item["prompt"]}] for item in batch]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            answers = model.generate(**inputs, max_new_tokens=48, do_sample=False)
        texts = tokenizer.batch_decode(answers[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for item, text in zip(batch, texts, strict=True):
            right.setdefault(item["task"], []).append(text.strip() == item["completion"])
    return {task: round(sum(hits) / len(hits), 3) for task, hits in sorted(right.items())}


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=RECIPES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder that is written")
    parser.add_argument("--steps", type=int, help="default: the recipe's")
    arguments = parser.parse_args()
    recipe = RECIPES[arguments.method]
    if arguments.steps:
        recipe = Recipe(**(asdict(recipe) | {"steps": arguments.steps}))
    print(json.dumps(train(recipe, arguments.out), indent=2))


if __name__ == "__main__":
    main()
