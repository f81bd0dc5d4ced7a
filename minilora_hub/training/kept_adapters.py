"""LoRA adapters that stay active under the one that is trained: O-LoRA's earlier tasks.

A linear computes W x + sum of the kept updates + the new one, with the kept ones frozen inside of the new one's module.
What is saved is their exact sum: A and B are concatenated, so the ranks add up, and the result is an ordinary LoRA that
contains all of them. A quantized base stays as it is, since nothing is merged into it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from minilora_hub.adapter_folder.reading import UNKNOWN
from minilora_hub.errors import TrainingError
from minilora_hub.formats.combine import Combination, combine
from minilora_hub.remote_code.attach import replace_module
from minilora_hub.training.parent_adapter import FoundAdapter
from minilora_hub.training.swapped_modules import bare_base, frozen_modules

if TYPE_CHECKING:
    from minilora_hub.bases.skeleton import BaseSource


class KeptAdapters:
    """Frozen LoRA adapters inside of a model; `remove` takes them out again.

    Args:
        model: the adapted model.
        adapters: LoRA adapters in PEFT's format, on the same base.
        base: the base.

    Attributes:
        factors: (path of a linear, A), for each linear of each adapter.

    Raises:
        TrainingError: one is no LoRA, is there twice, or was trained on other weights of the base.
    """

    def __init__(self, model: Any, adapters: Sequence[FoundAdapter], base: BaseSource) -> None:
        self.model, self.adapters = model, tuple(adapters)
        self.factors: list[tuple[str, torch.Tensor]] = []
        for found in adapters:
            known, here = found.base_fingerprint, model.config.base_fingerprint
            if found.source.method != "lora":
                raise TrainingError(f"keep={found.name!r}: it is a {found.source.method}, only LoRA can be kept")
            if UNKNOWN not in (known, here) and known != here:
                raise TrainingError(
                    f"keep={found.name!r}: it was trained on a base with fingerprint {known}, and the base "
                    f"{base.name!r} has {here}"
                )
        if len({found.sha256 for found in adapters}) < len(adapters):
            raise TrainingError(f"keep={[found.name for found in adapters]}: two are the same adapter: leave one out")
        self._plain: dict[str, Any] = {}
        with bare_base(model) as bare:
            for found in adapters:
                for path, module in frozen_modules(bare, found.source, base).items():
                    if not hasattr(module, "update"):
                        raise TrainingError(f"keep={found.name!r}: {path} are stacked experts, which cannot be kept")
                    self._plain.setdefault(path, module.base_layer)
                    self.factors.append((path, module.update.lora_A.detach()))
                    replace_module(bare, path, module)
            kept = {path: bare.get_submodule(path) for path in self._plain}
        # Leaving the block has put the model's own modules, over the plain linears, back where it has any.
        self._under = {site.path for site in model.sites} & kept.keys()
        for path in self._under:
            model.base.get_submodule(path).base_layer = kept[path]

    def remove(self) -> None:
        """Take the adapters out of the model."""
        for path, layer in self._plain.items():
            if path in self._under:
                self.model.base.get_submodule(path).base_layer = layer
            else:
                replace_module(self.model.base, path, layer)

    def add_to(self, out: Path, base: str, base_revision: str | None) -> None:
        """Replace the LoRA in a folder by the sum of it and the kept ones.

        Args:
            out: the folder of the LoRA that was trained.
            base: the base.
            base_revision: its revision on the Hub.
        """
        with TemporaryDirectory(dir=out, prefix=".kept-") as scratch:
            new = Path(scratch, "new")
            new.mkdir()
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                shutil.copyfile(out / name, new / name)
            folders = [*(found.source.folder for found in self.adapters), new]
            how = Combination("cat", (1.0,) * len(folders))
            combine(folders, Path(scratch, "sum"), how, base=base, base_revision=base_revision)
            for name in ("adapter_model.safetensors", "adapter_config.json"):
                shutil.move(Path(scratch, "sum", name), out / name)
