"""Rows from files, and what is learned of them; every bad row is named by file and line."""

from __future__ import annotations

import json
import re
import resource
import tracemalloc

import pyarrow
import pytest
from pyarrow import parquet
from tiny_stand_ins import CHAT as INEXACT
from tiny_stand_ins import byte_tokenizer
from tiny_training import CHAT

from minilora_hub.errors import DataError
from minilora_hub.training.data import Row, read_rows
from minilora_hub.training.dataset import prepare_data
from minilora_hub.training.settings import make_settings
from minilora_hub.training.sources import PASSAGE, BadRow
from minilora_hub.training.tokens import IGNORED, Encoder

GOOD = b'{"text": "good"}\n'


@pytest.fixture
def tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def encoded(tokenizer, fields, kind, **settings):
    return Encoder(tokenizer, **({"max_length": 512} | settings)).encode(Row("here", kind, fields))


def learned(tokenizer, example) -> str:
    """What is learned as one text, with a bar where something in between is not."""
    parts, before = [], False
    for token, label in zip(example.input_ids, example.labels, strict=True):
        if label != IGNORED:
            assert label == token
            parts += ["|"] * (not before) + [tokenizer.decode([token])]
        before = label != IGNORED
    return "".join(parts)


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        (GOOD + b'{"text": "cut', 2, "is not JSON"),
        (GOOD + GOOD + b'{"text": "\xe9"}\n', 3, "is not UTF-8 .byte 11 is 0xe9"),
        (GOOD + b"[1, 2]\n", 2, "is a list"),
        (GOOD + b'{"prompt": "only"}\n', 2, "has no completion beside .'prompt'"),
        (GOOD + b'{"question": "a"}\n', 2, r"has the fields \['question'\]"),
        (GOOD + b'{"text": 5}\n', 2, "text is a int"),
        (GOOD + b'{"text": " "}\n', 2, "text is empty"),
        (GOOD + b'{"prompt": "a", "completion": ""}\n', 2, "completion is empty"),
        (GOOD + b'{"messages": "hi"}\n', 2, "must be a list of messages"),
        (GOOD + b'{"messages": [{"role": "bot", "content": "x"}]}\n', 2, "turn 1: must have a role"),
        (GOOD + b'{"messages": [{"role": "user", "content": "x"}]}\n', 2, "no turn of the assistant"),
        (GOOD + b'{"messages": [{"role": "user"}]}\n', 2, "turn 1: must have a content"),
        (GOOD + b"\n" + b'{"text": "a"} trailing\n', 3, "is not JSON"),
    ],
)
def test_a_bad_line_is_named(content, line, reason, tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_bytes(content)
    bad = [row for row in read_rows((str(file),)) if isinstance(row, BadRow)]
    assert [row.place for row in bad] == [f"d.jsonl:{line}"]
    assert re.search(reason, bad[0].reason), bad[0].reason


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b"", "d.jsonl: is empty"),
        ("d.jsonl", b"\n\n", "has no rows"),
        ("d.jsonl", "\ufeff".encode("utf-16"), "d.jsonl:1: is UTF-16"),
        ("d.doc", b"x", "must end with one of"),
        ("d.txt", b"a\n\xff\n", "d.txt:2: is not UTF-8"),
        ("d.md", b"\n \n", "d.md: has no rows"),
        ("d.txt", b"a\rb\r", "d.txt:1: has lines that end with CR only"),
        ("d.csv", b'text\n"open\n', r"d.csv:2: is not CSV"),
        ("d.csv", b"text\n\xff\n", "d.csv:2: is not UTF-8"),
        ("d.csv", b"prompt,completion,prompt\na,b,c\n", "d.csv:1: has two columns called 'prompt'"),
        ("d.parquet", b"PAR1 no", "d.parquet: is not a readable Parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name, content, message, tmp_path):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_rows((str(file),)))


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        list(read_rows((str(tmp_path / "none.jsonl"),)))
    with pytest.raises(DataError, match="is a folder"):
        list(read_rows((str(tmp_path),)))
    with pytest.raises(DataError, match="neither a file nor a valid id"):
        list(read_rows(("a b/c",)))


def test_the_ends_of_lines_of_windows_are_not_learned(tmp_path):
    text = "one\ntwo\n\n" + "three\n" * 300 + "\nfour"
    for name, content in (("unix.txt", text), ("windows.txt", text.replace("\n", "\r\n"))):
        (tmp_path / name).write_bytes(content.encode())
    unix, windows = (
        [row.fields for row in read_rows((str(tmp_path / f"{name}.txt"),))] for name in ("unix", "windows")
    )
    assert windows == unix
    assert len(unix) == 2


def test_a_document_becomes_passages_of_whole_paragraphs(tmp_path):
    """None of its text is lost, and each passage is found where its place says."""
    paragraphs = [f"  {number}: " + "words and words. " * (number % 70) + "\nnext line" for number in range(60)]
    text = "\n\n" + "\n\n\n".join(paragraphs) + "\n"
    (tmp_path / "notes.md").write_text(text, encoding="utf-8")
    found = list(read_rows((str(tmp_path / "notes.md"),)))
    assert [row.kind for row in found] == ["text"] * len(found)
    assert "\n".join(row.fields["text"] for row in found).split() == text.split()
    lines = text.splitlines()
    for row in found:
        assert lines[int(row.place.rpartition(":")[2]) - 1] == row.fields["text"].splitlines()[0]
        assert row.fields["text"].endswith("next line")
    sizes = [len(row.fields["text"]) for row in found]
    assert min(sizes[:-1]) >= PASSAGE - 10
    assert max(sizes) < PASSAGE + max(map(len, paragraphs)) + 10


def test_the_same_rows_come_from_every_kind_of_file(tmp_path):
    rows = [{"prompt": 'a,\n"b"', "completion": "ü"}, {"prompt": "c", "completion": "d"}]
    (tmp_path / "d.jsonl").write_text("\ufeff" + "".join(json.dumps(row) + "\r\n" for row in rows), encoding="utf-8")
    (tmp_path / "d.csv").write_text('prompt,completion,other\n"a,\n""b""",ü,1\nc,d,2\n', encoding="utf-8")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    places = {"jsonl": ["d.jsonl:1", "d.jsonl:2"], "csv": ["d.csv:2", "d.csv:4"]}
    places["parquet"] = ["d.parquet, row 1", "d.parquet, row 2"]
    for kind, expected in places.items():
        found = list(read_rows((str(tmp_path / f"d.{kind}"),)))
        assert [row.fields for row in found] == rows
        assert [row.place for row in found] == expected


def test_lists_of_messages_in_csv_cells_are_json(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    cell = json.dumps(turns).replace('"', '""')
    (tmp_path / "d.csv").write_text(f'messages\n"{cell}"\nhello\n', encoding="utf-8")
    good, bad = read_rows((str(tmp_path / "d.csv"),))
    assert good.fields == {"messages": turns}
    assert bad.place == "d.csv:3"


# ---- which tokens are learned ----


def test_a_prompt_is_a_users_turn_and_only_the_answer_with_its_end_is_learned(tokenizer):
    example = encoded(tokenizer, {"prompt": "hi", "completion": "yo"}, "prompt and completion")
    assert tokenizer.decode(example.input_ids) == "<|user|>hi<|end|><|assistant|>yo<|end|>"
    assert learned(tokenizer, example) == "|yo<|end|>"


def test_without_chat_texts_are_laid_end_to_end(tokenizer):
    example = encoded(tokenizer, {"prompt": "hi", "completion": "yo"}, "prompt and completion", chat=False)
    assert tokenizer.decode(example.input_ids) == "hiyo<|end|>"
    assert learned(tokenizer, example) == "|yo<|end|>"
    tokenizer.chat_template = None
    assert encoded(tokenizer, {"prompt": "hi", "completion": "yo"}, "prompt and completion") == example


def test_every_turn_of_the_assistant_is_learned_and_nothing_else(tokenizer):
    roles = ("system", "user", "assistant", "user", "assistant", "user")
    turns = [{"role": role, "content": f"{role}{i}"} for i, role in enumerate(roles)]
    example = encoded(tokenizer, {"messages": turns}, "messages")
    assert learned(tokenizer, example) == "|assistant2<|end|>|assistant4<|end|>"
    assert example.input_ids == tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    everything = encoded(tokenizer, {"messages": turns}, "messages", loss_on="all")
    assert everything.labels == everything.input_ids


def test_a_completion_of_messages_is_learned_but_answers_in_its_prompt_are_not(tokenizer):
    ask, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    fields = {"prompt": [ask, answer, ask], "completion": [{"role": "assistant", "content": "b"}]}
    assert learned(tokenizer, encoded(tokenizer, fields, "prompt and completion")) == "|b<|end|>"


def test_a_template_that_cannot_be_cut_exactly_is_refused(tokenizer):
    tokenizer.chat_template = INEXACT  # opens an answer otherwise than it writes one
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    bad = encoded(tokenizer, {"messages": turns}, "messages")
    assert bad.place == "here"
    assert "turn 2: the chat template renders it differently" in bad.reason
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    assert "roles must alternate" in encoded(tokenizer, {"messages": turns}, "messages").reason
    tokenizer.chat_template = None
    assert "no chat template" in encoded(tokenizer, {"messages": turns}, "messages").reason


def test_what_a_template_writes_after_the_end_of_turn_is_not_learned(tokenizer):
    tokenizer.chat_template = CHAT.replace("'<|end|>'", "'<|end|>\\n'")
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}] * 2
    example = encoded(tokenizer, {"messages": turns}, "messages")
    assert learned(tokenizer, example) == "|a<|end|>|a<|end|>"
    assert tokenizer.decode(example.input_ids).endswith("a<|end|>\n")


