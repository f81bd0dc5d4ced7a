"""What a run leaves is built and checked for publishing as it is."""

from __future__ import annotations

import json

import pytest
from tiny_training import SHORT

from minilora_hub.publish.build import build
from minilora_hub.publish.checks import check_folder
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
