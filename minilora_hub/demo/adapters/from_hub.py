"""Download and load adapters from the Hub that a link (``?adapter=owner/name``) or the picker requests. No Gradio.

Any visitor can request any adapter, so requests are restricted: only public repos, small files without code, and
adapters for this page's base, loaded by the installed classes. The file list and the configuration are checked first.
The weights are downloaded only if the adapter has a known method, fits the base, and its file is no larger than the
configuration implies.
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
"""The files that are downloaded. Python files are not among them, so they cannot run."""
LARGEST_CONFIG = 2**20


class LinkedAdapters:
    """A bounded cache of adapters from the Hub, in the bank of the page's engine, by id.

    Args:
        engine: the page's engine.
        base: its base.
        limits: maximum size of one adapter, and maximum number of cached adapters.
    """

    def __init__(self, engine: CompareEngine, base: ResolvedBase, limits: PageLimits | None = None) -> None:
        self._engine, self._base, self.limits = engine, base, limits or PageLimits()
        self._kept: dict[str, tuple[Column, AdapterCard]] = {}  # least recently used first
        self._lock = threading.Lock()

    def get(self, name: str) -> Column | None:
        """Return the column of a cached adapter, and mark it as most recently used."""
        with self._lock:
            if name not in self._kept:
                return None
            self._kept[name] = self._kept.pop(name)
            return self._kept[name][0]

    def card(self, name: str) -> AdapterCard | None:
        """Return the card of a cached adapter."""
        kept = self._kept.get(name)
        return kept and kept[1]

    def fetch(self, name: str, folder: Path) -> PublicRepo:
        """Download an adapter into a folder, without loading it. This may take long.

        Raises:
            AdapterError: the name is not an id, there is no such public repo, it holds no adapter for this base, is
                too large, or needs code. The weights are not downloaded then.
        """
        from huggingface_hub import errors

        check_name(name)
        limit = self.limits.link_megabytes * 10**6
        try:
            repo = PublicRepo.find(name)
            if WEIGHTS not in repo.sizes:
                raise AdapterError(f"{name} has no {WEIGHTS}: it is not an adapter that can be shown here")
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
        for reference in code_references(
            folder, repo.sizes.keys()
        ):  # before anything else: the code was not downloaded
            if not reference.own:
                why = "" if reference.problem else ", and the page runs no code of an adapter"
                raise AdapterError(f"{repo.name} is not loaded: {reference}{why}")
        source = read_configuration(folder)
        check_settings(source.config, peft=source.layout == "peft")
        self._check_base(repo.name, source.base, source.base_fingerprint)
        if source.layout == "auto":
            our_config(describe_folder(folder))
        bound = most_bytes(source.config, self._engine.bank.linears)
        repo.check_size(WEIGHTS, bound, "its configuration implies")

    def load(self, name: str, folder: Path, repo: PublicRepo | None = None) -> Column:
        """Load an adapter from a folder into the bank, and unload the least recently used one if needed.

        Args:
            name: its name on the page.
            folder: its files.
            repo: the repo that they come from, if any.

        Raises:
            AdapterError: it is damaged, does not fit the base, or a file's header declares a wrong size.
        """
        require_plain_files(folder)
        require_true_sizes(folder)
        try:
            column = self._engine.load(name, folder)
        except MiniLoraError:
            raise
        except Exception as error:  # invalid files from a repo must not stop the page
            message = " ".join(str(error).replace(f"{folder}/", "").split())[:300]
            raise AdapterError(f"{name} cannot be loaded: {message}") from None
        if repo and has_other_template(repo.blobs, self._engine.tokenizer):
            column = replace(column, detail=f"{column.detail}, with the base's chat template, not its own")
        card = read_card(name, folder, repo.name if repo else None, repo.commit if repo else None)
        with self._lock:
            self._kept[name] = column, card
            for oldest in list(self._kept)[: -self.limits.link_adapters]:
                with suppress(ValueError):  # it is in use: unload it next time
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
            shown = repr(str(named)[:100]) if named else "an unnamed base"
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
        """Read the list of files from the Hub."""
        info = patiently(lambda: _api().model_info(name, files_metadata=True), attempts=2)
        files = info.siblings or []
        require_plain_names([file.rfilename for file in files], name)
        sizes, blobs = ({f.rfilename: getattr(f, what) for f in files} for what in ("size", "blob_id"))
        return cls(name, info.sha, sizes, blobs)

    def check_size(self, file: str, limit: float, why: str = "from a link this page downloads") -> None:
        """Raise AdapterError if a file is too large, or its size is unknown."""
        size = self.sizes[file]
        if size is None or size > limit:
            shown = "of unknown size" if size is None else f"{size / 1e6:,.1f} MB"
            raise AdapterError(f"{file} of {self.name} is {shown}; {why} at most {limit / 1e6:g} MB")

    def fetch(self, files: Iterable[str], folder: Path, limit: float) -> None:
        """Download those of `files` that exist; raise before any download if one is larger than `limit` bytes."""
        there = [file for file in files if file in self.sizes]
        for file in there:
            self.check_size(file, limit)
        with quiet_libraries():
            for file in there:
                get = partial(_api().hf_hub_download, self.name, file, revision=self.commit, local_dir=folder)
                patiently(get, attempts=2)


def _api() -> Any:
    """Return a client without a token, because only public repos may be read."""
    from huggingface_hub import HfApi

    return HfApi(token=False)
