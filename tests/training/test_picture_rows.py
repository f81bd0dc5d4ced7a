"""Chats with pictures in `minilora train`: read, batched, learned, resumed, saved with the processor, published."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
import transformers
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pictures
from tiny_processors import chat_processor, write_base
from tiny_training import losses, train_until_saved, write_rows
from tiny_training import write_base as write_llama
from torch.nn.functional import cross_entropy

from minilora_hub import DoraConfig, MixLoraConfig
from minilora_hub.errors import BaseModelError, DataError, TrainingError
from minilora_hub.publish.checks.folder import check_folder
from minilora_hub.publish.push.build import build
from minilora_hub.remote_code.modeling_minilora import adapted_class
from minilora_hub.training.data import Row
from minilora_hub.training.picture_rows import PictureEncoder, checked
from minilora_hub.training.pictures import PictureRows
from minilora_hub.training.run import train
from minilora_hub.training.trainer import AdapterTrainer

COLOURS = {"red": (20, 20), "green": (40, 16), "blue": (18, 50), "black": (20, 20)}
PART = {"type": "image"}
QUICK = {"max_steps": 3, "batch_size": 4, "r": 4, "progress": False, "record": False, "learning_rate": 1e-2}
ANSWER = {"role": "assistant", "content": "red"}


def ask(text, *parts):
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}


def rows_of(colour):
    """The same question in three forms."""
    answer = {"role": "assistant", "content": colour}
    return (
        {"images": [f"{colour}.png"], "messages": [ask("Colour?"), answer]},
        {"image": f"{colour}.png", "prompt": "Colour?", "completion": colour},
        {"messages": [ask("Colour?", PART | {"image": f"{colour}.png"}), answer]},
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base that sees, pictures, and rows that name them."""
    folder = tmp_path_factory.mktemp("pictures")
    write_base("AutoModelForImageTextToText", folder / "base")
    for colour, size in COLOURS.items():
        Pictures.new("RGB", size, colour).save(folder / f"{colour}.png")
    Pictures.new("RGB", (8, 8), "red").save(folder / "red.eps")
    (folder / "red.eps").rename(folder / "eps.png")
    Pictures.new("1", (10000, 9000)).save(folder / "large.png")  # 11 kB
    write_rows(folder / "rows.jsonl", [row for colour in COLOURS for row in rows_of(colour)[:2]])
    return folder


def said(place, **changes):
    return QUICK | {"method": "dora", "base": str(place / "base"), "data": str(place / "rows.jsonl")} | changes


@pytest.mark.parametrize("method", ["dora", pytest.param("mixlora", marks=pytest.mark.slow)])
def test_trained_loaded_and_publishable(method, place, tmp_path):
    plans = []
    changes = {"method": method, "max_steps": 40, "learning_rate": 3e-2, "record": True, "license": "mit"}
    changes["on_plan"] = lambda plan, settings: plans.append(plan)
    result = train(tmp_path / "out", **said(place, **changes))
    assert (result.notes, result.skipped) == ((), ())
    assert (plans[0].task, plans[0].rows, plans[0].ends) == ("image-text-to-text", 8, ("#", "<|end|>"))
    curve = losses(tmp_path / "out")
    assert curve[-1] < curve[0] / 1.5
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert loaded.num_adapter_parameters() == plans[0].trainable
    assert any(value.any() for name, value in loaded.adapter_parameters().items() if name.endswith("lora_B"))
    assert transformers.AutoProcessor.from_pretrained(tmp_path / "out").image_processor
    settings = {"repo_id": "me/adapter", "base_id": "org/tiny", "base_model": str(place / "base")}
    built = build(tmp_path / "out", tmp_path / "built", **settings)
    assert built.recorded.reused, built.recorded.reason
    problems = check_folder(built.folder, base_exists=lambda *_: True, base_license=lambda *_: "mit")
    assert [problem for problem in problems if problem.blocking] == []
    assert "pipeline_tag: image-text-to-text" in (built.folder / "README.md").read_text()


