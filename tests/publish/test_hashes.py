"""Files are read once: their hashes serve everything that follows, and are read anew where a file was changed."""

import hashlib
import os
from itertools import pairwise

import pytest
import torch

from minilora_hub import push
from minilora_hub.adapter_folder.hashes import LARGE, Hashes, file_sha256
from minilora_hub.bases.skeleton import _make_blocks_real
from minilora_hub.publish.checks.tensors import _is_finite
from minilora_hub.publish.checks.texts import IN_EVERY_MACHINE_PATH, MACHINE_PATH


@pytest.mark.parametrize("size", [0, 1, LARGE - 1, LARGE, 3 * LARGE + 5])
def test_hashes_of_files_of_any_size(tmp_path, size):
    data = os.urandom(size)
    (tmp_path / "a").write_bytes(data)
    hashes = Hashes()
    copied = hashes.copy(tmp_path / "a", tmp_path / "b")
    assert hashes.of(tmp_path / "b") == hashes.of(tmp_path / "a") == hashlib.sha256(data).hexdigest()
    copied.result()
    assert (tmp_path / "b").read_bytes() == data


def test_a_known_hash_is_not_computed_again(tmp_path, monkeypatch):
    """Of the file, of its copy, and of both after their folder was moved."""
    source = tmp_path / "folder" / "a"
    source.parent.mkdir()
    source.write_bytes(b"weights")
    hashes = Hashes()
    hashes.start(source)
    digest = hashes.of(source)
    monkeypatch.setattr("minilora_hub.adapter_folder.hashes.file_sha256", lambda path: pytest.fail(f"{path} was read"))
    hashes.copy(source, tmp_path / "folder" / "b").result()
    assert hashes.of(tmp_path / "folder" / "b") == digest
    os.replace(tmp_path / "folder", tmp_path / "moved")
    hashes = hashes.moved(tmp_path / "folder", tmp_path / "moved")
    assert [hashes.of(tmp_path / "moved" / name) for name in "ab"] == [digest, digest]


def test_a_changed_file_is_read_again(tmp_path):
    path, copy = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"before")
    hashes = Hashes()
    hashes.start(path)
    before = hashes.of(path)
    path.write_bytes(b"after!")
    os.utime(path, ns=(1, 1))
    assert hashes.of(path) == file_sha256(path) != before
    path.write_bytes(b"later!")
    os.utime(path, ns=(2, 2))
    hashes.copy(path, copy).result()
    assert hashes.of(copy) == file_sha256(copy)


def test_a_file_that_cannot_be_read_is_told_when_it_is_needed(tmp_path):
    hashes = Hashes()
    copied = hashes.copy(tmp_path / "gone", tmp_path / "b")
    with pytest.raises(FileNotFoundError):
        copied.result()
    with pytest.raises(FileNotFoundError):
        hashes.of(tmp_path / "b")


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_push_sends_under_the_hash_that_was_checked(hub, monkeypatch, trained):
    """The client does not read a file once more to know its hash; the Hub, which does, finds it right."""
    monkeypatch.setenv("HF_TOKEN", hub.add_user("ana"))
    monkeypatch.setattr("huggingface_hub.lfs.sha_fileobj", lambda file, *_: pytest.fail(f"{file.name} was read"))
    result = push(trained["mixlora"], "ana/adapter", verify=False, progress=False)
    sent = hub.repo("ana/adapter").commit("main").blobs["adapter_model.safetensors"]
    assert sent.lfs
    assert {file.path: file.sha256 for file in result.plan.files}["adapter_model.safetensors"] == sent.sha256


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_values_that_are_not_finite_are_found(dtype):
    assert _is_finite(torch.zeros(0, dtype=dtype))
    for wrong in (float("nan"), float("inf"), -float("inf")):
        values = torch.ones(3, 5)
        assert _is_finite(values.to(dtype))
        values[1, 3] = wrong
        assert not _is_finite(values.to(dtype))


def test_linears_of_one_shape_get_different_weights():
    """The form of a feed-forward block is found by calling it: equal gate and up could not be told apart."""
    with torch.device("meta"):
        block = torch.nn.ModuleDict({name: torch.nn.Linear(64, 64, bias=False) for name in ("gate", "up", "down")})
    _make_blocks_real([torch.nn.ModuleList([block])])
    weights = [linear.weight for linear in block.values()]
    assert all(not torch.equal(one, other) for one, other in pairwise(weights))
    assert all(torch.linalg.matrix_rank(weight) == 64 for weight in weights)


@pytest.mark.parametrize(
    "path",
    [
        "/home/ana/x", "/Users/ana/x", "file:///root/x", "/mnt/c/x", "/content/drive/My", "/kaggle/working",
        "/private/var/folders/a", "C:\\Users\\ana", "C:/Users/ana", "c:\\\\Users\\\\ana",
    ],
)  # fmt: skip
def test_the_quick_look_for_paths_misses_none(path):
    assert MACHINE_PATH.search(f"at {path}")
    assert any(part in path for part in IN_EVERY_MACHINE_PATH)


def test_a_link_will_do_where_one_can_be_made(tmp_path, monkeypatch):
    """The same bytes under both names, hashed once; a change afterwards is seen; else there is a copy."""
    source, folder = tmp_path / "weights", tmp_path / "built"
    folder.mkdir()
    source.write_bytes(b"w" * 3_000_000)
    hashes = Hashes()
    hashes.copy(source, folder / "linked", link=True).result()
    assert (folder / "linked").samefile(source)
    assert hashes.of(folder / "linked") == hashlib.sha256(source.read_bytes()).hexdigest()
    source.write_bytes(b"v" * 3_000_000)
    assert hashes.of(folder / "linked") == hashlib.sha256(b"v" * 3_000_000).hexdigest()

    by_name = tmp_path / "by-name"
    by_name.symlink_to(source)
    hashes.copy(by_name, folder / "of-a-name", link=True).result()
    assert not (folder / "of-a-name").is_symlink()
    assert (folder / "of-a-name").samefile(source)

    source.chmod(0o755)
    hashes.copy(source, folder / "executable", link=True).result()
    source.chmod(0o644)

    def refuse(*_):
        raise OSError("another file system")

    monkeypatch.setattr("os.link", refuse)
    hashes.copy(source, folder / "elsewhere", link=True).result()
    for name in ("executable", "elsewhere"):
        assert not (folder / name).samefile(source)
        assert (folder / name).read_bytes() == source.read_bytes()
        assert not (folder / name).stat().st_mode & 0o111
