"""Which base and adapters a Space shows: all on the Hub, for one base, and readable from there."""

from __future__ import annotations

import os
import re
import tempfile
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, errors

from minilora_hub.adapter_folder.code_references import CONFIGURATION_FILES, code_references
from minilora_hub.adapter_folder.folders import read_json
from minilora_hub.adapter_folder.names import OUR_CONFIG, PEFT_CONFIG, WEIGHTS
from minilora_hub.bases.resolving import EMBEDDED
from minilora_hub.errors import AdapterError, PublishError
from minilora_hub.hub.errors import ATTEMPTS, FAILURES, explain, patiently, status_of
from minilora_hub.quiet import quiet_libraries

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find_models(
    api: HfApi, adapters: tuple[str, ...], base: str | None, has_token: bool, dry_run: bool
) -> tuple[str, tuple[str, ...]]:
    """Return the base, and which of base and adapters are public."""
    named: dict[str, str] = {}
    public, attempts = [], 1 if dry_run else ATTEMPTS
    for name in adapters:
        found = _adapter(api, name, attempts, dry_run)
        if found is None:
            continue
        open_to_all, its_base = found
        if open_to_all:
            public.append(name)
        elif not has_token:
            raise PublishError(f"{name} is private: the Space reads it only with a token: pass --secret HF_TOKEN, too")
        named[name] = its_base
    if base is None and adapters:
        bases = sorted(set(named.values()))
        if len(bases) != 1:
            told = "; ".join(f"{name}: {its_base}" for name, its_base in named.items()) or "the Hub was not asked"
            raise AdapterError(f"the adapters must be for one base ({told}): name it with --base")
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
            if dry_run and status_of(error) is None:
                return base, tuple(public)
            raise PublishError(explain(error, base, "looking at the base")) from None
        if not (info.private or info.gated):
            public.append(base)
    return base, tuple(public)


def _adapter(api: HfApi, name: str, attempts: int, dry_run: bool) -> tuple[bool, str] | None:
    """Return whether an adapter is public, and the base it names; None in a dry run that does not reach the Hub."""
    try:
        info = patiently(lambda: api.model_info(name), attempts)
        files = {file.rfilename for file in info.siblings or []}
        config = next((file for file in (PEFT_CONFIG, OUR_CONFIG) if file in files), None)
        configurations = [file for file in CONFIGURATION_FILES if file in files]
        if config is None or WEIGHTS not in files:
            raise AdapterError(f"{name} holds no adapter: {WEIGHTS} and {OUR_CONFIG} (or {PEFT_CONFIG}) must be there")
        with tempfile.TemporaryDirectory(prefix="minilora-space-") as folder, quiet_libraries():
            for file in configurations:
                patiently(partial(api.hf_hub_download, name, file, revision=info.sha, local_dir=folder), attempts)
            for reference in code_references(Path(folder), files):
                if reference.problem:  # the Space itself would refuse it when it starts
                    raise AdapterError(f"{name} cannot be shown: {reference}")
            named = read_json(Path(folder, config)).get("base_model_name_or_path")
    except errors.HFValidationError:
        raise AdapterError(f"adapter {name!r}: no id on the Hub, which reads owner/name") from None
    except errors.RepositoryNotFoundError:
        raise AdapterError(f"{name} is not on the Hub, or this token may not see it: publish it first") from None
    except FAILURES as error:
        if dry_run and status_of(error) is None:
            return None
        raise PublishError(explain(error, name, f"looking at {name}")) from None
    return not (info.private or info.gated), str(named)