@pytest.mark.parametrize("method", ["dora", pytest.param("mixlora", marks=pytest.mark.slow)])
def test_the_loss_is_the_cross_entropy_of_the_answers(method, place, tmp_path):
    """Of chats written by hand, each alone in the model; whole and in micro-batches. A mixture adds its balance."""
    two = {"images": ["red.png", "blue.png"], "messages": [ask("Which?"), ANSWER, ask("Sure?"), ANSWER]}
    data = write_rows(place / "all.jsonl", [*(row for colour in list(COLOURS)[1:] for row in rows_of(colour)), two])
    texts = [[f"<image>Colour?<|end|>{colour}<|end|>"] for colour in list(COLOURS)[1:] for _ in range(3)]
    texts.append(["<image><image>Which?<|end|>red<|end|>", "Sure?<|end|>red<|end|>"])
    names = [[f"{colour}.png"] for colour in list(COLOURS)[1:] for _ in range(3)] + [two["images"]]
    changes = {"data": str(data), "batch_size": 10, "max_steps": 1, "method": method}
    changes |= {"router_aux_loss_coef": 0.5} if method == "mixlora" else {}
    for micro in (10, 5):
        train(tmp_path / str(micro), **said(place, micro_batch_size=micro, **changes))
    config = DoraConfig(r=4) if method == "dora" else MixLoraConfig(r=4)
    model_class = adapted_class("Dora" if method == "dora" else "MixLora", "AutoModelForImageTextToText")
    model = model_class.from_base(str(place / "base"), config)
    processor = transformers.AutoProcessor.from_pretrained(place / "base")
    pictures = [[Pictures.open(place / name) for name in row] for row in names]
    found = []
    for turns, images in zip(texts, pictures, strict=True):
        whole = processor(text="".join(turns), images=images, return_tensors="pt")
        ids, first = whole["input_ids"][0], len(whole["input_ids"][0])
        with torch.no_grad():
            logits = model(**whole).logits[0]
        for turn in reversed(turns):  # each answer with its end, from the last one
            answer = len(processor.tokenizer(turn.partition("<|end|>")[2])["input_ids"])
            span = slice(first - answer, first)
            found.append(cross_entropy(logits[span.start - 1 : span.stop - 1], ids[span], reduction="none"))
            first -= len(processor.tokenizer(turn)["input_ids"])
    expected = torch.cat(found).mean().item()
    if method == "mixlora":
        given = {"text": ["".join(row) for row in texts], "images": pictures}
        batch = processor(**given, padding=True, padding_side="right", return_tensors="pt")
        with torch.no_grad():
            expected += 0.5 * model(**batch, output_router_logits=True).aux_loss.item()
    assert losses(tmp_path / "10") == pytest.approx([expected], abs=1e-5)
    if method == "dora":
        assert losses(tmp_path / "5") == pytest.approx([expected], abs=1e-5)


@pytest.mark.slow
def test_a_stopped_run_continues_to_the_same_bytes(place, tmp_path, monkeypatch):
    settings = said(place, max_steps=4, save_every=2, validation=0.25, batching="length-grouped")
    result = train(tmp_path / "whole", **settings)
    assert result.best_step == 2  # the weights that are saved in the end, from before the run was stopped
    train_until_saved(monkeypatch, tmp_path / "parts", **settings)
    red = (place / "red.png").read_bytes()
    try:
        Pictures.new("RGB", COLOURS["red"], "white").save(place / "red.png")
        with pytest.raises(TrainingError, match="the data has changed"):
            train(tmp_path / "parts", resume=True, progress=False)
    finally:
        (place / "red.png").write_bytes(red)
    assert train(tmp_path / "parts", resume=True, progress=False, record=False).steps == 4
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_a_quantised_base_learns(place, tmp_path):
    """QDoRA: the loss falls on NF4 weights, and the result loads on exact ones."""
    train(tmp_path / "out", **said(place, quantize="nf4", max_steps=8, batch_size=8))
    curve = losses(tmp_path / "out")
    assert curve[-1] < curve[0] - 0.1
    assert "NF4" in json.loads((tmp_path / "out" / "results.json").read_text())["base"]["note"]
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert all(value.isfinite().all() for value in model.adapter_parameters().values())


def test_pictures_in_parquet_are_those_of_the_files(place, tmp_path):
    """As `datasets.Image` stores them, with their bytes in the file."""
    rows = [rows_of(colour)[0] for colour in COLOURS]
    rows = [row | {"images": [str(place / name) for name in row["images"]]} for row in rows]
    turn = {"role": Value("string"), "content": Value("string")}
    stored = Dataset.from_list(rows, Features({"images": List(Image()), "messages": [turn]}))
    stored.map(lambda row: row).to_parquet(tmp_path / "rows.parquet")
    write_rows(tmp_path / "rows.jsonl", rows)
    for name in ("parquet", "jsonl"):
        train(tmp_path / name, **said(place, data=str(tmp_path / f"rows.{name}"), max_steps=2))
    assert losses(tmp_path / "parquet") == losses(tmp_path / "jsonl")


