"""Check the base and the adapters of a Space: all on the Hub, for one base, and readable by the Space."""

from __future__ import annotations

import os
import re
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, errors

from minilora_hub.adapter_folder.code_references import CONFIGURATION_FILES, code_references
from minilora_hub.adapter_folder.folders import read_json
from minilora_hub.adapter_folder.names import OUR_CONFIG, PEFT_CONFIG, WEIGHTS
from minilora_hub.bases.resolving import EMBEDDED
from minilora_hub.errors import AdapterError, PublishError
from minilora_hub.hub.errors import ATTEMPTS, FAILURES, explain, patiently, status_of
from minilora_hub.quiet import quiet_libraries

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class _Adapter(NamedTuple):
    """An adapter on the Hub: whether it is public, and the base that it names."""

    public: bool
    base: str


def find_models(
    api: HfApi, adapters: tuple[str, ...], base: str | None, has_token: bool, dry_run: bool
) -> tuple[str, tuple[str, ...]]:
    """Return the base, and which of base and adapters are public. A dry run also works if the Hub is unreachable.

    Raises:
        AdapterError: an adapter is not on the Hub or cannot be shown, or the adapters have different bases.
        PublishError: a model is private and the Space has no token, or the Hub cannot be reached.
        ValueError: `base` is neither an id nor ``"embedded"``.
    """
    attempts = 1 if dry_run else ATTEMPTS
    looked_at = {name: _read_adapter(api, name, attempts, dry_run) for name in adapters}
    found = {name: adapter for name, adapter in looked_at.items() if adapter is not None}
    public = [name for name, adapter in found.items() if adapter.public]
    private = [name for name in found if name not in public]
    if private and not has_token:
        raise PublishError(f"{private[0]} is private: the Space needs a token to read it: pass --secret HF_TOKEN, too")
    if base is None and adapters:
        bases = sorted({adapter.base for adapter in found.values()})
        if len(bases) != 1:
            named = "; ".join(f"{name}: {adapter.base}" for name, adapter in found.items())
            raise AdapterError(
                f"the adapters must be for one base ({named or 'the Hub was not reached'}): name it with --base"
            )
        base = bases[0]
    base = base or EMBEDDED
    if base != EMBEDDED:
        if os.path.isdir(base) or not HUB_ID.fullmatch(base):
            raise ValueError(f"base={base!r}: a Space needs the id of a model on the Hub, or 'embedded'")
        try:
            info = patiently(lambda: api.model_info(base), attempts)
        except errors.RepositoryNotFoundError:
            raise AdapterError(f"the base {base} is not on the Hub, or this token may not see it") from None
        except FAILURES as error:
            if not (dry_run and status_of(error) is None):
                raise PublishError(explain(error, base, "looking at the base")) from None
        else:
            public += [] if info.private or info.gated else [base]
    return base, tuple(public)


def _read_adapter(api: HfApi, name: str, attempts: int, dry_run: bool) -> _Adapter | None:
    """Read an adapter's metadata; None in a dry run that does not reach the Hub."""
    try:
        info = patiently(lambda: api.model_info(name), attempts)
        files = {file.rfilename for file in info.siblings or []}
        config = next((file for file in (PEFT_CONFIG, OUR_CONFIG) if file in files), None)
        if config is None or WEIGHTS not in files:
            raise AdapterError(f"{name} holds no adapter: {WEIGHTS} and {OUR_CONFIG} (or {PEFT_CONFIG}) must be there")
        with tempfile.TemporaryDirectory(prefix="minilora-space-") as folder, quiet_libraries():
            for file in files.intersection(CONFIGURATION_FILES):
                patiently(partial(api.hf_hub_download, name, file, revision=info.sha, local_dir=folder), attempts)
            for reference in code_references(Path(folder), files):
                if reference.problem:  # the Space would refuse it when it starts
                    raise AdapterError(f"{name} cannot be shown: {reference}")
            base = str(read_json(Path(folder, config)).get("base_model_name_or_path"))
    except errors.HFValidationError:
        raise AdapterError(f"adapter {name!r}: must be an id on the Hub, owner/name") from None
    except errors.RepositoryNotFoundError:
        raise AdapterError(f"{name} is not on the Hub, or this token may not see it: publish it first") from None
    except FAILURES as error:
        if dry_run and status_of(error) is None:
            return None
        raise PublishError(explain(error, name, f"looking at {name}")) from None
    return _Adapter(not (info.private or info.gated), base)
