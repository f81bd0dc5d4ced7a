"""Run lm-eval's own tasks with its own library (EleutherAI's harness, 0.4), on the base and any adapter of the bank.

lm-eval prepares prompts, scores and standard errors; it gets the bank's model, all of whose rows have one adapter.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minilora_hub.adapter_folder.results import Evaluation
from minilora_hub.bases.loading import load_base, load_tokenizer
from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.compare.engine import context_length
from minilora_hub.compare.found_adapters import common_base
from minilora_hub.compare.prompting import Prompting, Promptings
from minilora_hub.errors import MissingExtraError
from minilora_hub.evaluation.metrics import DIGITS
from minilora_hub.evaluation.report import command_line
from minilora_hub.evaluation.settings import Adapter, Settings, find_adapters, require_generating
from minilora_hub.remote_code.few_rows import plain_products

if TYPE_CHECKING:
    from minilora_hub.bases.resolving import ResolvedBase

Z = 1.959964
"""Half-width of a 95% interval, in standard errors."""


@dataclass(frozen=True)
class LmEvalReport:
    """The numbers that lm-eval measured.

    Attributes:
        base: the base that was measured.
        fingerprint: of its weights.
        base_parameters: their number.
        models: the bare base (None) and each adapter, with its numbers beside the base's.
    """

    base: ResolvedBase
    fingerprint: str
    base_parameters: int
    models: tuple[tuple[Adapter | None, tuple[Evaluation, ...]], ...]


def measure(
    adapters: Sequence[str | Path],
    tasks: Sequence[str],
    *,
    base: str | Path | None = None,
    count: int | None = None,
    dtype: str = "float32",
    batch_size: int = 8,
    include_path: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> LmEvalReport:
    """Run lm-eval tasks on the base and on adapters.

    Args:
        adapters: folders or Hub ids, all on one base.
        tasks: names of lm-eval's tasks.
        base: that base. Default: the one the adapters name.
        count: the first items of each task only.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"int8"``.
        batch_size: rows of a batch.
        include_path: a folder with custom tasks in lm-eval's format.
        progress: called with a line at each step of loading.

    Raises:
        MissingExtraError: lm-eval is not installed.
        MiniLoraError: the base or an adapter cannot be found or read, or does not fit.
        ValueError: a setting is out of range, or lm-eval knows no such task; nothing is loaded then.
    """
    settings = Settings(tasks=tuple(tasks), count=count, dtype=dtype, batch_size=batch_size)
    if include_path is not None and not include_path.is_dir():
        raise ValueError(f"include_path={str(include_path)!r}: must be a folder with tasks of lm-eval")
    found = find_adapters(adapters)
    require_generating(found)
    resolved, fingerprint = common_base(base, found)
    manager = _manager(include_path)
    for name in settings.tasks:
        if name not in manager.all_tasks:
            raise ValueError(f"lm_eval={name!r}: must be a task that lm-eval knows (lm-eval ls tasks)")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_base(resolved, dtype=dtype, device=device, progress=progress)
    tokenizer = load_tokenizer(resolved)
    bank = AdapterBank(model)
    promptings = Promptings(model, tokenizer)
    promptings_of = {None: promptings.base} | {adapter.name: promptings.of(adapter.folder) for adapter in found}
    for adapter in found:
        bank.load(adapter.name, adapter.folder)
    results: list[dict[tuple[str, str], Evaluation]] = []
    arguments = [part for task in settings.tasks for part in ("--lm-eval", task)]
    arguments += [] if count is None else ["--count", str(count)]
    command = command_line(resolved, arguments, settings)
    for one in (None, *found):
        progress(f"lm-eval: {one.name if one else 'base'}")
        row_of = one.name if one else None
        with plain_products(), _rows_of(bank, row_of, promptings_of[row_of]):
            output = _run(bank.model, promptings_of[row_of].tokenizer, settings, manager)
        results.append(_evaluations(output, command, results[0] if results else {}))
    return LmEvalReport(
        resolved,
        fingerprint,
        sum(parameter.numel() for parameter in model.parameters()),
        tuple((one, tuple(rows.values())) for one, rows in zip((None, *found), results, strict=True)),
    )


def _manager(include_path: Path | None) -> Any:
    """Return lm-eval's registry of tasks."""
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("lm_eval"):
            raise
        raise MissingExtraError("lm_eval", "lm-eval") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=None if include_path is None else str(include_path))


@contextmanager
def _rows_of(bank: AdapterBank, name: str | None, prompting: Prompting) -> Iterator[None]:
    """Run every row of every forward of the bank's model with one adapter, inside the `with` block."""
    with bank.use([name]), ExitStack() as rows:

        def enter(module: Any, args: Any, kwargs: Any) -> None:
            ids = kwargs.get("input_ids")
            ids = args[0] if ids is None else ids
            prompting.known([int(ids.max())])
            rows.enter_context(bank.rows([name] * ids.shape[0]))

        def leave(*_: Any) -> None:
            rows.pop_all().close()

        handles = [
            bank.model.register_forward_pre_hook(enter, with_kwargs=True),
            bank.model.register_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _run(model: Any, tokenizer: Any, settings: Settings, manager: Any) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    language_model = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=settings.batch_size,
        max_length=context_length(model),
    )
    output = simple_evaluate(
        model=language_model,
        tasks=list(settings.tasks),
        limit=settings.count,
        task_manager=manager,
        log_samples=False,
    )
    assert output is not None  # it is None in all but the first of several processes
    return dict(output)


def _evaluations(
    output: dict[str, Any], command: str, base: dict[tuple[str, str], Evaluation]
) -> dict[tuple[str, str], Evaluation]:
    """Return lm-eval's numbers by task and metric, beside the base's."""
    found: dict[tuple[str, str], Evaluation] = {}
    for task, numbers in output["results"].items():
        for key, value in numbers.items():
            metric, _, filter_name = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, float) or not filter_name:
                continue
            error = numbers.get(f"{metric}_stderr,{filter_name}")
            shown = metric if filter_name == "none" else f"{metric} ({filter_name})"
            value, interval = round(value, DIGITS), None
            if isinstance(error, float):
                interval = (round(value - Z * error, DIGITS), round(value + Z * error, DIGITS))
            bare = base.get((task, shown))
            found[task, shown] = Evaluation(
                task=f"lm-eval: {task}",
                metric=shown,
                value=value,
                base_value=bare.value if bare else None,
                n=output.get("n-samples", {}).get(task, {}).get("effective"),
                interval=interval,
                command=command,
                note=f"lm-eval {output.get('lm_eval_version')}, the task as it defines it, without a chat template",
                lower_is_better=not output.get("higher_is_better", {}).get(task, {}).get(metric, True),
                base_interval=bare.interval if bare else None,
            )
    return found