@pytest.mark.parametrize("kind", ["llava", "gemma3", "idefics3", "qwen2_vl"])
@pytest.mark.parametrize("ends", [True, False], ids=["with ends", "without ends"])
def test_a_batch_holds_what_the_processor_makes_of_each_row(kind, ends, place):
    """Rows of one, two and no pictures together; a template without ends gets the tokenizer's after the last answer."""
    processor = chat_processor(kind, ends)
    mark = processor.tokenizer.convert_tokens_to_ids("<|end|>")
    rows = PictureRows.__new__(PictureRows)
    rows.processor, rows._encoder = processor, PictureEncoder(processor, max_length=999, ends=[mark])
    given = [
        rows_of("red")[1],
        {"images": ["green.png", "blue.png"], "messages": [ask("Which of these two?"), ANSWER, ask("And?"), ANSWER]},
        {"messages": [ask("No picture"), ANSWER]},
    ]
    examples = [rows._encoder.encode(replace(checked("x", row), folder=place)) for row in given]
    batch = rows.collate([{"input_ids": e.input_ids, "labels": e.labels, **e.more} for e in examples])
    end = [mark] if ends else []
    red = processor.tokenizer("red")["input_ids"]
    for row, example in enumerate(examples):
        count = len(example.input_ids)
        assert batch["input_ids"][row, :count].tolist() == example.input_ids
        assert batch["attention_mask"][row].tolist() == [1] * count + [0] * (batch["labels"].shape[1] - count)
        learned = [token for token in batch["labels"][row].tolist() if token != -100]
        assert learned == [*(red + end) * (2 if row == 1 else 1), *([] if ends else [mark])]
        turns = json.loads(example.more["turns"])
        pictures = iter(picture["path"] for picture in example.more["pictures"])
        for turn in turns:
            turn["content"] = [p | {"image": next(pictures)} if p["type"] == "image" else p for p in turn["content"]]
        alone = processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt")
        for name in ("input_ids", "token_type_ids", "mm_token_type_ids"):
            if name in alone:
                own = alone[name][0].tolist()
                assert batch[name][row, : len(own)].tolist() == own
        if row == 0:
            pixels = alone["pixel_values"]
            own = batch["pixel_values"][: len(pixels), : pixels.shape[1]]
            assert torch.equal(own, pixels)


def test_rows_of_the_hub_may_not_name_files_of_this_machine(place):
    encoder = PictureEncoder(chat_processor("llava"), max_length=999, ends=[257])
    row = checked("org/rows (train), row 1", {"image": str(place / "red.png"), "prompt": "x", "completion": "y"})
    assert isinstance(row, Row)
    reason = encoder.encode(row).reason
    assert reason.startswith(
        "picture 'red.png': is a file of its own; only pictures within the rows are read from the Hub"
    )


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_vl"])
def test_a_tag_of_another_trainer_is_not_learned_as_text(kind, place):
    encoder = PictureEncoder(chat_processor(kind), max_length=999, ends=[257])
    row = checked("x", {"image": "red.png", "conversations": [{"from": "human", "value": "<image>\nColour?"},
                                                             {"from": "gpt", "value": "red"}]})  # fmt: skip
    assert encoder.encode(replace(row, folder=place)).reason.startswith("contains '<image>': write a part")


