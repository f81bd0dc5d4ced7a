"""Read an adapter strictly from its folder, for every command that computes with it.

`import`, `export`, `compare`, `eval`, `combine` and `experts` reject the same adapters with the same messages, because
all of them call `read_adapter` or the readers that it calls. `info`, which needs no base, calls
`settings.check_settings`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minilora_hub.adapter_folder.folders import AdapterFolder
from minilora_hub.adapter_folder.reading import read_ours
from minilora_hub.bases.skeleton import BaseSource
from minilora_hub.errors import AdapterError

if TYPE_CHECKING:
    import torch


def read_adapter(source: AdapterFolder, base: BaseSource) -> tuple[Any, dict[str, torch.Tensor], list[Any]]:
    """Read an adapter in our format, or LoRA or DoRA in PEFT's, and check it against its base.

    Args:
        source: its folder.
        base: its base, which is not changed.

    Returns:
        The arguments of `remote_code.attach.build_modules`: the configuration, ``{name: tensor}``, and the sites.

    Raises:
        AdapterError: a setting is not supported, or a tensor is missing, surplus, misshapen or not finite; the
            message names it. Or the folder is in another format, which `minilora import` reads.
    """
    if source.dialect == "minilora":
        return read_ours(source, base)
    if source.dialect == "peft":
        from minilora_hub.formats.peft_conversion import read_peft_lora  # needs torch, which not every caller does

        return read_peft_lora(source, base)
    raise AdapterError(f"{source.name!r} is in the format {source.dialect!r}, which `minilora import` reads")
