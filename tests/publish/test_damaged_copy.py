"""What `verify` changes in a copy of the weights: a few bytes, without the weights in memory."""

from __future__ import annotations

import tracemalloc
from contextlib import contextmanager

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minilora_hub.errors import AdapterError
from minilora_hub.publish.verify import damage
from minilora_hub.publish.verify.damage import copy_for_damage, damages

MISSING, NO_NUMBER = "a missing tensor", "a NaN"


@contextmanager
def damaged(copy, change):
    before = copy.read_bytes()
    offset, content = change
    copy.write_bytes(before[:offset] + content + before[offset + len(content) :])
    yield
    copy.write_bytes(before)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "config.json").write_text("{}")
    return tmp_path / "adapter"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_one_name_or_one_value_differs_in_turns(folder, tmp_path, dtype):
    """Everything else stays, the size of the file too."""
    sizes = {"b.lora_A": (3, 2), "a.empty": (0, 2), "ü": (5,)}
    tensors = {name: torch.ones(size).to(dtype) for name, size in sizes.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"b.lora_A": "b.lora_A"})
    original = (folder / "adapter_model.safetensors").read_bytes()
    (tmp_path / "scratch").mkdir()
    copy = copy_for_damage(folder, tmp_path / "scratch")
    found = damages(folder / "adapter_model.safetensors")
    with damaged(copy, found[MISSING]):
        renamed = load_file(copy)
        assert renamed.keys() ^ tensors.keys() == {"b.lora_A", "b.lora_a"}
        assert copy.stat().st_size == len(original)
        with safe_open(copy, "pt") as file:
            assert file.metadata() == {"b.lora_A": "b.lora_A"}
    with damaged(copy, found[NO_NUMBER]):
        poisoned = load_file(copy)
        assert poisoned["b.lora_A"].float().isnan().any()
        assert torch.equal(poisoned["ü"].float(), tensors["ü"].float())
        assert poisoned.keys() == tensors.keys()
    assert copy.read_bytes() == original == (folder / "adapter_model.safetensors").read_bytes()
    assert (copy.parent / "config.json").is_file()


def test_the_weights_are_never_in_memory_and_copied_once(folder, tmp_path):
    """200 MB of them take less than one."""
    save_file({f"layers.{n}": torch.zeros(2_500_000) for n in range(20)}, folder / "adapter_model.safetensors")
    size = (folder / "adapter_model.safetensors").stat().st_size
    (tmp_path / "scratch").mkdir()
    tracemalloc.start()
    try:
        found = damages(folder / "adapter_model.safetensors")
        copy_for_damage(folder, tmp_path / "scratch")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size > 2e8
    assert peak < 1e6
    assert sum(len(content) for _, content in found.values()) < 100
    assert sum(path.stat().st_size for path in (tmp_path / "scratch").iterdir()) == size + 2


def test_a_disk_without_room_and_weights_without_values(folder, tmp_path, monkeypatch):
    save_file({"a": torch.ones(3)}, folder / "adapter_model.safetensors")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(AdapterError, match=r"GB are needed, 0\.00 GB are free"):
        copy_for_damage(folder, tmp_path)
    save_file({"a": torch.ones(0)}, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="holds no tensor"):
        damages(folder / "adapter_model.safetensors")
    assert damage.NOT_FINITE == b"\xff" * 8
