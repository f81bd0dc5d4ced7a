"""Damaged copies of a good published folder: each is refused, or proven to publish the same as the good one.

`pytest -s` prints how many were refused, and by what.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections import Counter

import pytest

from minilora_hub.adapter_folder.verification import Verification
from minilora_hub.errors import MiniLoraError
from minilora_hub.publish.card import free_text
from minilora_hub.publish.checks.folder import check_folder
from minilora_hub.publish.push.build import build
from minilora_hub.publish.verify.verify import verify

ADDED = {
    "helper.py": b"print('run')\n",
    "pytorch_model.bin": b"\x80\x04K\x01.",
    "adapter_config.json": b'{"peft_type": "LORA"}',
    "notes.txt": b"a stray file",
    "peft/extra.safetensors": b"\x02\0\0\0\0\0\0\0{}",
}


def flip(rng, folder, files):
    """Flip one bit of one byte."""
    path = folder / rng.choice(files)
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))
    return f"flip byte {at} of {path.relative_to(folder)}"


def flip_weights(rng, folder, files):
    """Flip one bit in weights, where most of the bytes are numbers."""
    return flip(rng, folder, [name for name in files if name.endswith(".safetensors")])


def flip_json(rng, folder, files):
    """Change one digit of a JSON file to another one: it still parses."""
    name = rng.choice([name for name in files if name.endswith(".json") and "tokenizer.json" not in name])
    data = bytearray((folder / name).read_bytes())
    digits = [at for at, byte in enumerate(data) if 48 <= byte <= 57]
    if not digits:
        return flip(rng, folder, [name])
    at = rng.choice(digits)
    data[at] = rng.choice([digit for digit in range(48, 58) if digit != data[at]])
    (folder / name).write_bytes(bytes(data))
    return f"change digit {at} of {name}"


def truncate(rng, folder, files):
    path = folder / rng.choice(files)
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])
    return f"truncate {path.relative_to(folder)}"


def swap(rng, folder, files):
    one, two = rng.sample(files, 2)
    first, second = (folder / one).read_bytes(), (folder / two).read_bytes()
    (folder / one).write_bytes(second)
    (folder / two).write_bytes(first)
    return f"swap {one} and {two}"


def rename(rng, folder, files):
    name = rng.choice(files)
    (folder / name).rename(folder / f"{name}.old")
    return f"rename {name}"


def remove(rng, folder, files):
    name = rng.choice(files)
    (folder / name).unlink()
    return f"remove {name}"


def add(rng, folder, files):
    name = rng.choice(list(ADDED))
    (folder / name).write_bytes(ADDED[name])
    return f"add {name}"


COUNT = 200
DAMAGES = (flip, flip, flip_weights, flip_json, truncate, swap, rename, remove, add)


def tree(folder):
    """Every file but the words that a person wrote on the card."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    lines = free_text.classify(files["README.md"].decode())
    verification = Verification.from_dict(json.loads(files["verification.json"]))
    # Digits far behind the tolerance may differ: `verify` proves them equivalent.
    files["verification.json"] = repr(dataclasses.replace(verification, top_logits=())).encode()
    files["README.md"] = "\n".join(line for kind, _, line in lines if kind != "free" and line).encode()
    return files


@pytest.mark.slow
def test_damaged_folders(good, base_folder, tmp_path, process, capsys):
    rng = random.Random(20)
    healthy = good["dora"]
    files = sorted(path.relative_to(healthy).as_posix() for path in healthy.rglob("*") if path.is_file())
    again = build(healthy, tmp_path / "again", repo_id="ana/dora", base_model=str(base_folder))
    expected = tree(again.folder)
    assert expected == tree(healthy)

    def verified(folder):
        return verify(folder, base_model=str(base_folder), progress=False, process=process)

    assert verified(healthy).ok
    ends, messages = Counter(), []
    for number in range(COUNT):
        folder, out = tmp_path / "damaged", tmp_path / "out"
        shutil.copytree(healthy, folder)
        what = DAMAGES[number % len(DAMAGES)](rng, folder, files)
        report = verified(folder)
        try:
            build(folder, out, repo_id="ana/dora", base_model=str(base_folder))
            same = tree(out) == expected
            if same:
                assert verified(out).ok, what
            else:
                problems = check_folder(out, base_exists=lambda *_: True, base_license=lambda *_: "apache-2.0")
                assert any(problem.blocking for problem in problems), f"{what}: would be published"
            push = "publishes the same" if same else "push's checks refuse"
        except (MiniLoraError, ValueError) as error:
            messages.append(str(error))
            push = "push refuses"
        assert not report.ok or push in ("publishes the same", "push refuses"), what
        ends[f"verify {'accepts' if report.ok else 'refuses'}, {push}"] += 1
        shutil.rmtree(folder)
        shutil.rmtree(out, ignore_errors=True)
    assert all(messages)
    with capsys.disabled():
        print(f"\n{COUNT} damaged folders: {dict(ends)}")
