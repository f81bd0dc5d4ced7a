"""Folders as they are published, and results with everything and with nothing in them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

from minilora_hub.adapter_folder.code import remote_code_files
from minilora_hub.adapter_folder.results import Base, DataSource, Evaluation, Part, Results, RouterUse, Sample, Training
from minilora_hub.adapter_folder.verification import Verification

BASE = Base("org/base", "0123456789abcdef", "sha256:" + "ab" * 32, 134_515_008, "apache-2.0")
CONFIG = {
    "model_type": "mixlora",
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "expert_r": 4,
    "expert_alpha": None,
    "routing_strategy": "top_k",
    "router_aux_loss_coef": 0.001,
    "target_modules": "all-linear",
}


def full_results(**changes) -> Results:
    """Every field filled in."""
    results = Results(
        method="mixlora",
        base=BASE,
        parameters=4_032_000,
        share=0.02997,
        license="apache-2.0",
        language=("en",),
        datasets=("org/dates",),
        training=Training(
            data=(DataSource("dates", "Dates to rewrite.", 1600, 76_543, "apache-2.0"),),
            hyperparameters={"learning rate": 1e-3, "batch size": 8, "schedule": "cosine"},
            steps=200,
            seconds=1264,
            hardware="CPU: 2 cores",
            libraries={"torch": "2.13.0", "transformers": "5.23.0"},
            loss=tuple((10 * step, round(0.5 / step, 4)) for step in range(1, 21)),
        ),
        evaluation=(
            Evaluation("dates", "exact match", 0.933, 0.0, 45, (0.8214, 0.9771), "minilora eval DIR"),
            Evaluation("numbers", "exact match", 0.605, 0.0, 38, (0.4465, 0.7443), "minilora eval DIR"),
        ),
        samples=(
            Sample("Write this date as YYYY-MM-DD: 5 May 1990", "The date is:\n\n    May 5th, 1990", "1990-05-05"),
            Sample("Write a JSON record", "Sure! Here is one | of many:", '{"name": "Maria", "age": 31}'),
        ),
        decoding="greedy, at most 48 new tokens",
        expert_load=tuple((0.25, 0.25 + layer / 100, 0.25 - layer / 100, 0.25) for layer in range(12)),
    )
    return dataclasses.replace(results, **changes)


def evaluated_results() -> Results:
    """What `minilora eval` writes: the base with examples, parts, perplexity, routers by task."""
    command = "minilora eval DIR --base org/base --few-shot 4"
    exact = Evaluation(
        "Dates | spoken",
        "exact match",
        0.8125,
        0.0125,
        512,
        (0.7751, 0.8444),
        command,
        note="all of its text",
        base_interval=(0.0061, 0.0259),
        few_shot=4,
        few_shot_value=0.2344,
        few_shot_interval=(0.2001, 0.2719),
        parts=(
            Part("difficulty 1", 200, 0.9251, (0.8812, 0.9543), 0.0301, 0.4512),
            Part("difficulty 2", 312, 0.7402, None, 0.0011, None),
        ),
    )
    general = Evaluation(
        "general text", "perplexity", 21.3456, 18.7654, 64, (19.1, 23.6), command, lower_is_better=True
    )
    load = full_results().expert_load
    assert load is not None
    other = tuple((0.7, 0.1, 0.1, 0.1) for _ in load)
    return full_results(
        evaluation=(exact, general),
        router=(
            RouterUse("Dates | spoken", 12_345, load, tuple(0.5 + layer / 100 for layer in range(12))),
            RouterUse("numbers in $x_{", 678, other, (0.25,) * 12),
        ),
    )


def minimal_results(method: str = "dora") -> Results:
    """Nothing is known but the method and the base."""
    return Results(method=method, base=Base("org/base"))


def card_folder(folder: Path, results: Results, config: dict | None = None) -> Path:
    """What a card is rendered from; no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    results.save(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    for name, path in remote_code_files().items():
        shutil.copyfile(path, folder / name)
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_verification(folder: Path) -> None:
    """A verification.json with the hashes of what lies in the folder; its logits are not from a model."""
    hashed = [path for path in sorted(folder.rglob("*")) if path.name not in ("README.md", "verification.json")]
    Verification(
        prompts=((1, 2, 3),),
        top_tokens=((7, 8),),
        top_logits=((1.5, 0.25),),
        tolerance=1e-4,
        sha256={path.relative_to(folder).as_posix(): sha256(path) for path in hashed if path.is_file()},
        base_fingerprint="unknown",
        dtype="float32",
    ).save(folder)


def clean_folder(folder: Path, method: str = "mixlora", family: str = "llama", **changes) -> Path:
    """A folder as it is published, that no check has anything to say about; tiny. `changes` go to the configuration."""
    import torch
    from tiny import CAUSAL_LM, fill_adapter, tiny_base, tiny_config
    from tiny_stand_ins import byte_tokenizer

    from minilora_hub.publish.card.render import write_card

    base = tiny_base(family, vocab_size=259, eos_token_id=None, bos_token_id=None)
    size = sum(parameter.numel() for parameter in base.parameters())
    config = tiny_config(method, base_model_name_or_path=BASE.id, base_model_revision="0" * 40, **changes)
    model = CAUSAL_LM[method].from_base(base, config)
    fill_adapter(model)
    for parameter in model.adapter_parameters().values():
        parameter.data = parameter.data.to(torch.float32)
    model.save_pretrained(folder, tokenizer=byte_tokenizer())
    count = model.num_adapter_parameters()
    full_results(
        method="dora" if method == "dora" else "mixlora",
        base=dataclasses.replace(BASE, revision="0" * 40, fingerprint=None, parameters=size),
        parameters=count,
        share=round(count / size, 5),
        expert_load=None if method == "dora" else full_results().expert_load,
    ).save(folder)
    write_card(folder, repo_id="author/adapter")
    write_verification(folder)
    return folder
