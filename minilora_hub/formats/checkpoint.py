"""Write transformers checkpoints one shard at a time, so that only one is in memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from minilora_hub.adapter_folder.folders import write_json
from minilora_hub.errors import AdapterError

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
ROOM = 2**20  # bytes for everything that is not a tensor


def write_shards(folder: Path, parts: Iterable[dict[str, torch.Tensor]], count: int) -> None:
    """Write each part as one shard, and the index.

    Args:
        folder: an existing folder.
        parts: ``{name: tensor}``, `count` of them; each is released before the next is requested.
        count: number of parts, which is in the names of the files.
    """
    places: dict[str, str] = {}
    size = 0
    iterator: Iterator[dict[str, torch.Tensor]] = iter(parts)
    for number in range(1, count + 1):
        tensors = next(iterator)
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        write_safetensors(folder / name, tensors)
        places.update(dict.fromkeys(tensors, name))
        size += sum(tensor.nbytes for tensor in tensors.values())
        del tensors
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": places})


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file tensor by tensor, without a second copy of them in memory."""
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)  # save_file creates a file that only its owner may read


def require_space(out: str | Path, size: int) -> None:
    """Raise AdapterError if the disk of `out` has less than `size` bytes free."""
    place = Path(out).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < size + ROOM:
        raise AdapterError(f"out={str(out)!r}: {size / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")


def write_card(folder: Path, title: str, text: str, base: str | None, tags: list[str]) -> None:
    """Write a model card that describes how the checkpoint was made.

    Args:
        folder: the folder to write to.
        title: its heading.
        text: description of the checkpoint.
        base: the base's id on the Hub; None for a local folder.
        tags: its tags.
    """
    from huggingface_hub import ModelCardData

    metadata = ModelCardData(
        base_model=base,
        base_model_relation="finetune",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*tags, "minilora-export"],
    )
    body = f"""# {title}

{text}

Base: {f"`{base}`" if base else "a local folder"}. The licences of the base and of the adapter apply here, too.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this/repo")
```
"""
    (folder / "README.md").write_text(f"---\n{metadata.to_yaml()}\n---\n\n{body}", encoding="utf-8", newline="\n")
