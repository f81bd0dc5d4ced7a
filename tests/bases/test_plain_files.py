"""Links, pipes, holes, headers and indexes of a folder from outside."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from minilora_hub.bases import resolve_base
from minilora_hub.errors import AdapterError, BaseModelError
from minilora_hub.hub.plain_files import read_header, require_plain_files, require_plain_names, require_true_sizes


@pytest.fixture
def folder(tmp_path):
    """Return an adapter's folder, beside which something secret lies."""
    folder = tmp_path / "adapter"
    (folder / "peft").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (folder / "config.json").write_text("{}")
    save_file({"a": torch.ones(3), "b": torch.ones(2, 4)}, folder / "adapter_model.safetensors")
    return folder


def test_a_plain_folder_and_a_snapshot_of_the_hubs_cache(folder, tmp_path):
    """The cache links each file of a snapshot to a blob; a link inside the folder is fine as well."""
    (folder / "peft" / "LICENSE").symlink_to("../config.json")
    require_plain_files(folder)
    snapshot = tmp_path / "models--ana--dora" / "snapshots" / ("a" * 40)
    blobs = tmp_path / "models--ana--dora" / "blobs"
    (snapshot / "peft").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "0").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/0")
    (snapshot / "peft" / "adapter_config.json").symlink_to("../../../blobs/0")
    (tmp_path / "short").symlink_to(snapshot)
    require_plain_files(snapshot)
    require_plain_files(tmp_path / "short")
    (snapshot / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(AdapterError, match=r"README\.md is a symbolic link out of the folder"):
        require_plain_files(snapshot)
    (snapshot / "README.md").unlink()
    (blobs / "0").unlink()
    (blobs / "0").symlink_to(tmp_path / "secret")
    with pytest.raises(AdapterError, match="symbolic link out of the folder"):
        require_plain_files(snapshot)


@pytest.mark.parametrize("target", ["../secret", "/etc/passwd", "nowhere", "README.md", "../..", "peft/../../secret"])
def test_links_out_of_the_folder(folder, target):
    for place in ("README.md", "peft/README.md"):
        (folder / place).symlink_to(target)
        with pytest.raises(AdapterError, match=rf"adapter 'adapter': {place} is a symbolic link out of the folder"):
            require_plain_files(folder)
        (folder / place).unlink()


def test_a_folder_that_only_looks_like_a_cache(tmp_path):
    """`blobs` that is itself a link leads out as well."""
    snapshot = tmp_path / "models--ana--dora" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_text("secret")
    (tmp_path / "models--ana--dora" / "blobs").symlink_to(tmp_path / "elsewhere")
    (snapshot / "config.json").symlink_to("../../blobs/secret")
    with pytest.raises(AdapterError, match="symbolic link out of the folder"):
        require_plain_files(snapshot)


def test_a_pipe_is_not_waited_for(folder):
    os.mkfifo(folder / "README.md")
    with pytest.raises(AdapterError, match=r"README\.md is not a regular file"):
        require_plain_files(folder)


def test_a_file_of_holes(folder):
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(10**12)
    with pytest.raises(AdapterError, match="says that it has 1,000,000,000,000 bytes, and nearly all of them"):
        require_plain_files(folder)


def entry(begin, end, shape=(3,)):
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(0, 12), "b": entry(12, 10**15)}, "invalid shape, data type, or offset"),
        ({"a": entry(0, 12)}, "file not fully covered"),
        ({"a": entry(0, 12), "b": entry(4, 44)}, "invalid offset for tensor `b`"),
        ({"a": entry(4, 44)}, "invalid offset for tensor `a`"),
        ({"a": entry(0, 44)}, "invalid shape, data type, or offset"),
        ({"a": entry(0, -12)}, "invalid JSON in header"),
        ({"a": entry(0, 44, ("x",))}, "invalid JSON in header"),
        ({"a": 7}, "invalid JSON in header"),
        ([], "invalid JSON in header"),
    ],
)
def test_headers_that_lie(folder, header, message):
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(44))
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors") as refused:
        require_true_sizes(folder)
    assert message in str(refused.value)


def test_a_true_header_is_read(folder):
    require_true_sizes(folder)
    header, start = read_header(folder / "adapter_model.safetensors")
    assert {name: entry["shape"] for name, entry in header.items()} == {"a": [3], "b": [2, 4]}
    assert (folder / "adapter_model.safetensors").stat().st_size == start + 44
    (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(AdapterError, match="header too large"):
        read_header(folder / "adapter_model.safetensors")


def test_a_tensor_that_is_named_twice(folder):
    """safetensors itself takes the last of the two."""
    a, b = json.dumps(entry(0, 12)), json.dumps(entry(12, 44, (2, 4)))
    text = f'{{"a": {a}, "b": {b}, "b": {b}}}'.encode()
    (folder / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(44))
    with pytest.raises(AdapterError, match="the key 'b' occurs twice"):
        require_true_sizes(folder)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "\\\\host\\x", "C:\\x", "a//x", "..\\x", "", "a\0b"])
def test_names_that_leave_their_folder(folder, name):
    """In a repo's list of files, and in the index of an adapter and of a base."""
    with pytest.raises(AdapterError, match="ana/dora lists a file called"):
        require_plain_names(["config.json", name], "ana/dora")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001.safetensors", "b": name}}))
    with pytest.raises(AdapterError, match=r"weight_map names .*, which is not a path inside the folder"):
        require_true_sizes(folder)
    with pytest.raises(BaseModelError, match=r"weight_map names .*, which is not a path inside the folder"):
        resolve_base(folder)
    require_plain_names(["config.json", "peft/adapter_config.json", ".eval_results/a.yaml", "a..b"], "ana/dora")
