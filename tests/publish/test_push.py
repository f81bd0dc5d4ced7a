"""Pushing to the HTTP Hub: what arrives, what is not sent, and who is told what."""

from __future__ import annotations

import json
import re

import pytest
from formats.helpers import edit_json
from safetensors.torch import load_file, save_file

from minilora_hub import push
from minilora_hub.adapter_folder.code import remote_code_files
from minilora_hub.errors import AdapterError, PublishError
from minilora_hub.publish.card.free_text import sections_of
from minilora_hub.publish.card.render import settings_of, write_card

# The client uploads LFS files with an argument that its own HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

ROOT = {"README.md", "adapter_model.safetensors", "results.json", "verification.json", "tokenizer.json"}
ROOT |= {"tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
OURS = ROOT | {"config.json", *remote_code_files()}
PEFT = {"peft/adapter_config.json", "peft/adapter_model.safetensors"}


def quick(folder, repo="ana/adapter", **arguments):
    """Push without verifying, which other tests do, and without a word."""
    return push(folder, repo, **{"verify": False, "progress": False} | arguments)


def tree(hub, repo="ana/adapter", revision="main"):
    return hub.repo(repo).files(revision)


@pytest.fixture
def ana(hub, monkeypatch):
    token = hub.add_user("ana", organizations=("team",))
    monkeypatch.setenv("HF_TOKEN", token)
    return token


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        pytest.param("dora", OURS | PEFT, marks=pytest.mark.slow),
        ("mixlora", OURS),
        ("lora", ROOT | {"adapter_config.json"}),
    ],
)
def test_the_layout_that_arrives(hub, ana, trained, method, expected):
    result = push(trained[method], "ana/adapter", progress=False, verify=method == "dora")
    assert result.ok, result.verification.problem
    repo = hub.repo("ana/adapter")
    assert {name for name in repo.files("main") if not name.startswith(("pictures/", ".eval"))} == expected
    assert repo.private
    assert repo.commit("main").oid == result.commit
    assert [commit.title for commit in repo.commits()][1:] == ["initial commit"]
    for name, path in remote_code_files().items():
        assert repo.files("main").get(name, path.read_bytes()) == path.read_bytes()
    assert ana not in json.dumps(result.to_dict())


