"""Write what the Hub reads: the front matter of README.md, and `.eval_results/*.yaml`.

The front matter makes the repo searchable (as an adapter of its base, with its method as a tag) and shows the measured
numbers beside the card. Results on a benchmark that is registered on the Hub also appear on its leaderboard.
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
"""The dataset of tasks that a program generates."""


def card_data(results: Results, name: str, stock: bool = False) -> ModelCardData:
    """Return the metadata of an adapter called `name`, in PEFT's layout if `stock`. Unknown fields are left out."""
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
        dataset_config=_slug(row.task),  # the client merges rows of one type and configuration
        metric_type=_slug(row.metric),
        metric_name=visible(row.metric),
        metric_value=row.value,
    )


def _slug(text: str) -> str:
    return re.sub(r"\W+", "_", text.strip().lower())


def front_matter(results: Results, name: str, stock: bool = False) -> str:
    """Return the metadata as the front matter of a README."""
    return f"---\n{card_data(results, name, stock).to_yaml(line_break=chr(10))}\n---"


def eval_results_files(folder: Path) -> dict[str, str]:
    """Return the files `.eval_results/<dataset>.yaml`, for results on benchmarks that are registered on the Hub.

    They hold evaluations with both a dataset and its `benchmark_task`; other tasks are in the front matter.

    Args:
        folder: with results.json.

    Returns:
        ``{path in the repo: content}``.
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
