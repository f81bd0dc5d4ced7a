"""What a run leaves is built and checked for publishing as it is."""

from __future__ import annotations

import json

import pytest
from tiny_training import SHORT

from minilora_hub.publish.checks.folder import check_folder
from minilora_hub.publish.push.build import build
from minilora_hub.recording.document import RECORDING_FILE
from minilora_hub.training.run import train

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:PiSSA changes the base weights"),
]


@pytest.mark.parametrize("method", ["lora", "mixdora", "rslora", "pissa", "loftq"])
def test_a_result_passes_every_check(method, base, rows, tmp_path):
    facts = {"license": "apache-2.0", "language": ("en",), "about_data": "Colours of numbered items."}
    train(tmp_path / "out", method=method, base=base, data=rows, **SHORT, **facts)
    built = build(
        tmp_path / "out", tmp_path / "built", repo_id="me/adapter", base_id="HuggingFaceTB/tiny", base_model=base
    )
    assert built.recorded.reused, built.recorded.reason
    assert built.method == ("mixlora" if method == "mixdora" else "lora")
    problems = check_folder(built.folder, base_exists=lambda *_: True, base_license=lambda *_: "apache-2.0")
    assert [problem for problem in problems if problem.blocking] == []
    names = {file.path for file in built.files}
    assert not names & {"training.yaml", "loss.csv", "run.json"}
    assert not [name for name in names if name.startswith("checkpoints")]
    card = (built.folder / "README.md").read_text()
    assert "Colours of numbered items." in card
    assert base not in card
    results = json.loads((built.folder / "results.json").read_text())
    assert results["base"]["id"] == "HuggingFaceTB/tiny"
    assert base not in json.dumps(results)
    if method == "loftq":
        assert "loaded in NF4" in card
    # What the run recorded is what a build without it finds: the adapter as it was saved, on the base as it is.
    recorded = (tmp_path / "out" / RECORDING_FILE).read_bytes()
    (tmp_path / "out" / RECORDING_FILE).unlink()
    again = build(
        tmp_path / "out", tmp_path / "again", repo_id="me/adapter", base_id="HuggingFaceTB/tiny", base_model=base
    )
    assert not again.recorded.reused
    assert (tmp_path / "out" / RECORDING_FILE).read_bytes() == recorded
    assert again.files == built.files


def test_what_cannot_be_recorded_is_told_and_the_run_is_kept(base, rows, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("not enough memory:\nyou tried to allocate 12 GB")

    monkeypatch.setattr("minilora_hub.recording.reference.load_base", fail)
    result = train(tmp_path / "out", method="dora", base=base, data=rows, **SHORT)
    assert result.notes == (
        "the reference logits could not be recorded, so a push will record them: "
        "not enough memory: you tried to allocate 12 GB",
    )
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "out" / RECORDING_FILE).exists()


def test_what_cannot_be_published_is_not_recorded(base, rows, tmp_path):
    train(tmp_path / "out", method="vera", base=base, data=rows, **{**SHORT, "r": 8})
    assert not (tmp_path / "out" / RECORDING_FILE).exists()


def test_a_run_can_leave_it_out(base, rows, tmp_path):
    train(tmp_path / "out", method="lora", base=base, data=rows, record=False, **SHORT)
    assert not (tmp_path / "out" / RECORDING_FILE).exists()
