"""Prompts out of uploaded files: three kinds, bounds, and mistakes named by their line."""

import pytest

from minilora_hub.demo.runs import prompt_files
from minilora_hub.demo.runs.limits import PageLimits
from minilora_hub.demo.runs.prompt_files import read_prompts
from minilora_hub.errors import PageError


def read(tmp_path, name, content, **limits):
    """Write a file and read its prompts."""
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_prompts(tmp_path / name, PageLimits(**limits))


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("p.txt", "one\r\n\n  two  \nthree", ["one", "two", "three"]),
        ("p.TXT", "\ufeffone\u2028still one\n", ["one\u2028still one"]),
        ("p.jsonl", '{"prompt": "a\\nb", "id": 1}\n\n"c"\n', ["a\nb", "c"]),
        ("p.csv", 'id,Prompt\n1,"a\nb, ""c"""\n2,d\n', ['a\nb, "c"', "d"]),
        ("p.csv", "one\ntwo\n", ["one", "two"]),
        ("p.csv", "prompt\none\n", ["one"]),
    ],
)
def test_prompts_are_read(tmp_path, name, content, prompts):
    assert [prompt.text for prompt in read(tmp_path, name, content)] == prompts


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.parquet", "x", r"must end in \.txt, \.jsonl, \.csv"),
        ("p.txt", b"\xff\xfe", "not UTF-8: byte 0"),
        ("p.txt", "", "holds no prompts"),
        ("p.csv", "prompt\n", "holds no prompts"),
        ("p.jsonl", '{"prompt": "x"}\n{"prompt": }', "line 2: not JSON"),
        ("p.jsonl", '{"prompt": "x", "prompt": "y"}', "line 1: not JSON"),
        ("p.jsonl", '{"prompt": 3}', "line 1: must be"),
        ("p.jsonl", "[" * 5000, "line 1: not JSON"),
        ("p.csv", "a,b\n1,2\n", "line 1: .* needs a header with 'prompt'; found a, b"),
        ("p.csv", "id,prompt\n1,x\n2,\n", "line 3: the field 'prompt' is empty"),
        ("p.csv", 'prompt\n"x', "not CSV"),
        ("p.txt", "a\nb\nc\nd", "4 prompts: at most 3"),
        ("p.txt", "a\nbbbbbbbbbbb", "line 2: 11 characters: a prompt has at most 10"),
        ("p.txt", "x" * 2000, "2 kB: at most 1 kB"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, monkeypatch, name, content, words):
    monkeypatch.setattr(prompt_files, "MOST_BYTES", 100_000 if name == "p.jsonl" else 1000)
    with pytest.raises(PageError, match=words):
        read(tmp_path, name, content, file_prompts=3, prompt=10)
