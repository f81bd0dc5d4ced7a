"""Adapters that a link names, ``?adapter=owner/name``: fetched, put onto the page's base, forgotten again. No Gradio.

Whoever writes such a link decides what this server fetches, so everything about it is bounded: only a public repo on
the Hub, only small files that hold no code, only an adapter for this base, loaded by our installed classes; a few are
kept. The list of files and the configuration are looked at first: weights are fetched only if they are those of an
adapter of a known kind, fit the base, and are no larger than the configuration makes them.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from minilora_hub.adapter_folder.code_references import CONFIGURATION_FILES, code_references
from minilora_hub.adapter_folder.folders import describe_folder, read_configuration
from minilora_hub.adapter_folder.names import TEMPLATE, WEIGHTS
from minilora_hub.adapter_folder.reading import our_config
from minilora_hub.adapter_folder.results import RESULTS_FILE
from minilora_hub.bases.resolving import ResolvedBase
from minilora_hub.compare.engine import Column, CompareEngine
from minilora_hub.demo.adapters.cards import AdapterCard, read_card
from minilora_hub.demo.adapters.link_sizes import most_bytes
from minilora_hub.demo.runs.limits import whole_number
from minilora_hub.errors import AdapterError, MiniLoraError
from minilora_hub.hub.errors import FAILURES, explain, patiently
from minilora_hub.hub.plain_files import require_plain_files, require_plain_names, require_true_sizes
from minilora_hub.quiet import quiet_libraries

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
FETCHED_FIRST = (*CONFIGURATION_FILES, RESULTS_FILE)
"""No Python file among them: what is not there cannot run."""
LARGEST_CONFIG = 2**20
PLAIN_NAME = re.compile(r"[\w.-]{1,200}", re.ASCII)

# What a LoRA in PEFT's format may set. Other settings import modules, copy layers or rewrite the base's own weights.
PEFT_SETTINGS = {
    "peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "inference_mode", "r",
    "lora_alpha", "lora_dropout", "target_modules", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias",
    "use_rslora", "use_dora", "init_lora_weights",
}  # fmt: skip
PEFT_INERT = {"megatron_core", "qalora_group_size"}
"""Set in every file, and without effect while the setting that they belong to is not."""


@dataclass(frozen=True)
class Limits:
    """What links may cost: bytes of one adapter's weights, and how many adapters are kept in memory."""

    weight_bytes: int = 200 * 10**6
    kept: int = 8

    @classmethod
    def from_environment(cls) -> Limits:
        """Read MINILORA_LINK_MEGABYTES and MINILORA_LINK_ADAPTERS.

        Raises:
            ValueError: one of them is no whole number of at least 1.
        """
        return cls(
            whole_number("MINILORA_LINK_MEGABYTES", cls.weight_bytes // 10**6) * 10**6,
            whole_number("MINILORA_LINK_ADAPTERS", cls.kept),
        )


class LinkedAdapters:
    """The adapters that links have named, in the bank of the page's engine, under their ids.

    Args:
        engine: the page's engine.
        base: which base that is.
        limits: what they may cost.

    Attributes:
        cards: what is known of those that are kept.
    """

    def __init__(self, engine: CompareEngine, base: ResolvedBase, limits: Limits | None = None) -> None:
        """Start without any; see the class."""
        self._engine, self._base, self.limits = engine, base, limits or Limits()
        self._kept: OrderedDict[str, Column] = OrderedDict()
        self._commits: dict[str, str | None] = {}
        self._blobs: dict[str, dict[str, str | None]] = {}  # name -> {file: git's hash of it}, before it is loaded
        self.cards: dict[str, AdapterCard] = {}
        self._lock = threading.Lock()

    def get(self, name: str) -> Column | None:
        """Return the column of an adapter that is kept; it is then the one used last."""
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
            return self._kept.get(name)

    def fetch(self, name: str, folder: Path) -> None:
        """Fetch an adapter into a folder. It may take long, and computes nothing.

        Raises:
            AdapterError: the name is no id, there is no such public repo, it is no adapter for this base, leads to
                code elsewhere, or is too large. Its weights are not fetched then.
        """
        from huggingface_hub import errors

        check_name(name)
        try:
            repo = _Repo.of(name)
            if WEIGHTS not in repo.sizes:
                raise AdapterError(f"{name} has no {WEIGHTS}: it is no adapter that can be shown here")
            repo.check_size(WEIGHTS, self.limits.weight_bytes)
            repo.fetch(FETCHED_FIRST, folder, LARGEST_CONFIG)
            self._check(name, folder, repo)
            repo.fetch((WEIGHTS,), folder, self.limits.weight_bytes)
            self._blobs[name] = repo.blobs
        except (errors.RepositoryNotFoundError, errors.GatedRepoError):
            raise AdapterError(f"the Hub has no public repo {name}") from None
        except FAILURES as error:
            raise AdapterError(explain(error, name, f"fetching {name}")) from None
        self._commits[name] = repo.commit

    def _check(self, name: str, folder: Path, repo: _Repo) -> None:
        """Refuse what cannot be shown here, by its list of files and its configuration."""
        for reference in code_references(folder, repo.sizes.keys()):  # before a look at the folder, which has no code
            if not reference.own:
                why = "" if reference.problem else ", and a page runs no code of an adapter's"
                raise AdapterError(f"{name} is not loaded: {reference}{why}")
        source = read_configuration(folder)
        check_settings(source.config, peft=source.layout == "peft")
        self._check_base(name, source.base, source.base_fingerprint)
        if source.layout == "auto":
            our_config(describe_folder(folder))
        repo.check_size(WEIGHTS, most_bytes(source.config, self._linears), "its configuration makes it")

    @cached_property
    def _linears(self) -> dict[str, tuple[int, int]]:
        return self._engine.bank.linears

    def load(self, name: str, folder: Path) -> Column:
        """Put an adapter from a folder into the bank, and keep it; the least recently used one goes.

        Raises:
            AdapterError: it is damaged or does not fit, or its files are not what they seem.
        """
        require_plain_files(folder)
        require_true_sizes(folder)
        try:
            column = self._engine.load(name, folder)
        except MiniLoraError:
            raise
        except Exception as error:  # a stranger's files: whatever is wrong with them, the page goes on
            message = " ".join(str(error).replace(f"{folder}/", "").split())[:300]
            raise AdapterError(f"{name} cannot be loaded: {message}") from None
        if has_other_template(self._blobs.pop(name, {}), self._engine.tokenizer):
            column = replace(column, detail=f"{column.detail}, with the base's chat template, not its own")
        commit = self._commits.pop(name, None)
        self.cards[name] = read_card(name, folder, repo=name if commit else None, revision=commit)
        with self._lock:
            self._kept[name] = column
            for oldest in list(self._kept)[: -self.limits.kept]:
                with suppress(ValueError):  # one that is answering somebody goes next time
                    self._engine.unload(oldest)
                    del self._kept[oldest], self.cards[oldest]
        return column

    @property
    def base_name(self) -> str | None:
        """The base's id on the Hub, if it has one."""
        return self._base.hub_id

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the base's checkpoint."""
        from minilora_hub.remote_code.adapter_files import base_fingerprint

        return base_fingerprint(str(self._base.path))

    def _check_base(self, name: str, named: str | None, fingerprint: str) -> None:
        from minilora_hub.remote_code.adapter_files import UNKNOWN

        ours, found = self._base, self.fingerprint
        known = UNKNOWN not in (fingerprint, found)
        if known and fingerprint == found:
            return
        if named not in (ours.hub_id, ours.name):
            shown = repr(str(named)[:100]) if named else "a base that it does not name"
            raise AdapterError(f"{name} is for {shown}, but this page runs {ours.hub_id or ours.path.name!r}")
        if known:
            raise AdapterError(
                f"{name} was trained on other weights of {named} than this page runs: its answers would be wrong"
            )


def check_name(name: str) -> None:
    """Refuse what is no id on the Hub, above all a path on this server.

    Raises:
        AdapterError: it is none.
    """
    if not REPO_ID.fullmatch(name) or ".." in name or "--" in name or name.endswith((".git", ".", "-")):
        raise AdapterError(f"?adapter={name[:60]!r} is no id on the Hub: it must read owner/name")


def check_settings(config: dict[str, Any], *, peft: bool) -> None:
    """Refuse settings that cost more than they say, or reach beyond the adapter's own tensors.

    Raises:
        AdapterError: one of them does.
    """
    for field in ("rank_pattern", "alpha_pattern"):
        # They are regular expressions, and one can be written that is never done.
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict) or not all(PLAIN_NAME.fullmatch(str(key)) for key in patterns):
            raise AdapterError(f"{field}: a page reads plain names of modules only")
    if not peft:
        return
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not all(PLAIN_NAME.fullmatch(str(target)) for target in targets):
        raise AdapterError("target_modules: a page reads a list of plain names of modules only")
    start, bias = config.get("init_lora_weights"), config.get("bias")
    if start not in (None, True, False, "gaussian") or bias not in (None, "none"):
        raise AdapterError("init_lora_weights or bias changes the base's own weights: a page does not load that")
    for name, value in config.items():
        if value and name not in PEFT_SETTINGS | PEFT_INERT:
            raise AdapterError(f"{name[:60]} is set in adapter_config.json: a page loads plain LoRA and DoRA only")