def test_the_real_templates_tokens_are_those_generation_meets():
    """SmolLM2's own template and merges: the prompt as generation tokenizes it, the answer up to its end of turn."""
    transformers = pytest.importorskip("transformers")
    from minilora_hub.bases import resolve_base

    real = transformers.AutoTokenizer.from_pretrained(resolve_base("embedded").path)
    turns = [{"role": "user", "content": "Colour of the sky?"}, {"role": "assistant", "content": "blue"}]
    chat = encoded(real, {"messages": turns}, "messages")
    pair = encoded(real, {"prompt": turns[0]["content"], "completion": "blue"}, "prompt and completion")
    start = real.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=True, return_dict=False)
    answer = [*real("blue")["input_ids"], real.eos_token_id]
    assert chat.input_ids == pair.input_ids == [*start, *answer, *real("\n")["input_ids"]]
    assert chat.labels == pair.labels == [*[IGNORED] * len(start), *answer, IGNORED]
    more = [*turns, {"role": "user", "content": "And grass?"}, {"role": "assistant", "content": "green"}]
    long = encoded(real, {"messages": more}, "messages")
    assert long.input_ids == real.apply_chat_template(more, tokenize=True, return_dict=False)
    assert [real.decode([t]) for t in long.labels if t != IGNORED] == ["blue", "<|im_end|>", "green", "<|im_end|>"]


