"""A push checks most of a folder before verification.json is there; what it found counts only while nothing changes."""

from __future__ import annotations

import shutil

import pytest
from publish.spoilt_folders import GITHUB_TOKEN

from minilora_hub.publish.checks.folder import check_folder, check_unfinished

BASE = {"base_exists": lambda base, revision: True, "base_license": lambda base, revision: "apache-2.0"}


@pytest.fixture
def checked(good, tmp_path):
    """A folder as it is published, and what was found in it before its verification.json was there."""
    folder = shutil.copytree(good["mixlora"], tmp_path / "repo")
    (folder / "verification.json").rename(tmp_path / "verification.json")
    found = check_unfinished(folder, **BASE)
    shutil.move(tmp_path / "verification.json", folder)
    return folder, found


def test_both_halves_find_what_the_whole_does(checked):
    folder, earlier = checked
    assert check_folder(folder, **BASE, earlier=earlier) == check_folder(folder, **BASE)
    assert earlier.stamps.keys() | {"verification.json"} == {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    }


def test_what_was_found_early_is_kept(good, tmp_path):
    folder = shutil.copytree(good["mixlora"], tmp_path / "repo")
    (folder / "chat_template.jinja").write_text(f"{GITHUB_TOKEN}\n{{{{ messages }}}}")
    earlier = check_unfinished(folder, **BASE)
    assert "secret" in {problem.code for problem in earlier.problems}
    assert set(earlier.problems) <= set(check_folder(folder, **BASE, earlier=earlier))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda folder: (folder / "chat_template.jinja").write_text(GITHUB_TOKEN), ("secret", "chat_template.jinja")),
        (lambda folder: (folder / "vocab.txt").write_text(GITHUB_TOKEN), ("secret", "vocab.txt")),
        (lambda folder: (folder / "model.pt").write_bytes(b"\x80\x04K\x01."), ("pickle", "model.pt")),
        (lambda folder: (folder / "attach.py").unlink(), ("missing-file", "attach.py")),
        (
            lambda folder: (folder / "README.md").write_text("It is right in 99.9% of cases."),
            ("card-numbers", "README.md"),
        ),
        (lambda folder: (folder / "verification.json").write_text("{}"), ("verification", "verification.json")),
    ],
)
def test_what_changes_afterwards_is_found(checked, change, expected):
    folder, earlier = checked
    change(folder)
    assert expected in {(problem.code, problem.file) for problem in check_folder(folder, **BASE, earlier=earlier)}