def has_other_template(blobs: dict[str, str | None], tokenizer: Any) -> bool:
    """Whether a repo brings a chat template that is not the base's: a page does not run the templates of strangers.

    Args:
        blobs: ``{file: git's hash of its content}`` of the repo.
        tokenizer: the base's.
    """
    text = str(tokenizer.chat_template or "").encode()
    return blobs.get(TEMPLATE) not in (None, hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest())  # noqa: S324


@dataclass(frozen=True)
class _Repo:
    """A public repo at one commit, asked for without a token.

    Attributes:
        name: its id.
        commit: the commit.
        sizes: {path: bytes} of its files, as the Hub lists them; None where it does not say.
        blobs: {path: git's hash of its content}; None where it does not say.
    """

    name: str
    commit: str | None
    sizes: dict[str, int | None]
    blobs: dict[str, str | None]

    @classmethod
    def of(cls, name: str) -> _Repo:
        """Ask the Hub which files there are."""
        info = patiently(lambda: _api().model_info(name, files_metadata=True), attempts=2)
        sizes = {file.rfilename: file.size for file in info.siblings or []}
        require_plain_names(sizes, name)
        blobs = {file.rfilename: file.blob_id for file in info.siblings or []}
        return cls(name, info.sha, sizes, blobs)

    def check_size(self, file: str, limit: int, why: str = "through a link this page fetches") -> None:
        """Refuse a file that is too large, or of unknown size."""
        size = self.sizes[file]
        if size is None or size > limit:
            told = "of unknown size" if size is None else f"{size / 1e6:,.1f} MB"
            raise AdapterError(f"{file} of {self.name} is {told}; {why} at most {limit / 1e6:g} MB")

    def fetch(self, files: Iterable[str], folder: Path, limit: int) -> None:
        """Fetch those of `files` that there are, each of at most `limit` bytes; none if one is larger."""
        there = [file for file in files if file in self.sizes]
        for file in there:
            self.check_size(file, limit)
        with quiet_libraries():
            for file in there:
                patiently(self._fetching(file, folder), attempts=2)

    def _fetching(self, file: str, folder: Path) -> Callable[[], object]:
        return lambda: _api().hf_hub_download(self.name, file, revision=self.commit, local_dir=folder)


def _api() -> Any:
    """A client that shows nobody's token: what is fetched is public."""
    from huggingface_hub import HfApi

    return HfApi(token=False)


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a folder for one adapter's files, which are copied into memory and then removed."""
    return tempfile.TemporaryDirectory(prefix="minilora-linked-")
