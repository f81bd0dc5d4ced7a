"""The evidence on federated training, on a tiny base: made, measured and told."""

from __future__ import annotations

import json

import pytest
from evidence import federated
from evidence.plan import TASKS
from tiny_training import write_base

from minilora_hub.evaluation.tasks.registry import write


@pytest.mark.slow
def test_it_is_made_and_measured(tmp_path, monkeypatch):
    base = str(write_base(tmp_path / "base"))
    for split in ("train", "validation"):
        write(tmp_path / "data", (), (split,), 8)
    runs = federated.Runs(tmp_path, rounds=1, steps=4, base=base)
    result = runs.measure(items=2)
    assert 0 < result["residual"][0] < result["apart"][0]
    for found in result["models"].values():
        assert {task: len(exact) for task, exact in found["exact"].items()} == dict.fromkeys(TASKS, 2)
        assert 0 < found["validation_loss"] < 20
    monkeypatch.setattr(federated, "FILE", tmp_path / "federated-result.json")
    assert federated.report() == "This has not been run yet."
    federated.FILE.write_text(json.dumps(result))
    assert f"| mean of B times mean of A | {result['apart'][0]:.3f} |" in federated.report()
