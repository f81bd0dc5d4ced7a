"""The hash of a large file is kept, and no change of the file goes unnoticed."""

import hashlib
import json
import os
import time

import huggingface_hub
import pytest
from tiny import tiny_base, tiny_config

from minilora_hub import DoraForCausalLM
from minilora_hub.remote_code import adapter_files, file_hashes
from minilora_hub.remote_code.file_hashes import file_sha256


def real_hash(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "assets"
    find = huggingface_hub.cached_assets_path
    monkeypatch.setattr(file_hashes, "cached_assets_path", lambda *names: find(*names, assets_dir=folder))
    return folder


@pytest.fixture
def hashed(monkeypatch):
    """The files that are read to be hashed."""
    hashed, really = [], file_hashes._hash
    monkeypatch.setattr(file_hashes, "_hash", lambda path: hashed.append(path) or really(path))
    return hashed


@pytest.fixture
def file(tmp_path, cache, monkeypatch):
    """A large file that was not touched for a while."""
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * (file_hashes.LARGE // 256))
    monkeypatch.setattr(file_hashes, "SETTLED", 0)
    return path


def test_it_is_hashed_once(file, cache, hashed):
    assert file_sha256(file) == file_sha256(file) == real_hash(file)
    assert hashed == [str(file)]
    (kept,) = cache.rglob("*.json")
    assert json.loads(kept.read_text())["path"] == str(file)
    link = file.with_name("link")
    link.symlink_to(file)
    assert file_sha256(link) == real_hash(file)
    assert len(hashed) == 1


def write_in_place(path):
    with path.open("r+b") as file:
        file.seek(1000)
        file.write(b"changed")


def write_and_set_the_time_back(path):
    before = path.stat()
    write_in_place(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def replace_by_one_of_the_same_age(path):
    before, other = path.stat(), path.with_name("other")
    other.write_bytes(path.read_bytes()[::-1])
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


def append(path):
    with path.open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize(
    "change", [write_in_place, write_and_set_the_time_back, replace_by_one_of_the_same_age, append]
)
def test_every_change_is_noticed(file, hashed, change):
    before = file_sha256(file)
    time.sleep(0.02)  # a clock of the file system may have ticks of 10 ms; `SETTLED` is for changes within one
    change(file)
    after = file_sha256(file)
    assert before != after == real_hash(file)
    assert file_sha256(file) == after
    assert len(hashed) == 2


def test_the_hash_of_a_file_that_was_just_written_is_not_kept(file, cache, hashed, monkeypatch):
    """Another write in the same tick of the file system's clock would leave the same times."""
    monkeypatch.undo()
    monkeypatch.setattr(file_hashes, "cached_assets_path", lambda *names: cache)
    monkeypatch.setattr(file_hashes, "_hash", lambda path: hashed.append(path) or real_hash(file))
    cache.mkdir()
    assert file_sha256(file) == file_sha256(file) == real_hash(file)
    assert len(hashed) == 2
    old = time.time_ns
    monkeypatch.setattr(file_hashes.time, "time_ns", lambda: old() + 3 * 10**9)
    assert file_sha256(file) == file_sha256(file) == real_hash(file)
    assert len(hashed) == 3


def test_a_file_that_changes_while_it_is_hashed_is_not_kept(file, cache, monkeypatch):
    really = file_hashes._hash

    def slowly(path):
        digest = really(path)
        append(file)
        return digest

    monkeypatch.setattr(file_hashes, "_hash", slowly)
    file_sha256(file)
    assert not list(cache.rglob("*.json"))


@pytest.mark.parametrize("content", ["", "[]", "{}", "not JSON", '{"sha256": "0"}', b"\xff\xfe"])
def test_a_damaged_cache_is_not_used(file, cache, hashed, content):
    file_sha256(file)
    (kept,) = cache.rglob("*.json")
    kept.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert file_sha256(file) == real_hash(file)
    assert len(hashed) == 2


def test_the_cache_of_another_path_is_not_used(file, cache):
    file_sha256(file)
    (kept,) = cache.rglob("*.json")
    found = json.loads(kept.read_text())
    kept.write_text(json.dumps({**found, "path": "/elsewhere", "sha256": "0" * 64}))
    assert file_sha256(file) == real_hash(file)


def test_without_a_cache_it_is_hashed(file, tmp_path, monkeypatch):
    def no_cache(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(file_hashes, "cached_assets_path", no_cache)
    assert file_sha256(file) == real_hash(file)
    monkeypatch.setattr(file_hashes, "cached_assets_path", lambda *_: tmp_path / "missing")
    assert file_sha256(file) == real_hash(file)


def test_small_files_are_not_kept(tmp_path, cache):
    path = tmp_path / "small"
    path.write_bytes(b"x")
    assert file_sha256(path) == real_hash(path)
    assert not cache.exists()


def test_an_adapter_without_a_fingerprint_hashes_nothing(tmp_path, monkeypatch):
    tiny_base().save_pretrained(tmp_path / "base")
    model = DoraForCausalLM.from_base(str(tmp_path / "base"), tiny_config("dora"))
    model.save_pretrained(tmp_path / "known")
    model.config.base_fingerprint = "unknown"
    model.save_pretrained(tmp_path / "unknown")
    hashed = []
    monkeypatch.setattr(adapter_files, "file_sha256", lambda path: hashed.append(path) or "0" * 64)
    DoraForCausalLM.from_pretrained(tmp_path / "unknown")
    assert hashed == []
    with pytest.warns(UserWarning, match="this adapter was trained on a base with fingerprint"):
        DoraForCausalLM.from_pretrained(tmp_path / "known")
    assert len(hashed) == 1