@pytest.mark.parametrize("verify", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_dora_as_peft_alone(hub, ana, trained, verify):
    result = push(trained["dora"], "ana/adapter", layout="peft", verify=verify, progress=False)
    assert result.ok, result.verification.problem
    assert {name for name in tree(hub) if "/" not in name} == ROOT | {"adapter_config.json"}
    config = json.loads(tree(hub)["adapter_config.json"])
    assert (config["use_dora"], config["base_model_name_or_path"]) == (True, "org/base")


def test_mixlora_has_no_peft_layout(hub, ana, trained):
    with pytest.raises(AdapterError, match="PEFT has no MixLoRA"):
        quick(trained["mixlora"], layout="peft")
    assert ("model", "ana/adapter") not in hub.repos


def test_pushed_again_nothing_is_sent(hub, ana, trained):
    first = quick(trained["dora"])
    sent = len(hub.sent("PUT"))
    second = quick(trained["dora"])
    assert second.commit == first.commit
    assert second.plan.sends == ()
    assert len(hub.sent("PUT")) == sent
    assert len(hub.sent("POST", "/commit/")) == 1


def test_only_what_changed_is_sent_and_what_was_ours_is_removed(hub, ana, trained, copy_of):
    quick(trained["dora"])
    hub.repo("ana/adapter").push({"notes.txt": b"the owner's own"})
    folder = copy_of()
    (folder / "chat_template.jinja").unlink()
    results = json.loads((folder / "results.json").read_text())
    results["evaluation"][0]["value"] = 0.95
    (folder / "results.json").write_text(json.dumps(results))
    sent = len(hub.sent("PUT"))
    result = quick(folder)
    actions = {file.path: file.action for file in result.plan.sends}
    assert actions["chat_template.jinja"] == "delete"
    assert actions["results.json"] == "change"
    assert not {"adapter_model.safetensors", "config.json", *remote_code_files()} & set(actions)
    assert len(hub.sent("PUT")) == sent
    assert tree(hub)["notes.txt"] == b"the owner's own"
    assert "chat_template.jinja" not in tree(hub)


def test_files_of_others_that_would_be_loaded_are_refused_before_anything_is_sent(hub, ana, trained):
    """No push put them there, and none would remove them: the repo would load wrongly."""
    repo = hub.add_repo("ana/adapter", files={"adapter_config.json": b"{}", "a.py": b"", "NOTICE": b"x"}, private=True)
    before = repo.commit().oid
    for dry_run in (True, False):
        with pytest.raises(PublishError, match=r"\(a\.py, adapter_config\.json\): nothing was sent; delete them"):
            quick(trained["mixlora"], dry_run=dry_run)
    assert repo.commit().oid == before
    hub.add_repo("ana/other", files={"NOTICE": b"x", "n.txt": b"x", "old/adapter_config.json": b"{}"}, private=True)
    notes = quick(trained["mixlora"], "ana/other").plan.notes
    assert "stays in the repo, not from a push: NOTICE" in notes
    assert any("n.txt, old/adapter_config.json; `minilora verify` takes only" in note for note in notes)
    assert tree(hub, "ana/other")["NOTICE"] == b"x"


def test_dry_run_sends_nothing_and_shows_everything(hub, ana, trained):
    result = quick(trained["dora"], dry_run=True)
    assert not [record for record in hub.requests if record.method not in ("GET", "HEAD")]
    assert ("model", "ana/adapter") not in hub.repos
    assert (result.dry_run, result.commit) == (True, None)
    assert {file.path for file in result.plan.files if "pictures" not in file.path} == OURS | PEFT
    assert all(re.fullmatch("[0-9a-f]{64}", file.sha256) and file.size for file in result.plan.files)
    assert result.plan.card.startswith("---\n")


def test_dry_run_without_a_token_or_a_hub(hub, trained, base_folder, monkeypatch):
    hub.faults.add(kind="drop", times=None)
    assert quick(trained["dora"], dry_run=True, base_model=str(base_folder)).plan.creates


def test_a_no_to_the_question_sends_nothing(hub, ana, trained):
    seen = []
    result = quick(trained["dora"], confirm=lambda plan: bool(seen.append(plan)))
    assert seen[0].repo_id == "ana/adapter"
    assert result.dry_run
    assert ("model", "ana/adapter") not in hub.repos


def test_tag_branch_and_pull_request(hub, ana, trained, copy_of):
    first = quick(trained["dora"], tag="v1")
    repo = hub.repo("ana/adapter")
    assert repo.tags["v1"].oid == first.commit
    assert b"v1" in tree(hub)["README.md"]
    assert quick(trained["dora"], tag="v1").commit == first.commit
    folder = copy_of("mixlora")
    with pytest.raises(PublishError, match="the tag 'v1' is on"):
        quick(folder, tag="v1")
    with pytest.raises(PublishError, match="no branch 'next'"):
        quick(folder, revision="next")
    repo.branches["next"] = repo.commit("main")
    on_branch = quick(folder, revision="next")
    assert repo.commit("next").oid == on_branch.commit
    assert repo.commit("main").oid == first.commit
    offered = quick(folder, create_pr=True)
    assert repo.commit("refs/pr/1").oid == offered.commit
    assert offered.url.endswith("/discussions/1")
    assert repo.commit("main").oid == first.commit


@pytest.fixture
def forbid_building(monkeypatch):
    """A function after which building, which takes minutes on a real base, fails the test."""
    return lambda: monkeypatch.setattr(
        "minilora_hub.publish.push.push.build", lambda *args, **kwargs: pytest.fail("it was built")
    )


@pytest.mark.parametrize("method", ["mixlora", "lora"])
def test_a_taken_tag_is_told_before_anything_is_built(hub, ana, trained, copy_of, method, forbid_building):
    """Where it is on an older commit; and where it is on the newest, and the weights are others than there."""
    first = quick(trained[method], tag="v1")
    assert quick(trained[method], tag="v1").commit == first.commit
    forbid_building()
    folder = copy_of(method)
    weights = folder / "adapter_model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    with pytest.raises(PublishError, match=f"the tag 'v1' is on {first.commit[:12]} already: choose another one"):
        quick(folder, tag="v1")
    hub.repo("ana/adapter").push({"notes.txt": b"x"})
    with pytest.raises(PublishError, match=f"the tag 'v1' is on {first.commit[:12]} already: choose another one"):
        quick(trained[method], tag="v1")


def test_a_missing_base_or_licence_is_told_before_anything_is_built(hub, ana, copy_of, base_folder, forbid_building):
    forbid_building()
    folder = copy_of("dora")
    with pytest.raises(AdapterError, match=r"base_model_name_or_path='org/gone': the Hub has no such model"):
        quick(folder, base_id="org/gone", base_model=str(base_folder))
    edit_json(folder / "results.json", license=None)
    with pytest.raises(AdapterError, match=r"results.json: license is not set"):
        quick(folder)
    (folder / "results.json").unlink()
    with pytest.raises(AdapterError, match=r"results.json: license is not set"):
        quick(folder)
    with pytest.raises(pytest.fail.Exception, match="it was built"):
        quick(folder, license="mit")


@pytest.mark.parametrize(
    ("kind", "told"), [("refused", "HTTP 403: Pull requests are disabled"), ("ignored", "HTTP 404: no such page")]
)
def test_a_hub_without_pull_requests(hub, ana, trained, kind, told, forbid_building):
    forbid_building()
    repo = hub.add_repo("ben/adapter", files={"README.md": b"theirs"})
    hub.pull_requests = kind
    match = rf"create_pr=True: the Hub at {hub.endpoint} takes no pull requests for ben/adapter \({told}"
    with pytest.raises(PublishError, match=match):
        quick(trained["dora"], "ben/adapter", create_pr=True)
    assert (repo.files(), repo.pulls) == ({"README.md": b"theirs"}, {})


def test_links_of_a_card_lead_to_the_hub_that_is_pushed_to(hub, ana, trained):
    quick(trained["mixlora"], space="ana/compare")
    card = tree(hub)["README.md"].decode()
    assert f"[org/base]({hub.endpoint}/org/base)" in card
    assert f"]({hub.endpoint}/spaces/ana/compare?adapter=ana%2Fadapter)" in card
    assert "huggingface.co/" not in card.partition("<!-- minilora:card")[2]
    assert settings_of(card)["hub"] == hub.endpoint


def test_the_space_that_a_card_opens_is_kept(hub, ana, trained):
    first = quick(trained["dora"], space="ana/compare")
    link = f"{hub.endpoint}/spaces/ana/compare?adapter=ana%2Fadapter".encode()
    assert link in tree(hub)["README.md"]
    assert quick(trained["dora"]).commit == first.commit
    quick(trained["dora"], space="team/other")
    card = tree(hub)["README.md"]
    assert b"/spaces/team/other?adapter=ana%2Fadapter" in card
    assert link not in card
    with pytest.raises(ValueError, match="space='compare': must be the id of a Space, owner/name"):
        quick(trained["dora"], space="compare")
    assert tree(hub)["README.md"] == card


def test_words_written_on_the_hub_survive_a_push(hub, ana, trained):
    quick(trained["dora"])
    repo = hub.repo("ana/adapter")
    mark = b"<!-- minilora:free-text intro -->\n"
    card = tree(hub)["README.md"]
    assert mark in card
    repo.push({"README.md": card.replace(mark, mark + b"Made for the fair.\n")})
    assert quick(trained["dora"]).plan.sends == ()
    assert {file.path for file in quick(trained["dora"], space="ana/compare").plan.sends} == {"README.md"}
    assert b"Made for the fair." in tree(hub)["README.md"]
    repo.push({"README.md": card.replace(b"<!-- /minilora:free-text -->", b"")})
    with pytest.raises(PublishError, match=r"README.md in ana/adapter cannot be kept .*is not closed"):
        quick(trained["dora"])
    repo.push({"README.md": b"# Mine\n"})
    result = quick(trained["dora"])
    assert any("the README.md in the repo was not written by minilora" in note for note in result.plan.notes)
    assert tree(hub)["README.md"] == card


def written(card: bytes, text: str, section: str = "intro", *, was: str = "") -> bytes:
    """A card with a text in a free-text section, in the place of the one that was there."""
    mark = f"<!-- minilora:free-text {section} -->\n"
    before = (mark + (f"{was}\n" if was else "")).encode()
    assert before in card
    return card.replace(before, (mark + (f"{text}\n" if text else "")).encode())


def texts(hub) -> dict[str, str]:
    return {name: text for name, text in sections_of(tree(hub)["README.md"].decode()).items() if text}


@pytest.fixture
def on_both_sides(hub, ana, copy_of):
    """A repo with the text "first", pushed from a folder with a card of its own; returns it and the folder."""
    folder = copy_of("mixlora")
    card = write_card(folder, repo_id="ana/adapter")
    card.write_bytes(written(card.read_bytes(), "first"))
    quick(folder)
    assert texts(hub) == {"intro": "first"}
    return hub.repo("ana/adapter"), folder


def test_words_of_both_cards_are_kept_section_by_section(hub, on_both_sides):
    """A text that only one side has or changed is kept, and the Space that only the Hub's card names."""
    repo, folder = on_both_sides
    card = folder / "README.md"
    quick(folder, space="ana/compare")
    repo.push({"README.md": written(tree(hub)["README.md"], "of the Hub", "limits")})
    card.write_bytes(written(card.read_bytes(), "second", was="first"))
    quick(folder)
    assert texts(hub) == {"intro": "second", "limits": "of the Hub"}
    assert b"/spaces/ana/compare?" in tree(hub)["README.md"]
    assert quick(folder).plan.sends == ()
    repo.push({"README.md": written(tree(hub)["README.md"], "third", was="second")})
    assert quick(folder).plan.sends == ()
    assert texts(hub) == {"intro": "third", "limits": "of the Hub"}
    card.unlink()
    write_card(folder, repo_id="ana/adapter")
    quick(folder)
    assert texts(hub) == {"intro": "third", "limits": "of the Hub"}


def test_a_section_written_on_both_sides_is_refused_by_name(hub, on_both_sides):
    repo, folder = on_both_sides
    card = folder / "README.md"
    edited = written(tree(hub)["README.md"], "of the Hub", was="first")
    repo.push({"README.md": edited})
    card.write_bytes(written(card.read_bytes(), "of the folder", was="first"))
    with pytest.raises(
        AdapterError, match=r"nothing was sent: the free-text section 'intro' of README\.md was written"
    ):
        quick(folder)
    assert tree(hub)["README.md"] == edited
    card.write_bytes(written(card.read_bytes(), "", was="of the folder"))
    assert quick(folder).plan.sends == ()
    assert texts(hub) == {"intro": "of the Hub"}


def test_a_section_emptied_on_the_hub_stays_empty(hub, on_both_sides):
    repo, folder = on_both_sides
    repo.push({"README.md": written(tree(hub)["README.md"], "", was="first")})
    for _ in range(2):
        note = "the free-text section 'intro' was emptied on the Hub, and stays empty"
        assert note in quick(folder).plan.notes
        assert texts(hub) == {}


def test_a_text_in_a_card_of_an_earlier_version_is_replaced_with_a_note(hub, on_both_sides):
    repo, folder = on_both_sides
    repo.push({"README.md": re.sub(rb"<!-- minilora:pushed .*\n", b"", tree(hub)["README.md"])})
    card = folder / "README.md"
    card.write_bytes(written(card.read_bytes(), "second", was="first"))
    assert any("section 'intro'" in note and "replaces another" in note for note in quick(folder).plan.notes)
    assert texts(hub) == {"intro": "second"}


def test_cards_with_line_ends_of_windows_keep_their_text(hub, on_both_sides):
    repo, folder = on_both_sides
    repo.push({"README.md": written(tree(hub)["README.md"], "of the Hub", "limits").replace(b"\n", b"\r\n")})
    (folder / "README.md").write_bytes((folder / "README.md").read_bytes().replace(b"\n", b"\r\n"))
    assert quick(folder).plan.notes == ()
    assert texts(hub) == {"intro": "first", "limits": "of the Hub"}
    assert b"\r" not in tree(hub)["README.md"]


def test_another_licence_has_no_name_and_link_of_the_old_one(hub, ana, copy_of):
    folder = copy_of("mixlora")
    edit_json(folder / "results.json", license="other", license_name="mine", license_link="https://example.org/mine")
    quick(folder, license="other")
    assert b"[mine](<https://example.org/mine>)" in tree(hub)["README.md"]
    quick(folder, license="mit")
    results = json.loads(tree(hub)["results.json"])
    assert [results.get(f"license{part}") for part in ("", "_name", "_link")] == ["mit", None, None]
    assert b"The adapter: mit." in tree(hub)["README.md"]
    assert b"example.org/mine" not in tree(hub)["README.md"]


@pytest.mark.parametrize("name", ["adapter", "new"])
def test_a_dry_run_knows_whose_a_bare_name_is(hub, ana, trained, name, monkeypatch):
    quick(trained["mixlora"])
    plan = quick(trained["mixlora"], name, dry_run=True).plan
    assert (plan.repo_id, plan.creates) == (f"ana/{name}", name == "new")
    monkeypatch.delenv("HF_TOKEN")
    plan = quick(trained["mixlora"], name, dry_run=True).plan
    assert plan.repo_id == name
    assert any(f"nobody knows whose '{name}' is" in note for note in plan.notes)


def test_public_only_when_it_is_said(hub, ana, trained):
    quick(trained["dora"], private=False)
    assert not hub.repo("ana/adapter").private
    before = hub.repo("ana/adapter").commit("main").oid
    with pytest.raises(PublishError, match=r"is public.*--public"):
        quick(trained["mixlora"])
    assert hub.repo("ana/adapter").commit("main").oid == before
    hub.repo("ana/adapter").private = True
    with pytest.raises(PublishError, match=rf"ana/adapter is private.*--public.*{hub.endpoint}/ana/adapter/settings"):
        quick(trained["mixlora"], private=False)
    assert hub.repo("ana/adapter").commit("main").oid == before


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda hub, patch: patch.setenv("HF_TOKEN", ""), "no token for the Hub: log in with `hf auth login`"),
        (lambda hub, patch: patch.setenv("HF_TOKEN", hub.add_user("ana", role="read")), "token of ana may only read"),
        (lambda hub, patch: patch.setenv("HF_TOKEN", "hf_unknown"), "the token is not valid"),
        (lambda hub, patch: patch.setenv("HF_TOKEN", hub.add_user("ben")), "ben may not write under 'ana'"),
    ],
)
def test_credentials_are_checked_before_any_work(hub, monkeypatch, tmp_path, prepare, message):
    prepare(hub, monkeypatch)
    with pytest.raises(PublishError, match=message) as caught:
        quick(tmp_path / "is not even looked at")
    assert "hf_" not in str(caught.value)
    assert all(record.path == "/api/whoami-v2" for record in hub.requests)


