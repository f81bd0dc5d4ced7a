"""Fetches and loads adapters from the Hub that links (``?adapter=owner/name``) or the picker name. No Gradio.

Anyone can name one, so everything is bounded: public repos only, small files without code, adapters for this page's
base only, loaded by the installed classes. The list of files and the configuration are checked first; the weights are
fetched only if they belong to an adapter of a known kind that fits the base, and are no larger than the configuration
allows.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from minilora_hub.adapter_folder.code_references import CONFIGURATION_FILES, code_references
from minilora_hub.adapter_folder.folders import describe_folder, read_configuration
from minilora_hub.adapter_folder.names import WEIGHTS
from minilora_hub.adapter_folder.reading import our_config
from minilora_hub.adapter_folder.results import RESULTS_FILE
from minilora_hub.bases.resolving import ResolvedBase
from minilora_hub.compare.engine import Column, CompareEngine
from minilora_hub.demo.adapters.cards import AdapterCard, read_card
from minilora_hub.demo.adapters.link_checks import check_name, check_settings, has_other_template, most_bytes
from minilora_hub.demo.runs.limits import PageLimits
from minilora_hub.errors import AdapterError, MiniLoraError
from minilora_hub.hub.errors import FAILURES, explain, patiently
from minilora_hub.hub.plain_files import require_plain_files, require_plain_names, require_true_sizes
from minilora_hub.quiet import quiet_libraries
from minilora_hub.remote_code.adapter_files import UNKNOWN, base_fingerprint

FETCHED_FIRST = (*CONFIGURATION_FILES, RESULTS_FILE)
"""Python files are not among them: what is not fetched cannot run."""
LARGEST_CONFIG = 2**20


class LinkedAdapters:
    """The adapters from the Hub in the bank of the page's engine, under their ids.

    Args:
        engine: the page's engine.
        base: its base.
        limits: bounds for the size of one adapter and for how many are kept.
    """

    def __init__(self, engine: CompareEngine, base: ResolvedBase, limits: PageLimits | None = None) -> None:
        self._engine, self._base, self.limits = engine, base, limits or PageLimits()
        self._kept: dict[str, tuple[Column, AdapterCard]] = {}  # the least recently used one first
        self._lock = threading.Lock()

    def get(self, name: str) -> Column | None:
        """Return the column of an adapter that is kept, and count this as a use."""
        with self._lock:
            if name not in self._kept:
                return None
            self._kept[name] = self._kept.pop(name)
            return self._kept[name][0]

    def card(self, name: str) -> AdapterCard | None:
        """Return the card of an adapter that is kept."""
        kept = self._kept.get(name)
        return kept and kept[1]

    def fetch(self, name: str, folder: Path) -> PublicRepo:
        """Fetch an adapter into a folder. It may take long; nothing is loaded.

        Raises:
            AdapterError: the name is no id, there is no such public repo, or it holds no small adapter for this base,
                or code. Its weights are not fetched then.
        """
        from huggingface_hub import errors

        check_name(name)
        limit = self.limits.link_megabytes * 10**6
        try:
            repo = PublicRepo.find(name)
            if WEIGHTS not in repo.sizes:
                raise AdapterError(f"{name} has no {WEIGHTS}: it is no adapter that can be shown here")
            repo.check_size(WEIGHTS, limit)
            repo.fetch(FETCHED_FIRST, folder, LARGEST_CONFIG)
            self._check(repo, folder)
            repo.fetch((WEIGHTS,), folder, limit)
        except (errors.RepositoryNotFoundError, errors.GatedRepoError):
            raise AdapterError(f"the Hub has no public repo {name}") from None
        except FAILURES as error:
            raise AdapterError(explain(error, name, f"fetching {name}")) from None
        return repo

    def _check(self, repo: PublicRepo, folder: Path) -> None:
        for reference in code_references(folder, repo.sizes.keys()):  # first: the code was not fetched
            if not reference.own:
                why = "" if reference.problem else ", and a page runs no code of an adapter's"
                raise AdapterError(f"{repo.name} is not loaded: {reference}{why}")
        source = read_configuration(folder)
        check_settings(source.config, peft=source.layout == "peft")
        self._check_base(repo.name, source.base, source.base_fingerprint)
        if source.layout == "auto":
            our_config(describe_folder(folder))
        bound = most_bytes(source.config, self._engine.bank.linears)
        repo.check_size(WEIGHTS, bound, "its configuration makes it")

    def load(self, name: str, folder: Path, repo: PublicRepo | None = None) -> Column:
        """Load an adapter from a folder into the bank and keep it; the least recently used one is unloaded.

        Args:
            name: its name on the page.
            folder: its files.
            repo: the repo that they come from, if any.

        Raises:
            AdapterError: it is damaged or does not fit, or its files are not what they claim to be.
        """
        require_plain_files(folder)
        require_true_sizes(folder)
        try:
            column = self._engine.load(name, folder)
        except MiniLoraError:
            raise
        except Exception as error:  # whatever is wrong with files from outside, the page goes on
            message = " ".join(str(error).replace(f"{folder}/", "").split())[:300]
            raise AdapterError(f"{name} cannot be loaded: {message}") from None
        if repo and has_other_template(repo.blobs, self._engine.tokenizer):
            column = replace(column, detail=f"{column.detail}, with the base's chat template, not its own")
        card = read_card(name, folder, repo.name if repo else None, repo.commit if repo else None)
        with self._lock:
            self._kept[name] = column, card
            for oldest in list(self._kept)[: -self.limits.link_adapters]:
                with suppress(ValueError):  # it is answering: it is unloaded next time
                    self._engine.unload(oldest)
                    del self._kept[oldest]
        return column

    @property
    def base_name(self) -> str | None:
        """The base's id on the Hub, if it has one."""
        return self._base.hub_id

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the base's checkpoint."""
        return base_fingerprint(str(self._base.path))

    def _check_base(self, name: str, named: str | None, fingerprint: str) -> None:
        ours = self._base
        known = UNKNOWN not in (fingerprint, self.fingerprint)
        if known and fingerprint == self.fingerprint:
            return
        if named not in (ours.hub_id, ours.name):
            shown = repr(str(named)[:100]) if named else "a base that it does not name"
            raise AdapterError(f"{name} is for {shown}, but this page runs {ours.hub_id or ours.path.name!r}")
        if known:
            raise AdapterError(
                f"{name} was trained on other weights of {named} than this page runs: its answers would be wrong"
            )