def test_long_rows_are_bad_or_cut(tokenizer):
    fields = {"prompt": "p" * 20, "completion": "c" * 20}
    bad = encoded(tokenizer, fields, "prompt and completion", max_length=30)
    assert bad.reason == "has 44 tokens, max_length is 30: raise it, or pass --truncate"
    cut = encoded(tokenizer, fields, "prompt and completion", max_length=30, truncate=True)
    assert len(cut.input_ids) == 30
    assert learned(tokenizer, cut) == "|" + "c" * 7
    bad = encoded(tokenizer, fields, "prompt and completion", max_length=20, truncate=True)
    assert bad.reason == "has no token with a loss after truncation"


# ---- all rows together ----


def settings(file, **said):
    return make_settings({"method": "dora", "base": "embedded", "data": str(file)} | said)


def test_bad_rows_stop_the_run_or_are_counted(tokenizer, tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_bytes(GOOD * 3 + b"no\n" + b'{"text": "' + b"x" * 600 + b'"}\n' + b"{}\n")
    with pytest.raises(DataError) as raised:
        prepare_data(settings(file), tokenizer, 512, tmp_path)
    message = str(raised.value)
    assert "d.jsonl:4: is not JSON" in message
    assert "d.jsonl:5: has 601 tokens, max_length is 512" in message
    assert "and 1 more. Repair them, or pass --skip-bad-rows" in message
    data = prepare_data(settings(file, skip_bad_rows=True), tokenizer, 512, tmp_path)
    assert len(data.train) == 3
    assert [row.place for row in data.skipped] == ["d.jsonl:4", "d.jsonl:5", "d.jsonl:6"]
    file.write_bytes(b"no\n")
    with pytest.raises(DataError, match="no row is left: all 1 cannot be used"):
        prepare_data(settings(file, skip_bad_rows=True), tokenizer, 512, tmp_path)
    with pytest.raises(DataError, match="max_length=600: the base's context has 512 tokens"):
        prepare_data(settings(file, max_length=600), tokenizer, 512, tmp_path)


def test_held_out_rows_follow_the_seed_and_are_not_learned(tokenizer, tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(20)))
    data = prepare_data(settings(file, validation=0.2), tokenizer, 512, tmp_path)
    assert len(data.validation) == 4
    places = {example.place for example in data.train} | {example.place for example in data.validation}
    assert len(places) == 20
    again = prepare_data(settings(file, validation=0.2), tokenizer, 512, tmp_path)
    other = prepare_data(settings(file, validation=0.2, seed=1), tokenizer, 512, tmp_path)
    assert again.sha256 == data.sha256
    assert [*again.validation] == [*data.validation] == [data.validation[index] for index in range(4)]
    assert [*other.validation] != [*data.validation]
    assert len({data.sha256, other.sha256}) == 2
    with pytest.raises(DataError, match="holds out all 20 rows"):
        prepare_data(settings(file, validation=0.99), tokenizer, 512, tmp_path)


