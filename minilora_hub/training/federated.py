"""Federated training without its transport: what the server keeps, and what a client does in a round.

The server holds an adapter. In each round every client continues from it on rows of its own, with `train` as anywhere
else, and the mean of the clients' adapters (see `formats.averaging`) takes its place. On the server's disk there is
only the mean. The transport is in `integrations.flower`.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from minilora_hub.adapter_folder.folders import count_values
from minilora_hub.adapter_folder.names import OUR_CONFIG, PEFT_CONFIG, WEIGHTS
from minilora_hub.adapter_folder.results import RESULTS_FILE, DataSource, Results, Training
from minilora_hub.errors import TrainingError
from minilora_hub.quiet import quiet_libraries
from minilora_hub.training.parent_adapter import complete_settings
from minilora_hub.training.recipes import OURS
from minilora_hub.training.run import record_logits, train
from minilora_hub.training.settings import RECIPE_FIELDS, TrainingSettings, read_yaml
from minilora_hub.whole_folders import require_free, whole_folder

if TYPE_CHECKING:
    import torch

CLIENTS_DATA = "rows of the clients"
DOCUMENTS = (OUR_CONFIG, PEFT_CONFIG, RESULTS_FILE)
"""Files that, with the weights, make a folder that a training can continue from."""
SENT = {*RECIPE_FIELDS, "base", "base_revision", "learn", "skip_bad_rows"} - {"adapter", "init", "budget", "report_to"}
"""Settings that the server chooses for all clients."""


@dataclass(frozen=True)
class Answer:
    """What a client sends at the end of a round: {name: tensor}, its training rows, its steps and its last loss."""

    tensors: dict[str, torch.Tensor]
    rows: int
    steps: int
    loss: float


@dataclass(frozen=True)
class Round:
    """A finished round.

    Attributes:
        asked: the number of clients that were asked.
        clients: how many answered.
        rows: their training rows.
        steps: of the client with the most.
        loss: the mean of their last training losses, weighted by their rows.
        residual: what was lost when the mean was brought back to the adapter's rank; see `mean_of_adapters`.
    """

    asked: int
    clients: int
    rows: int
    steps: int
    loss: float
    residual: float


class FederatedServer:
    """The server's side, a context: begins with a fresh adapter or an existing one, and writes the mean of each round.

    Args:
        out: an empty or new folder. From the first round on it is an adapter folder like any other.
        config: a YAML file of settings, as of `train`.
        **given: settings that override the file's.

    Raises:
        TrainingError: a setting is wrong, or has no meaning for a federated training.
    """

    def __init__(self, out: str | Path, config: str | Path | None = None, **given: Any) -> None:
        self.out = Path(out).expanduser()
        require_free(self.out)
        said = read_yaml(Path(config).expanduser()) if config else {}
        self.settings = complete_settings(said, given | {"data": (CLIENTS_DATA,)})
        _check(self.settings)
        self.rounds: list[Round] = []
        self._began = time.monotonic()
        self._scratch = TemporaryDirectory(prefix="minilora-federated-")
        self._folder = Path(self._scratch.name)
        with quiet_libraries():
            self._begin()

    def __enter__(self) -> FederatedServer:
        """Return itself; at the end of the block the adapter that it began with is removed."""
        return self

    def __exit__(self, *error: object) -> None:
        self._scratch.cleanup()

    def _begin(self) -> None:
        """Write the adapter that the first round starts from."""
        from minilora_hub.bases.end_tokens import end_token_ids
        from minilora_hub.bases.resolving import resolve_base
        from minilora_hub.training import outputs
        from minilora_hub.training.models import base_generation_config, build_trainee, load_tokenizer

        settings = self.settings
        base = resolve_base(settings.base, revision=settings.base_revision, progress=False)
        tokenizer = load_tokenizer(base)
        trainee, self.notes = build_trainee(settings, base)
        outputs.list_ends(trainee.model, end_token_ids(tokenizer, base_generation_config(base)))
        trainee.model.save_pretrained(self._folder, tokenizer=tokenizer)
        self._base = outputs.base_facts(settings, base, trainee)
        self._parent = trainee.parent.described(settings.learn) if trainee.parent else None
        self._results().save(self._folder)

    @property
    def sent(self) -> dict[str, str | bytes]:
        """What clients need beside the tensors, as JSON: settings, and the adapter's documents (bytes: not logged)."""
        said = {name: value for name, value in self.settings.to_dict().items() if name in SENT and value is not None}
        files = [self._folder / name for name in DOCUMENTS]
        documents = {file.name: file.read_text(encoding="utf-8") for file in files if file.is_file()}
        return {"settings": json.dumps(said), "documents": json.dumps(documents).encode()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return {name: tensor} of the adapter as it is now."""
        from minilora_hub.remote_code.adapter_files import read_adapter

        return read_adapter(self._folder / WEIGHTS)

    def add_round(self, answers: Sequence[Answer], asked: int) -> dict[str, torch.Tensor]:
        """Average the clients' adapters, weighted by their rows, and write the mean.

        Args:
            answers: of the clients that answered, at least one.
            asked: the number of clients that were asked.

        Raises:
            AdapterError, ValueError: an answer does not fit the adapter, or holds NaN. Nothing is written then.
        """
        from minilora_hub.formats.averaging import mean_of_adapters
        from minilora_hub.remote_code.adapter_files import check_tensors, write_adapter

        own = self.tensors()
        for number, answer in enumerate(answers):
            what = f"the answer of client {number}"
            check_tensors(what, answer.tensors, {name: tensor.shape for name, tensor in own.items()})
            for name, tensor in own.items():
                if (given := answer.tensors[name].dtype) != tensor.dtype:
                    raise ValueError(f"{what}: {name} is {given}, must be {tensor.dtype}")
        weights = [answer.rows for answer in answers]
        means, residual = mean_of_adapters([answer.tensors for answer in answers], weights)
        loss = sum(answer.rows * answer.loss for answer in answers) / sum(weights)
        steps = max(answer.steps for answer in answers)
        self.rounds.append(Round(asked, len(answers), sum(weights), steps, loss, residual))
        write_adapter(self._folder / WEIGHTS, means)
        self._results().save(self._folder)
        if self._folder != self.out:  # the first round
            with whole_folder(self.out) as folder:
                shutil.copytree(self._folder, folder, dirs_exist_ok=True)
            self._folder = self.out
        return means

    def finish(self) -> tuple[str, ...]:
        """Record the reference logits of the result, so that a push need not load the base; returns notes."""
        return (*self.notes, *record_logits(self.out, self.settings))

    def _results(self) -> Results:
        from minilora_hub.training import outputs

        settings, rounds = self.settings, self.rounds
        method, parameters = outputs.METHODS[settings.method], count_values(self._folder / WEIGHTS)
        assert self._base.parameters
        ends = [sum(one.steps for one in rounds[: number + 1]) for number in range(len(rounds))]
        federated = {
            "federated rounds": len(rounds),
            "clients in each round": ", ".join(f"{one.clients} of {one.asked}" for one in rounds) or None,
            "mean of the clients": "of their updates B A, weighted by rows, by SVD back to the rank",
            "relative residual of the SVD in each round": ", ".join(f"{one.residual:.3g}" for one in rounds) or None,
        }
        about = settings.about_data or "They were not sent to the server, which received the trained adapters."
        rows = rounds[-1].rows if rounds else None
        return Results(
            method=method,
            base=self._base,
            parameters=parameters,
            share=round(parameters / self._base.parameters, 6),
            license=settings.license,
            language=settings.language,
            training=Training(
                data=(DataSource(CLIENTS_DATA, description=about, items=rows),),
                hyperparameters={name: value for name, value in federated.items() if value is not None}
                | outputs.hyperparameters(settings, ()),
                steps=sum(one.steps for one in rounds),
                seconds=round(time.monotonic() - self._began, 1),
                libraries=outputs.library_versions(),
                loss=tuple((step, round(one.loss, 5)) for step, one in zip(ends, rounds, strict=True)),
                parent=self._parent,
            ),
        )


def train_client(
    tensors: Mapping[str, torch.Tensor],
    sent: Mapping[str, str | bytes],
    data: str,
    number: int,
    base: str | None = None,
) -> Answer:
    """Train a client's round: continue from the server's adapter on the client's rows.

    Args:
        tensors: of the server's adapter.
        sent: `FederatedServer.sent`.
        data: a file of rows, as of `train`.
        number: of the round, which changes the order of the rows.
        base: the base on this machine. Default: the one that the server names. Its weights must be the same.

    Raises:
        TrainingError: as `train`.
    """
    from minilora_hub.remote_code.adapter_files import read_adapter, write_adapter

    settings = json.loads(sent["settings"])
    if unknown := sorted(settings.keys() - SENT):
        raise TrainingError(
            f"{unknown[0]}={settings[unknown[0]]!r}: not a setting that a server chooses for its clients"
        )
    if base is not None:
        settings |= {"base": base, "base_revision": None}
    settings["seed"] = (settings["seed"] + number) % 2**32
    with TemporaryDirectory(prefix="minilora-client-") as scratch:
        parent, out = Path(scratch, "parent"), Path(scratch, "out")
        parent.mkdir()
        documents = json.loads(sent["documents"])
        for name in DOCUMENTS:
            if name in documents:
                (parent / name).write_text(documents[name], encoding="utf-8")
        write_adapter(parent / WEIGHTS, tensors)
        result = train(out, from_adapter=str(parent), data=data, record=False, progress=False, **settings)
        assert result.loss is not None
        return Answer(read_adapter(out / WEIGHTS), result.plan.rows, result.steps, result.loss)


def _check(settings: TrainingSettings) -> None:
    recipe = settings.recipe
    needs = {
        "method": (settings.method, settings.method in OURS, f"must be one of {', '.join(OURS)}"),
        "objective": (settings.objective, not settings.objective, "leave it out"),
        "keep": (settings.keep, not settings.keep, "leave it out"),
        "budget": (recipe.budget, recipe.budget is None, "leave it out"),
        "init": (recipe.init, recipe.init == "zero", "leave it out"),
        "save_dtype": (recipe.save_dtype, recipe.save_dtype == "float32", "must be float32"),
        "task": (settings.task, settings.task in (None, "text-generation"), "leave it out"),
        "data_split": (settings.data_split, settings.data_split == "train", "leave it out: clients name their rows"),
        "data_revision": (settings.data_revision, not settings.data_revision, "leave it out: clients name their rows"),
        "validation": (recipe.validation, not recipe.validation, "leave it out: rows held out in one round are others"),
        "early_stopping": (recipe.early_stopping, not recipe.early_stopping, "leave it out"),
        "validation_data": (settings.validation_data, not settings.validation_data, "leave it out"),
        "report_to": (recipe.report_to, not recipe.report_to, "leave it out"),
        "target_parameters": (parameters := recipe.adapter.get("target_parameters"), not parameters, "leave it out"),
    }
    for name, (value, holds, need) in needs.items():
        if not holds:
            raise TrainingError(f"{name}={value!r} in a federated training: {need}")
