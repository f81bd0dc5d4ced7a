"""Files that lie, run code or point elsewhere are refused by name, and leave nothing behind.

Then seeded mutations of every input format. An import either refuses, with one of our errors, or writes a folder that
loads; it never leaves a part of one. `-m soak` runs 500 a format, the ordinary run fewer; `-s` prints what became of
them.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections import Counter

import pytest
import torch
from formats.helpers import (
    base_folder,
    edit_json,
    legacy_tensors,
    listing,
    mixlora,
    peft_folder,
    peft_mixlora_folder,
    reference_folder,
)
from safetensors.torch import load_file, save_file
from sweeps import sweep
from tiny import fill_adapter, tiny_base

from minilora_hub import MixLoraForCausalLM
from minilora_hub.adapter_folder.folders import read_folder
from minilora_hub.adapter_folder.reading import read_ours
from minilora_hub.errors import AdapterError, MiniLoraError
from minilora_hub.formats.combine import Combination, combine
from minilora_hub.formats.importing import import_adapter, import_as_experts


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_folder(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def good(tmp_path_factory, base):
    """{format: folder}, which tests copy before they spoil it."""
    folder = tmp_path_factory.mktemp("good")
    model = mixlora(tiny_base())
    found = {
        "reference": reference_folder(folder / "reference", model),
        "legacy": reference_folder(folder / "legacy", model, routing_strategy="mixtral"),
        "peft lora": peft_folder(folder / "lora", tiny_base()),
        "peft dora": peft_folder(folder / "dora", tiny_base(), use_dora=True, rank_pattern={"q_proj": 2}),
        "shards": peft_folder(folder / "shards", tiny_base()),
    }
    saved = MixLoraForCausalLM.from_base(str(base), model.config)
    fill_adapter(saved)
    saved.save_pretrained(folder / "ours")
    found["peft mixlora"] = peft_mixlora_folder(folder / "ours", folder / "peft mixlora")
    (found["legacy"] / "adapter_model.bin").unlink()
    save_file(legacy_tensors(model), found["legacy"] / "adapter_model.safetensors")
    shard(found["shards"])
    for path in found.values():
        (path / "README.md").unlink(missing_ok=True)
    return found


def shard(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    names, places = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"adapter_model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        places.update(dict.fromkeys(part, file))
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.fixture
def spoil(good, base, tmp_path):
    """Copy a good folder, spoil it, and import it: the error's text. Nothing may be left but the copy."""

    def run(kind, damage):
        source = tmp_path / "source"
        shutil.copytree(good[kind], source)
        damage(source)
        before = listing(tmp_path)
        with pytest.raises(AdapterError) as error:
            import_adapter(source, tmp_path / "out", base=str(base))
        assert listing(tmp_path) == before
        return str(error.value)

    return run