@dataclass(frozen=True)
class PublicRepo:
    """A repo on the Hub at one commit, read without a token.

    Attributes:
        name: its id.
        commit: the commit.
        sizes: {path: bytes} of its files; None where the Hub does not say.
        blobs: {path: git's hash of the content}; None where the Hub does not say.
    """

    name: str
    commit: str | None
    sizes: dict[str, int | None]
    blobs: dict[str, str | None]

    @classmethod
    def find(cls, name: str) -> PublicRepo:
        """Ask the Hub for the list of files."""
        info = patiently(lambda: _api().model_info(name, files_metadata=True), attempts=2)
        files = info.siblings or []
        require_plain_names([file.rfilename for file in files], name)
        sizes, blobs = ({f.rfilename: getattr(f, what) for f in files} for what in ("size", "blob_id"))
        return cls(name, info.sha, sizes, blobs)

    def check_size(self, file: str, limit: float, why: str = "through a link this page fetches") -> None:
        """Refuse a file that is too large, or of unknown size."""
        size = self.sizes[file]
        if size is None or size > limit:
            shown = "of unknown size" if size is None else f"{size / 1e6:,.1f} MB"
            raise AdapterError(f"{file} of {self.name} is {shown}; {why} at most {limit / 1e6:g} MB")

    def fetch(self, files: Iterable[str], folder: Path, limit: float) -> None:
        """Fetch those of `files` that exist; none of them if one is larger than `limit` bytes."""
        there = [file for file in files if file in self.sizes]
        for file in there:
            self.check_size(file, limit)
        with quiet_libraries():
            for file in there:
                get = partial(_api().hf_hub_download, self.name, file, revision=self.commit, local_dir=folder)
                patiently(get, attempts=2)


def _api() -> Any:
    """Return a client without a token: what is fetched is public."""
    from huggingface_hub import HfApi

    return HfApi(token=False)
