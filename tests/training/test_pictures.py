"""The examples of the docs for pictures: `minilora train`, and TRL's SFTTrainer on a model that sees."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from PIL import Image
from tiny_processors import write_base

from minilora_hub.publish.push.build import build
from minilora_hub.publish.verify.verify import verify

COLOURS = ("red", "green", "blue", "black")
SECTION = (Path(__file__).parents[2] / "docs" / "train.md").read_text().split("## Pictures with texts")[1]


@pytest.mark.slow
def test_the_tutorial_of_the_docs(run_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_base("AutoModelForImageTextToText", tmp_path / "base")
    rows, commands = (re.search(rf"```{kind}\n(.*?)```", SECTION, re.DOTALL)[1] for kind in ("jsonl", "bash"))
    Path("rows.jsonl").write_text(rows)
    for name in re.findall(r"\w+\.png", rows):
        Image.new("RGB", (20, 20), "orange").save(name)
    done = run_command(*commands.replace("org/vision-base", "./base").split()[1:], "--max-steps", 2)
    assert done.returncode == 0, done.stderr
    assert "2 rows, 1 held out" in done.stderr
    assert "2 steps" in done.stdout
    build("my-adapter", "built", repo_id="ana/x", base_id="org/base", license="mit", base_model="base")
    report = verify("built", base_model="./base", trust_remote_code=True, progress=False)
    assert report.ok, report


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing`:FutureWarning")
def test_the_example_of_the_docs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_base("AutoModelForImageTextToText", tmp_path / "base")
    rows = [
        {
            "images": [Image.new("RGB", (20, 20), colour)],
            "prompt": [{"role": "user", "content": "Colour?"}],
            "completion": [{"role": "assistant", "content": colour}],
        }
        for colour in COLOURS
    ]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    example = re.search(r"```python\n(.*?)```", SECTION, re.DOTALL)[1]
    quick = (
        "max_steps=40, learning_rate=3e-2, per_device_train_batch_size=4, use_cpu=True, bf16=False, report_to='none'"
    )
    example = example.replace("org/vision-base", "base").replace("max_length=None", f"max_length=None, {quick}")
    names: dict = {}
    exec(example, names)
    losses = [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]
    model = names["model"].eval()
    loaded = transformers.AutoModelForImageTextToText.from_pretrained("my-adapter", trust_remote_code=True)
    processor = transformers.AutoProcessor.from_pretrained("my-adapter", trust_remote_code=False)
    for picture in (rows[0]["images"][0], rows[2]["images"][0]):
        content = [{"type": "image", "image": picture}, {"type": "text", "text": "Colour?"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert "pixel_values" in inputs
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert losses[-1] < losses[0] / 1.5
    built = build("my-adapter", "built", repo_id="ana/x", base_id="org/base", license="mit", base_model="base")
    assert "pipeline_tag: image-text-to-text" in (built.folder / "README.md").read_text()
    assert (built.folder / "processor_config.json").is_file()