def test_names_of_bases(hub, ana, copy_of, base_folder):
    """A local path is refused unless its real id is given; the embedded alias becomes the id it stands for."""
    folder = copy_of()
    config = json.loads((folder / "config.json").read_text())
    config["base_model_name_or_path"] = str(base_folder)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="folder of this machine"):
        quick(folder)
    quick(folder, base_id="org/base")
    published = json.loads(tree(hub)["config.json"])
    assert published["base_model_name_or_path"] == "org/base"
    assert published["base_fingerprint"] == config["base_fingerprint"]
    assert not [name for name, data in tree(hub).items() if str(base_folder).encode() in data]


def test_the_base_of_another_training_is_refused(hub, ana, trained, tmp_path):
    import tiny_stand_ins

    other = tmp_path / "other"
    tiny_stand_ins.tiny_llama(seed=9).save_pretrained(other)
    with pytest.raises(AdapterError, match="has fingerprint sha256"):
        quick(trained["dora"], base_model=str(other))


@pytest.mark.parametrize("name", ["tag", "revision", "message", "base_id", "license"])
def test_an_empty_argument_is_refused(hub, ana, trained, name):
    with pytest.raises(ValueError, match=f"{name}='': is empty"):
        quick(trained["dora"], **{name: ""})
    assert hub.requests == []


def test_a_folder_that_is_none(hub, ana, tmp_path):
    with pytest.raises(AdapterError, match="no such folder"):
        quick(tmp_path / "gone")
    assert ("model", "ana/adapter") not in hub.repos


def test_a_push_sends_under_the_hash_that_was_checked(hub, monkeypatch, trained):
    """The client does not hash it again; the Hub does, and finds it right."""
    monkeypatch.setenv("HF_TOKEN", hub.add_user("ana"))
    monkeypatch.setattr("huggingface_hub.lfs.sha_fileobj", lambda file, *_: pytest.fail(f"{file.name} was read"))
    result = push(trained["mixlora"], "ana/adapter", verify=False, progress=False)
    sent = hub.repo("ana/adapter").commit("main").blobs["adapter_model.safetensors"]
    assert sent.lfs
    assert {file.path: file.sha256 for file in result.plan.files}["adapter_model.safetensors"] == sent.sha256
