"""Long runs on a tiny base: what is measured at a checkpoint is what that checkpoint's adapter does."""

from __future__ import annotations

import json
import math

import pytest
import torch
from evidence import long_report, long_runs, routers
from evidence.long_runs import Length, load, norms
from tiny_training import write_base

from minilora_hub.remote_code.adapter_files import ADAPTER_FILE, read_adapter


def test_norms_are_of_all_layers_together():
    values = {"a.lora_A": torch.tensor([3.0, 0.0]), "b.lora_A": torch.tensor([[4.0]]), "a.magnitude": torch.ones(4)}
    assert norms(values) == {"lora_A": 5, "magnitude": 2}


def test_a_checkpoint_with_other_tensors_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a.lora_A": torch.ones(2)}, tmp_path / "trainable.safetensors")
    parameters = {"a.lora_A": torch.zeros(2), "a.lora_B": torch.zeros(2)}
    with pytest.raises(
        ValueError, match=r"trainable\.safetensors: other tensors than the model trains: \{'a\.lora_B'\}"
    ):
        load(parameters, tmp_path / "trainable.safetensors")
    assert parameters["a.lora_A"].tolist() == [0, 0]


@pytest.mark.slow
def test_the_last_point_is_the_saved_adapter(tmp_path, monkeypatch):
    """Norms, losses and log of a run agree with what its folder holds, and the table shows them."""
    from evidence.measure import write_data

    monkeypatch.setitem(routers.SETTINGS, "base", str(write_base(tmp_path / "base")))
    monkeypatch.setattr(long_report, "FOLDER", tmp_path / "results")
    write_data(tmp_path / "data")
    length = Length(steps=4, rows=2, points=2, items=2, windows=1)
    result = long_runs.measured("mixdora", tmp_path, length, 0)
    assert [point["step"] for point in result["points"]] == [0, 2, 4]
    first, _, last = result["points"]
    saved = read_adapter(tmp_path / "adapters" / "long-mixdora-seed0-steps4-rows2" / ADAPTER_FILE)
    for leaf in ("lora_A", "lora_B", "magnitude", "router"):
        square = sum(float((value.double() ** 2).sum()) for name, value in saved.items() if name.endswith(leaf))
        assert last["norms"][leaf] == pytest.approx(math.sqrt(square), rel=1e-5)
    assert first["norms"]["lora_B"] == 0 < last["norms"]["lora_B"] == last["moved"]["lora_B"]
    model = routers.loaded(tmp_path / "adapters" / "long-mixdora-seed0-steps4-rows2")
    from evidence.routing_measures import encoded, read

    from minilora_hub.bases.resolving import resolve_base
    from minilora_hub.evaluation.tasks.registry import TASKS
    from minilora_hub.training.models import load_tokenizer

    items = [item for task in routers.TASKS for item in TASKS[task].items("test", 2)]
    tokenizer = load_tokenizer(resolve_base(routers.SETTINGS["base"]))
    assert last["losses"] == pytest.approx(read(model, encoded(items, tokenizer)).losses, abs=1e-4)
    assert last["losses"] != first["losses"]
    assert len(result["loss"]) == len(result["gradient_norm"]) == 4

    (tmp_path / "results").mkdir()
    (tmp_path / "results" / length.file("mixdora", 0)).write_text(json.dumps(result))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in long_report.report().splitlines()
            if line.startswith("| MixDoRA")]  # fmt: skip
    assert [row[1] for row in rows] == ["0", "2", "4"]
    assert float(rows[-1][2]) == pytest.approx(sum(result["loss"]) / 4, abs=6e-4)
    assert float(rows[-1][4]) == pytest.approx(sum(last["losses"]) / 8, abs=6e-4)
    long_report.draw(tmp_path / "long.png")
    assert (tmp_path / "long.png").stat().st_size > 10_000
