"""What the Hub reads of a card: the front matter of README.md, and `.eval_results/*.yaml`.

The front matter makes the repo searchable (as an adapter of its base, with its method as a tag) and shows the measured
numbers beside the card. Results on a benchmark that is registered on the Hub go to its leaderboard, too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump

from minilora_hub.adapter_folder.results import Results
from minilora_hub.formatting import visible

TAGS = {
    "mixlora": ["minilora", "mixlora", "lora", "mixture-of-experts", "adapter"],
    "dora": ["minilora", "dora", "lora", "adapter"],
    "lora": ["minilora", "lora", "adapter"],
}
HUB_DATASET = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
PROCEDURAL = "procedural"
"""Stands for the dataset of tasks that are made by a program and lie in no repo."""


def card_data(results: Results, name: str, stock: bool = False) -> ModelCardData:
    """The metadata of an adapter called `name`, in PEFT's layout if `stock`.

    What nobody knows is left out: the Hub knows no "unknown".
    """
    fields: dict[str, Any] = {
        "base_model": results.base.id,
        "base_model_relation": "adapter",
        "library_name": "peft" if stock else "transformers",
        "pipeline_tag": "text-generation",
        "tags": TAGS[results.method],
        "license": results.license,
        "license_name": results.license_name,
        "license_link": results.license_link,
        "language": list(results.language) or None,
        "datasets": [name for name in results.datasets if HUB_DATASET.fullmatch(name)] or None,
    }
    if results.evaluation:
        fields |= {"model_name": name, "eval_results": [_eval_result(row) for row in results.evaluation]}
    shown: dict[str, Any] = {name: visible(v) if isinstance(v, str) else v for name, v in fields.items()}
    return ModelCardData(**shown)


def _eval_result(row: Any) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=row.dataset or PROCEDURAL,
        dataset_name=visible(row.task),
        dataset_config=_slug(row.task),  # rows of one type and configuration would be put together under one name
        metric_type=_slug(row.metric),
        metric_name=visible(row.metric),
        metric_value=row.value,
    )


def _slug(text: str) -> str:
    return re.sub(r"\W+", "_", text.strip().lower())


def front_matter(results: Results, name: str, stock: bool = False) -> str:
    """The metadata as the head of a README."""
    return f"---\n{card_data(results, name, stock).to_yaml(line_break=chr(10))}\n---"


def eval_results_files(folder: Path) -> dict[str, str]:
    """`.eval_results/<dataset>.yaml` for results on benchmarks that are registered on the Hub.

    Only an evaluation that names both a dataset and its `benchmark_task` counts; other tasks are in the front matter.

    Args:
        folder: with results.json.

    Returns:
        ``{path in the repo: content}``, empty where there is nothing to say.
    """
    entries: dict[str, list[EvalResultEntry]] = {}
    for row in Results.load(folder).evaluation:
        if row.dataset and row.benchmark_task and HUB_DATASET.fullmatch(row.dataset):
            entry = EvalResultEntry(dataset_id=row.dataset, task_id=row.benchmark_task, value=row.value)
            entries.setdefault(row.dataset, []).append(entry)
    return {
        f".eval_results/{dataset.replace('/', '__')}.yaml": yaml_dump(eval_result_entries_to_yaml(rows))
        for dataset, rows in sorted(entries.items())
    }