def test_pictures_as_bytes_and_templates_with_names(place):
    """As a column of binary has them, without `datasets`."""
    processor = chat_processor("llava")
    processor.chat_template = {"default": processor.chat_template, "other": "x"}
    encoder = PictureEncoder(processor, max_length=999, ends=[257])
    rows = [{"image": content, "prompt": "Colour?", "completion": "red"} for content in (
        (place / "red.png").read_bytes(), "red.png")]  # fmt: skip
    by_bytes, by_name = (encoder.encode(replace(checked("x", row), folder=place)) for row in rows)
    assert by_bytes.input_ids == by_name.input_ids
    damaged = checked("x", {"image": b"no picture", "prompt": "Colour?", "completion": "red"})
    assert encoder.encode(damaged).reason.startswith("picture 1: cannot be opened as a picture")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"images": ["gone.png"]}, r"picture 'gone\.png': there is no such file beside the rows"),
        ({"images": ["/dev/zero"]}, r"picture '/dev/zero': there is no such file"),
        ({"images": ["a\0.png"]}, r"is not the path of a file"),
        ({"images": [{"path": "https://x.org/a.png"}]}, r"picture 'https://x\.org/a\.png': is a URL"),
        ({"images": ["eps.png"]}, r"eps\.png: cannot be opened as a picture"),
        ({"images": ["large.png"]}, r"large\.png: cannot be opened as a picture \(Image size \(90000000 pixels\)"),
        ({"images": ["rows.jsonl"]}, r"rows\.jsonl: cannot be opened as a picture"),
        ({"images": ["https://x.org/a.png"]}, r"picture 'https://x\.org/a\.png': is a URL: download it"),
        ({"images": [3]}, r"a picture must be the path of a file, got '3'"),
        ({"images": ["red.png", "red.png"], "messages": [ask("a", PART), ANSWER]}, r"has 2 pictures .* and 1 parts"),
        ({"images": ["red.png"], "messages": [ask("a", {"type": "text", "text": "b"}), ANSWER, ask("c"), ANSWER]},
         r'has 1 pictures of its own and 0 parts \{"type": "image"\} for them'),
        ({"messages": [ask("a", PART), ANSWER]}, r"Number of images provided \(0\) does not match"),
        ({"messages": [ask("a", {"type": "video"}), ANSWER]}, r"content, part 1: must be of type text.* got 'video'"),
        ({"images": ["red.png"], "messages": [ask("<image>a"), ANSWER]}, r"contains '<image>': write a part"),
        ({"images": ["red.png"], "messages": [ask("a")]}, r"has no turn of the assistant"),
        ({"images": ["red.png"], "messages": [ask("a"), ask("b", PART) | {"role": "assistant"}]}, r"turn of the assis"),
        ({"images": ["red.png"], "text": "a"}, r"has text alone: rows with pictures need messages"),
        ({"images": ["red.png"], "tools": [{"name": "f"}]}, r"has tools, which are not supported beside pictures"),
        ({"images": ["red.png"], "messages": [ask("a"), ANSWER | {"tool_calls": [{"function": {"name": "f"}}]}]},
         r"has tools, which are not supported beside pictures"),
        ({"images": ["red.png"], "messages": [ask("a" * 600), ANSWER]}, r"has \d+ tokens, max_length is 512"),
    ],
)  # fmt: skip
def test_wrong_rows_are_named(row, words, place):
    row = row if "messages" in row or "text" in row else row | {"messages": [ask("a"), ANSWER]}
    data = write_rows(place / "wrong.jsonl", [rows_of("red")[0], row])
    with pytest.raises(DataError, match=r"^wrong\.jsonl:2: " + f".*{words}"):
        train(place / "wrong", **said(place, data=str(data), dry_run=True))
    assert not (place / "wrong").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "lora"}, r"method='lora' on rows for image-text-to-text: must be one of dora, mixlora, mixdora"),
        ({"batching": "packed"}, r"batching='packed' on rows for image-text-to-text: must be shuffled"),
        ({"max_length": 9999}, r"max_length=9999: the base's context has 512 tokens"),
        ({"truncate": True}, r"truncate=True on rows for image-text-to-text: leave it out: a picture cannot be cut"),
        ({"loss_on": "all"}, r"loss_on='all' on rows for image-text-to-text: must be completions"),
        ({"task": "text-generation"}, r"rows\.jsonl:1: has images: needs --task image-text-to-text"),
    ],
)
def test_settings_that_do_not_go_with_pictures(changes, words, place, tmp_path):
    with pytest.raises((TrainingError, DataError), match=words):
        train(tmp_path / "out", **said(place, dry_run=True, **changes))


def test_a_base_that_does_not_see_is_named(place, tmp_path):
    base = write_llama(tmp_path / "llama")
    with pytest.raises(BaseModelError, match="llama': has no processor of pictures and texts"):
        train(tmp_path / "out", **said(place, base=str(base), dry_run=True))


def test_a_loss_that_is_not_finite_names_the_row(place, tmp_path, monkeypatch):
    loss = AdapterTrainer._loss
    monkeypatch.setattr(AdapterTrainer, "_loss", lambda *args: (loss(*args)[0] * math.nan, None))
    data = write_rows(place / "one.jsonl", [rows_of("red")[0], rows_of("red")[0]])  # whose tokens are the same
    with pytest.raises(TrainingError, match=r"the loss became nan in step 1 on one\.jsonl:1 or one\.jsonl:2"):
        train(tmp_path / "out", **said(place, data=str(data), batch_size=1))