def write_safetensors(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


class RunsCode:
    """A pickle that would make a folder when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# ---- pickles ----


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_would_run_code(protocol, spoil, tmp_path):
    marker = tmp_path / "it-ran"

    def damage(folder):
        for path, raw in ((folder / "adapter_model.bin", protocol == 2),):
            if raw:
                path.write_bytes(pickle.dumps({"x": RunsCode(marker)}, protocol=2))
            else:
                torch.save({"x": RunsCode(marker)}, path, pickle_protocol=4)

    assert "adapter_model.bin is not a plain pickle of tensors" in spoil("reference", damage)
    assert not marker.exists()


def zipped(path, entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def expanded(folder):
    """Four bytes that claim to be a terabyte."""
    tensor = torch.zeros(1).expand(1 << 19, 1 << 19)
    torch.save({"mixlora.layers.0.mlp.moe_gate.weight": tensor}, folder / "adapter_model.bin")


def shared(folder):
    one = torch.zeros(4, 32)
    torch.save({f"mixlora.layers.{i}.mlp.moe_gate.weight": one for i in range(5000)}, folder / "adapter_model.bin")


def packed(folder):
    buffer = io.BytesIO()
    torch.save({"x": torch.zeros(1 << 20)}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    zipped(folder / "adapter_model.bin", entries, zipfile.ZIP_DEFLATED)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (expanded, "holds too few values"),
        (shared, "would take"),
        (packed, "would unpack from"),
        (lambda folder: torch.save([torch.zeros(2)], folder / "adapter_model.bin"), "a dictionary of named tensors"),
        (lambda folder: torch.save({1: torch.zeros(2)}, folder / "adapter_model.bin"), "a dictionary of named tensors"),
        (lambda folder: torch.save({"a": "text"}, folder / "adapter_model.bin"), "a is a str, a plain tensor"),
        (lambda folder: torch.save({"a": torch.eye(3).to_sparse()}, folder / "adapter_model.bin"), "plain tensor"),
        (lambda folder: torch.save({"a": torch.zeros(2, dtype=torch.int32)}, folder / "adapter_model.bin"), "int32"),
        (lambda folder: torch.save({}, folder / "adapter_model.bin"), "hold no tensor"),
        (lambda folder: (folder / "adapter_model.bin").write_bytes(b""), "not a plain pickle"),
        (lambda folder: zipped(folder / "adapter_model.bin", {"a/data.pkl": b"\x80\x02N."}), "not a plain pickle"),
        (lambda folder: (folder / "adapter_model.bin").unlink(), "none of adapter_model.safetensors"),
    ],
)
def test_pickles(damage, message, spoil):
    assert message in spoil("reference", damage)


# ---- safetensors ----


def change(file, edit):
    def damage(folder):
        tensors = load_file(folder / file)
        edit(tensors)
        save_file(tensors, folder / file)

    return damage


FILE = "adapter_model.safetensors"
NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def twice(folder):
    entry = json.dumps(ENTRY)
    write_safetensors(folder / FILE, f'{{"{NAME}": {entry}, "{NAME}": {entry}}}'.encode(), b"\0" * 8)


def two_spellings(tensors):
    name = NAME.replace("lora_A.weight", "lora_magnitude_vector")
    tensors[f"{name}.weight"], tensors[name] = torch.ones(32), torch.ones(32)


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        (
            "peft lora",
            lambda folder: (folder / FILE).write_bytes(struct.pack("<Q", 10**12) + b"{}"),
            "header too large",
        ),
        ("peft lora", twice, "occurs twice in one object"),
        ("peft dora", change(FILE, two_spellings), "twice, under two spellings"),
        (
            "peft lora",
            lambda f: write_safetensors(f / FILE, {NAME: ENTRY | {"shape": [1 << 40]}}, b"\0" * 8),
            "safetensors",
        ),
        ("peft lora", lambda f: write_safetensors(f / FILE, {NAME: ENTRY | {"data_offsets": [0, 80]}}), "safetensors"),
        ("peft lora", lambda f: write_safetensors(f / FILE, b"[" * 100_000), "not a readable safetensors"),
        ("peft lora", lambda f: (f / FILE).write_bytes((f / FILE).read_bytes()[:-1]), "not a readable safetensors"),
        ("peft lora", change(FILE, lambda t: t.update({NAME: torch.zeros(3, 32)})), "rank 4 on the base"),
        ("peft lora", change(FILE, lambda t: t.update({NAME: torch.zeros(4, 32, 1)})), "has shape (4, 32, 1)"),
        ("peft lora", change(FILE, lambda t: t[NAME].fill_(float("nan"))), "not finite"),
        ("peft lora", change(FILE, lambda t: t.pop(NAME)), "lora_A is missing"),
        ("peft lora", change(FILE, lambda t: t.update({"../evil": torch.ones(1)})), "'../evil': not a LoRA"),
        ("peft lora", change(FILE, lambda t: t.update({NAME: t[NAME].to(torch.int32)})), "int32"),
        (
            "legacy",
            change(FILE, lambda t: t.update({"mixlora.layers.0.mlp.moe_gate.weight": torch.zeros(4, 32)})),
            "under its current and its legacy name",
        ),
        (
            "legacy",
            change(FILE, lambda t: t.pop("mixlora.layers.1.experts.2.w1_proj.lora_B.weight")),
            "experts [0, 1, 3]",
        ),
        (
            "legacy",
            change(FILE, lambda t: t.update({"mixlora.layers.1.experts.2.w1_proj.lora_B.weight": torch.zeros(48, 5)})),
            "expert 2 is torch.float32 of shape (48, 5), expert 0",
        ),
        (
            "legacy",
            change(FILE, lambda t: t.update({"mixlora.layers.99999999.gate.weight": torch.zeros(4, 32)})),
            "not a router, expert or attention tensor",
        ),
    ],
)
def test_safetensors(kind, damage, message, spoil):
    assert message in spoil(kind, damage)


# ---- shards and settings ----


def index(edit):
    def damage(folder):
        path = folder / "adapter_model.safetensors.index.json"
        content = json.loads(path.read_text())
        edit(content["weight_map"])
        path.write_text(json.dumps(content))

    return damage


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/passwd", "a/../../b.safetensors", ".hidden", "", 7])
def test_a_shard_outside_the_folder(place, spoil, tmp_path):
    save_file({NAME: torch.zeros(4, 32)}, tmp_path / "secret.safetensors")
    message = spoil("shards", index(lambda places: places.update({NAME: place})))
    assert f"{NAME} is in {place!r}" in message


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda places: places.pop(NAME), "which adapter_model.safetensors.index.json does not list there"),
        (lambda places: places.update(more="adapter_model-00001-of-00002.safetensors"), "lists more, which is not in"),
        (lambda places: places.update(more="gone.safetensors"), "gone.safetensors is not a readable"),
        (lambda places: places.clear(), "weight_map must name"),
    ],
)
def test_an_index_that_lies(edit, message, spoil):
    assert message in spoil("shards", index(edit))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"[]", "must hold a JSON object"),
        (b'{"r": 1, "r": 2}', "occurs twice"),
        (b'{"r": NaN}', "NaN is not a number"),
        (b"\xff\xfe{}", "cannot be read"),
        (b"{" * 5000, "cannot be read"),
        (b'{"peft_type": ["LORA"]}', "peft_type=['LORA']"),
    ],
)
def test_settings_that_are_no_settings(content, message, spoil):
    assert message in spoil("peft lora", lambda folder: (folder / "adapter_config.json").write_bytes(content))


def test_a_base_that_does_not_match(good, tmp_path):
    for kind, folder in good.items():
        for number, changes in enumerate(({"hidden_size": 64}, {"num_hidden_layers": 1}, {"intermediate_size": 40})):
            other = base_folder(tmp_path, **changes)
            before = listing(tmp_path)
            with pytest.raises(AdapterError, match=r"require|needs|has no such linear|surplus|missing"):
                import_adapter(folder, tmp_path / f"out{number}", base=str(other))
            assert listing(tmp_path) == before, kind


# ---- mutations ----


def flip(rng, folder, files):
    path = folder / rng.choice(files)
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))


def flip_early(rng, folder, files):
    """In the first 600 bytes, where headers are."""
    path = folder / rng.choice(files)
    data = bytearray(path.read_bytes())
    data[rng.randrange(min(600, len(data)))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))


def truncate(rng, folder, files):
    path = folder / rng.choice(files)
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def splice(rng, folder, files):
    """A piece of one file over a piece of another one."""
    path, other = folder / rng.choice(files), folder / rng.choice(files)
    data, piece = bytearray(path.read_bytes()), other.read_bytes()
    start, at = rng.randrange(len(piece)), rng.randrange(len(data))
    length = rng.randrange(1, 200)
    data[at : at + length] = piece[start : start + length]
    path.write_bytes(bytes(data))


def remove(rng, folder, files):
    (folder / rng.choice(files)).unlink()


VALUES = (None, True, 0, -1, 3, 10**9, 1e308, "", "x", [], {}, ["q_proj"], {"q_proj": 2}, "all-linear", "../..", ".*")


def setting(rng, folder, files):
    """One field of the settings becomes something else, or goes, or is new."""
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text())
    name = rng.choice([*content, "lora_bias", "layers_to_transform", "expert_lora", "rank_pattern", "top_k"])
    if rng.random() < 0.2:
        content.pop(name, None)
    else:
        content[name] = rng.choice(VALUES)
    path.write_text(json.dumps(content))


def names(rng, folder, files):
    """A tensor gets another name, or another shape, in a file that is otherwise well-formed."""
    path = folder / rng.choice([name for name in files if name.endswith((".safetensors", ".bin"))])
    tensors = torch.load(path) if path.suffix == ".bin" else load_file(path)
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    choice = rng.randrange(4)
    if choice == 0:
        tensors[name.replace("0", "1", 1) if rng.random() < 0.5 else name[:-3]] = tensor
    elif choice == 1:
        tensors[name] = tensor[:-1].contiguous()
    elif choice == 2:
        tensors[name] = tensor.unsqueeze(0)
    elif choice == 3 and tensor.is_floating_point():
        tensors[name] = tensor.to(rng.choice([torch.float16, torch.float64, torch.int64]))
    torch.save(tensors, path) if path.suffix == ".bin" else save_file(tensors, path)


MUTATIONS = (flip, flip_early, truncate, splice, remove, setting, setting, names)


def mutate(kind, count, good, base, tmp_path, seed=0):
    """Import `count` mutated copies of a good folder; count what became of them."""
    rng = random.Random(f"{kind} {seed}")
    ends = Counter()
    work = tmp_path / "work"
    work.mkdir()
    for number in range(count):
        source, out = work / "source", work / "out"
        shutil.copytree(good[kind], source)
        files = sorted(path.name for path in source.iterdir())
        mutation = MUTATIONS[number % len(MUTATIONS)]
        mutation(rng, source, files)
        before = listing(work)
        try:
            imported = import_adapter(source, out, base=str(base))
        except MiniLoraError as error:
            imported, message = None, str(error)
        if imported is None:
            assert message.strip(), mutation.__name__
            assert listing(work) == before, f"{mutation.__name__} {number}: {message}"
            ends["refused"] += 1
        else:
            assert {path.split(os.sep)[0] for path in listing(work)} == {"source", "out"}
            check_result(imported, base)
            ends["imported"] += 1
        shutil.rmtree(source)
        shutil.rmtree(out, ignore_errors=True)
        assert listing(work) == set()
    assert sum(ends.values()) == count
    return ends


def check_result(imported, base):
    """What was written is whole: it reads strictly, on the base."""
    from minilora_hub.bases.skeleton import find_base
    from minilora_hub.formats.peft_reading import read_peft

    found = read_folder(imported.folder)
    read = read_peft if found.dialect == "peft" else read_ours
    read(found, find_base(str(base)))


KINDS = ("reference", "legacy", "peft lora", "peft dora", "shards", "peft mixlora")


@pytest.mark.parametrize("kind", sweep(KINDS, "peft lora"))
def test_mutations(kind, good, base, tmp_path):
    ends = mutate(kind, 64, good, base, tmp_path)
    assert ends["refused"] > 20
    assert ends["imported"] > 2  # a flipped bit of a weight is no error that anybody could see


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_500_mutations(kind, good, base, tmp_path, capsys):
    ends = mutate(kind, 500, good, base, tmp_path, seed=1)
    with capsys.disabled():
        print(f"\n500 mutations, {kind}: {dict(ends)}")


def test_several_and_combined_adapters_are_read_as_strictly(good, base, tmp_path):
    """The other commands that take PEFT adapters, over the same mutations of one of two."""
    rng = random.Random(3)
    for number in range(24):
        source, out = tmp_path / "source", tmp_path / "out"
        shutil.copytree(good["peft lora"], source)
        MUTATIONS[number % len(MUTATIONS)](rng, source, sorted(path.name for path in source.iterdir()))
        before = listing(tmp_path)
        try:
            if number % 2:
                combine([good["peft lora"], source], out, Combination("svd", (0.5, 0.5)), base=str(base))
            else:
                import_as_experts([good["peft lora"], source], out, base=str(base), attention="mean")
        except MiniLoraError:
            assert listing(tmp_path) == before
        shutil.rmtree(source)
        shutil.rmtree(out, ignore_errors=True)


def test_ours_is_read_strictly_by_exports(base, tmp_path):
    from minilora_hub.formats.exporting import export_adapter

    model = MixLoraForCausalLM.from_base(str(base), mixlora(tiny_base()).config)
    model.save_pretrained(tmp_path / "ours")
    rng = random.Random(4)
    ends = Counter()
    for number in range(40):
        source, out = tmp_path / "source", tmp_path / "out"
        shutil.copytree(tmp_path / "ours", source)
        files = ["config.json", "adapter_model.safetensors"]
        (flip, flip_early, truncate, splice, remove)[number % 5](rng, source, files)
        before = listing(tmp_path)
        try:
            export_adapter(source, out, "mixlora", base=str(base))
            ends["exported"] += 1
        except MiniLoraError:
            assert listing(tmp_path) == before
            ends["refused"] += 1
        shutil.rmtree(source)
        shutil.rmtree(out, ignore_errors=True)
    assert ends["refused"] > 15
    edit_json(tmp_path / "ours" / "config.json", r=3)
    with pytest.raises(AdapterError, match="require"):
        export_adapter(tmp_path / "ours", tmp_path / "out", "mixlora", base=str(base))
