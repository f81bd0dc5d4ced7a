"""The base an adapter is measured on when it is published, and the name it is published under."""

from __future__ import annotations

import re
from typing import Any

from minilora_hub.bases import EMBEDDED, ResolvedBase, resolve_base
from minilora_hub.embedded import HUB_ID
from minilora_hub.errors import AdapterError, BaseModelError
from minilora_hub.publish.sources import Source

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
LARGE = 8e9
"""Bytes of base weights up to which logits are computed in float32, whatever the checkpoint's dtype."""


def published_base(source: Source, base_id: str | None) -> tuple[str, str | None]:
    """Return the Hub id and the revision of the base that the published configuration names.

    Args:
        source: the adapter.
        base_id: the id to publish; default: the one the adapter names. An alias becomes the id it stands for.

    Raises:
        AdapterError: the adapter names no base, or a folder, which nobody else has.
    """
    named = base_id or source.base
    if named == EMBEDDED:
        return HUB_ID, None
    if not named:
        raise AdapterError("base_model_name_or_path is missing: say which base it is for, base_id= (--base-id)")
    if not HUB_NAME.fullmatch(named):
        raise AdapterError(
            f"base {named!r} is a folder of this machine, which nobody else has: "
            "pass the id of the same weights on the Hub, base_id= (--base-id)"
        )
    return named, source.base_revision if named == source.base else None


def load_base(
    source: Source, base_id: str, base_model: str | None, token: str | None, progress: bool
) -> tuple[Any, ResolvedBase, str, str]:
    """Load the base that the adapter was trained on, on the processor.

    Args:
        source: the adapter.
        base_id: the base's id on the Hub.
        base_model: another place to load it from: ``"embedded"``, a folder or an id.
        token: for private and gated bases.
        progress: show bars while it is fetched.

    Returns:
        The model, where it came from, its fingerprint, and the dtype it is computed in.

    Raises:
        AdapterError: its weights are not those the adapter was trained on.
        BaseModelError: it cannot be found or loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from minilora_hub.remote_code.adapter_files import UNKNOWN, base_fingerprint

    name = base_model or source.base or base_id
    revision = source.base_revision if name == source.base else None
    resolved = resolve_base(name, revision=revision, token=token, progress=progress)
    fingerprint = base_fingerprint(str(resolved.path))
    trained_on = source.base_fingerprint
    if UNKNOWN not in (trained_on, fingerprint) and trained_on != fingerprint:
        hint = f', e.g. "{EMBEDDED}"' if base_id == HUB_ID and not resolved.embedded else ""
        raise AdapterError(
            f"base {name!r} has fingerprint {fingerprint}, but the adapter was trained on {trained_on}: "
            f"pass the base it was trained on, base_model= (--base){hint}"
        )
    size = sum(path.stat().st_size for path in resolved.path.glob("*.safetensors"))
    dtype: Any = torch.float32 if size <= LARGE else "auto"
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a push shows its own
    try:
        model = AutoModelForCausalLM.from_pretrained(resolved.path, dtype=dtype)
    except (OSError, ValueError) as error:
        raise BaseModelError(f"base {name!r} cannot be loaded: {error}") from error
    finally:
        if bar:
            logging.enable_progress_bar()
    return model.eval(), resolved, fingerprint, str(model.dtype).removeprefix("torch.")
