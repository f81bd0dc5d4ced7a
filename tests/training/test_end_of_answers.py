"""The tokens that end an answer are taught, told and saved; and what a base's tokenizer must have for training."""

from __future__ import annotations

import json
import re

import pytest
import torch
from formats.helpers import edit_json
from tiny_stand_ins import byte_tokenizer, tiny_llama
from tiny_tokenizers import QWEN25, tokenizer_of
from tiny_training import CHAT, SHORT, write_rows
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessorList

import minilora_hub
from minilora_hub.cli import main
from minilora_hub.errors import BaseModelError
from minilora_hub.training.run import train

ONE_STEP = SHORT | {"max_steps": 1, "record": False}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A base like Qwen2.5's: ChatML, and generation settings that end at <|endoftext|> only."""
    folder, tokenizer = tmp_path_factory.mktemp("qwen"), tokenizer_of("qwen2.5")
    assert tokenizer.chat_template == QWEN25
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tiny_llama(vocab_size=len(tokenizer), eos_token_id=end).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == end
    return str(folder)


@pytest.mark.parametrize("method", ["dora", "lora", "rslora"])
def test_the_templates_end_token_is_in_the_saved_generation_settings(method, qwen, rows, tmp_path):
    out, tokenizer = tmp_path / "out", tokenizer_of("qwen2.5")
    ends = [tokenizer.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|im_end|>")]
    result = train(out, method=method, base=qwen, data=rows, **ONE_STEP)
    assert GenerationConfig.from_pretrained(out).eos_token_id == ends
    assert ("end", "an answer ends with <|endoftext|> or <|im_end|>") in result.plan.lines()
    if method != "dora":  # PEFT loads the base's generation settings, and none of the adapter's
        (note,) = result.notes
        assert "answers end with <|im_end|>, which the base's generation settings do not list" in note
        assert f"eos_token_id={ends}" in note
        return
    assert result.notes == ()
    minilora_hub.register()
    model = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.tensor([[5, 6, 7]])

    def third_is_the_end(seen, scores):
        token = ends[1] if seen.shape[1] == 5 else 9
        return torch.full_like(scores, -1.0).index_fill(1, torch.tensor(token), 1.0)

    generated = model.generate(
        ids, max_new_tokens=9, do_sample=False, logits_processor=LogitsProcessorList([third_is_the_end]), pad_token_id=0
    )
    assert generated[0, 3:].tolist() == [9, 9, ends[1]]


def test_settings_that_know_every_end_stay_as_they_are(base, rows, tmp_path):
    """One token as a number, not as a list of one."""
    train(tmp_path / "out", method="dora", base=base, data=rows, **ONE_STEP)
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == 256


def test_the_note_is_printed(qwen, rows, tmp_path, capsys):
    flags = ["--method", "lora", "--base", qwen, "--data", rows, "--out", str(tmp_path / "out"), "--max-steps", "1"]
    with pytest.raises(SystemExit) as ended:
        main(["train", *flags, "--rank", "2"])
    assert ended.value.code == 0
    printed = capsys.readouterr().err
    assert re.search(r"^end +an answer ends with <\|endoftext\|> or <\|im_end\|>$", printed, re.M)
    assert "note: answers end with <|im_end|>" in printed


# ---- what a tokenizer lacks ----


def write(folder, **tokens) -> str:
    tiny_llama(eos_token_id=256).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    edit_json(folder / "tokenizer_config.json", **tokens)
    return str(folder)


def test_a_tokenizer_without_eos_is_named_with_what_to_do(rows, tmp_path):
    base = write(tmp_path / "base", eos_token=None, pad_token=None)
    with pytest.raises(
        BaseModelError, match=r"base '.*base': its tokenizer has no eos token.*\"eos_token\": \"<\|end\|>\""
    ):
        train(tmp_path / "out", method="dora", base=base, data=rows, **ONE_STEP)
    assert not (tmp_path / "out").exists()


def test_more_ids_than_embeddings_are_named(tmp_path):
    """Tokens were added to the tokenizer, and the base's embedding was not resized."""
    base = write(tmp_path / "base")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.add_tokens(["<tool>", "</tool>"])
    tokenizer.save_pretrained(base)
    unused = write_rows(tmp_path / "unused.jsonl", [{"prompt": "q", "completion": "a"}] * 4)
    train(tmp_path / "fine", method="dora", base=base, data=str(unused), **ONE_STEP)
    used = write_rows(tmp_path / "used.jsonl", [{"prompt": "q", "completion": "<tool>x</tool>"}] * 4)
    message = r"base '.*base': its tokenizer writes '</tool>' as id 260, and the base has embeddings for 259 ids"
    with pytest.raises(BaseModelError, match=message):
        train(tmp_path / "out", method="dora", base=base, data=str(used), **ONE_STEP)
    assert not (tmp_path / "out").exists()