def test_tokens_are_streamed_to_a_file_and_not_held_in_memory(tokenizer, tmp_path):
    """200,000 tokens and their labels: as lists of Python integers they are 3.2 MB, and were all held."""
    rows = 400
    small, file = tmp_path / "small.jsonl", tmp_path / "d.jsonl"
    small.write_text('{"text": "a"}\n' * 2)
    file.write_text("".join(json.dumps({"text": f"{index:05}" + "x" * 494}) + "\n" for index in range(rows)))
    prepare_data(settings(small, validation=0.5), tokenizer, 512, tmp_path / "small")  # imports
    tracemalloc.start()
    data = prepare_data(settings(file, validation=0.1), tokenizer, 512, tmp_path / "rows")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert data.tokens == data.learned_tokens == 500 * rows * 9 // 10
    assert peak < 1_800_000
    assert (tmp_path / "rows" / "train.arrow").stat().st_size > 8 * 500 * rows
    assert data.place_of(data.validation[3].input_ids) == data.validation[3].place
    assert data.place_of([1, 2, 3]) is None
    assert data.largest_id == tokenizer.eos_token_id


def test_a_full_disk_is_said_with_the_folder(tokenizer, tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps({"text": "x" * 500}) + "\n" for _ in range(100)))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(
            DataError, match=r"tokens cannot be written to '.*rows' \(.*\): free disk space, or set TMPDIR"
        ):
            prepare_data(settings(file), tokenizer, 512, tmp_path / "rows")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
