"""What `verify` proves, and what it refuses; each time the other process has never heard of minilora_hub."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny_stand_ins
from formats.helpers import edit_json

from minilora_hub import push
from minilora_hub.adapter_folder.code import (
    REGISTRY,
    code_files,
    code_hash,
    release_of,
    remote_code_files,
    remote_code_hash,
)
from minilora_hub.adapter_folder.verification import Verification
from minilora_hub.errors import AdapterError
from minilora_hub.publish.verify.file_checks import check_files
from minilora_hub.publish.verify.isolated_process import IsolatedProcess
from minilora_hub.publish.verify.report import VerifyReport
from minilora_hub.publish.verify.verify import verify
from minilora_hub.recording.logits import difference

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def copied(good, tmp_path):
    """Copy a published folder, for a test to change."""

    def copy(method="dora"):
        return shutil.copytree(good[method], tmp_path / "published")

    return copy


def steps(report):
    return {step.name: step for step in report.steps}


def rewritten(folder, **changes):
    """Change verification.json, and let it tell the truth about all other files."""
    from minilora_hub.adapter_folder.verification import is_hashed
    from minilora_hub.publish.push.build import list_files

    hashes = {file.path: file.sha256 for file in list_files(folder) if is_hashed(file.path)}
    content = Verification.load(folder).to_dict() | {"sha256": hashes} | changes
    Verification.from_dict(json.loads(json.dumps(content))).save(folder)
    return folder


# Adapters with the same code come one after the other: other code starts another process.
@pytest.mark.parametrize(
    "method", [pytest.param("lora", marks=pytest.mark.slow), pytest.param("mixlora", marks=pytest.mark.slow), "dora"]
)
def test_a_good_folder(process, good, base_folder, method):
    report = verify(good[method], base_model=str(base_folder), process=process)
    assert report.ok, report.problem
    expected = {"hashes", "code", "loading", "logits"}
    if method != "lora":
        expected |= {"copy with a missing tensor", "copy with a NaN"}
        assert steps(report)["loading"].detail.startswith("transformers_modules.")
        assert ".lora_" in steps(report)["copy with a missing tensor"].detail  # one of them, under its own name
        assert "values that are not finite" in steps(report)["copy with a NaN"].detail
    assert set(steps(report)) == expected | ({"peft/"} if method == "dora" else set())
    assert report.difference < 1e-4
    assert json.loads(json.dumps(report.to_dict()))["ok"]


def test_a_licence_that_was_added_on_the_hub_verifies_and_other_files_do_not(copied):
    folder = copied()
    for name in ("LICENSE", "NOTICE", ".eval_results/org__tasks.yaml"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("words\n")
    report = VerifyReport(folder.name, None)
    assert check_files(folder, report, trust=False), report.problem
    for name in ("helper.py", "adapter_config.json", "model.safetensors", "notes.txt", "peft/LICENSE"):
        (folder / name).write_text("{}")
        report = VerifyReport(folder.name, None)
        assert not check_files(folder, report, trust=False)
        assert f"not recorded: {name}" in str(report.problem) or name == "adapter_config.json"
        (folder / name).unlink()


def test_other_logits_are_told(process, copied, base_folder):
    folder = copied()
    logits = [list(row) for row in Verification.load(folder).top_logits]
    logits[1][3] += 0.5
    report = verify(rewritten(folder, top_logits=logits), base_model=str(base_folder), process=process)
    assert not steps(report)["logits"].ok
    assert report.difference == pytest.approx(0.5, abs=1e-3)


def test_another_base_is_told(process, good, tmp_path):
    other = tmp_path / "other"
    tiny_stand_ins.tiny_llama(seed=9).save_pretrained(other)
    report = verify(good["mixlora"], base_model=str(other), process=process)
    assert not steps(report)["logits"].ok


def test_a_peft_folder_with_other_weights(process, copied, base_folder):
    folder = copied()
    shutil.copyfile(folder / "adapter_model.safetensors", folder / "peft" / "adapter_model.safetensors")
    report = verify(rewritten(folder), base_model=str(base_folder), process=process)
    assert not report.ok


def test_unknown_code_is_refused_before_it_runs(process, copied, base_folder, tmp_path):
    folder, trace = copied(), tmp_path / "it ran"
    code = folder / "modeling_minilora.py"
    code.write_text(f"open({str(trace)!r}, 'w').close()\n" + code.read_text())
    rewritten(folder)
    refused = verify(folder, base_model=str(base_folder), process=process)
    assert not refused.ok
    assert "is not a release of minilora_hub" in refused.problem
    assert "--trust-remote-code" in refused.problem
    assert not trace.exists()
    trusted = verify(folder, base_model=str(base_folder), trust_remote_code=True, process=process)
    assert trusted.ok, trusted.problem
    assert trace.exists()


SPY = """
import json, os, pathlib, socket
import huggingface_hub
found = {{"variables": dict(os.environ), "token": huggingface_hub.get_token(), "home": str(pathlib.Path.home())}}
found["offline"] = huggingface_hub.constants.is_offline_mode()
try:
    import minilora_hub.errors
except ImportError:
    found["minilora_hub"] = None
pathlib.Path({trace!r}).write_text(json.dumps(found))
"""


def test_the_process_has_no_token_no_network_and_no_minilora_hub(hub, copied, tmp_path, monkeypatch):
    """A private adapter and its private base are fetched with a token; the code then runs without any of these."""
    folder, trace = copied(), tmp_path / "what it saw"
    code = folder / "modeling_minilora.py"
    code.write_text(SPY.format(trace=str(trace)) + code.read_text())
    rewritten(folder)
    secret = hub.add_user("ana", organizations=("org",))
    hub.repo("org/base").private = True
    hub.add_repo("ana/adapter", private=True, files={
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    })  # fmt: skip
    stored = tmp_path / "hf" / "token"
    stored.parent.mkdir(exist_ok=True)
    stored.write_text(secret)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("HF_TOKEN_PATH", str(stored))
    monkeypatch.setenv("HOME", str(tmp_path))
    asked = []
    with IsolatedProcess() as process:
        run = process.run
        monkeypatch.setattr(process, "run", lambda *job: asked.append(len(hub.requests)) or run(*job))
        report = verify("ana/adapter", token=secret, trust_remote_code=True, progress=False, process=process)
    assert report.ok, report.problem
    assert asked == [len(hub.requests)]
    seen = json.loads(trace.read_text())
    assert seen["offline"]
    assert seen["token"] is None
    assert seen["minilora_hub"] is None
    assert [name for name, value in seen["variables"].items() if secret in value] == []
    assert {"HF_TOKEN_PATH", "HF_ENDPOINT", "HUGGING_FACE_HUB_TOKEN", "HTTPS_PROXY"}.isdisjoint(seen["variables"])
    assert str(tmp_path) != seen["home"]


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("config.json", {"AutoModelForCausalLM": "modeling_minilora.MixLoraForCausalLM"}, "must be like {'AutoConfig'"),
        ("config.json", {"AutoTokenizer": ["routing.Routing", None]}, "must be like {'AutoConfig'"),
        ("config.json", None, "auto_map=None: must be like {'AutoConfig'"),
        ("tokenizer_config.json", {"AutoTokenizer": ["attach.Tokenizer", None]}, "auto_map names 'attach.Tokenizer'"),
    ],
)
def test_released_code_under_other_names_is_refused(process, copied, base_folder, monkeypatch, file, change, told):
    """The hash is that of a release, and every module lies in the repo: only our own classes may be named."""
    folder = copied()
    content = json.loads((folder / file).read_text())
    if change is None:
        del content["auto_map"]
    else:
        content["auto_map"] = content.get("auto_map", {}) | change
    (folder / file).write_text(json.dumps(content))
    monkeypatch.setattr(process, "run", lambda *_: pytest.fail("something was loaded"))
    report = verify(rewritten(folder), base_model=str(base_folder), process=process)
    assert report.code == remote_code_hash()
    assert report.problem.startswith(f"code: {file}: ")
    assert told in report.problem


def test_links_and_holes_are_refused_before_anything_is_read(process, copied, tmp_path, monkeypatch):
    folder = copied()
    monkeypatch.setattr(process, "run", lambda *_: pytest.fail("something was loaded"))
    weights = folder / "adapter_model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(10**13)
    assert "nearly all of them are holes" in verify(folder, process=process).problem
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    assert "adapter_model.safetensors is a symbolic link out of the folder" in verify(folder, process=process).problem


def test_an_index_that_leaves_the_folder(process, copied, base_folder):
    folder = copied()
    index = {"weight_map": {"a": "../../elsewhere.safetensors"}}
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    report = verify(rewritten(folder), base_model=str(base_folder), process=process)
    assert report.problem.startswith("files: adapter_model.safetensors.index.json: weight_map names")


def test_a_named_base_that_nobody_has(process, copied, hub):
    for name, told in (
        ("org/gone", "'org/gone' is not on the Hub"),
        ("embedded", "='embedded' is not an id on the Hub"),
    ):
        folder = copied()
        edit_json(folder / "config.json", base_model_name_or_path=name)
        report = verify(rewritten(folder), progress=False, process=process)
        assert not steps(report)["loading"].ok
        assert told in report.problem
        shutil.rmtree(folder)


@pytest.mark.slow
def test_a_class_that_is_not_the_repos(process, copied, base_folder):
    """A repo whose config leads to another class does not pass, whatever that computes."""
    folder = copied()
    config = json.loads((folder / "config.json").read_text())
    (folder / "other.py").write_text(
        "from .modeling_minilora import DoraForCausalLM\nclass Mine(DoraForCausalLM): ...\n"
    )
    config["auto_map"]["AutoModelForCausalLM"] = "other.Mine"
    (folder / "config.json").write_text(json.dumps(config))
    report = verify(rewritten(folder), base_model=str(base_folder), trust_remote_code=True, process=process)
    assert not steps(report)["loading"].ok


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tolerance": 5.0}, "tolerance=5"),
        ({"dtype": "int8"}, "dtype='int8'"),
    ],
)
def test_a_record_that_asks_for_too_little(process, copied, base_folder, changes, message):
    report = verify(rewritten(copied(), **changes), base_model=str(base_folder), process=process)
    assert message in report.problem


@pytest.mark.slow
def test_a_process_that_dies_is_an_answer(process, copied, base_folder):
    folder = copied()
    code = folder / "modeling_minilora.py"
    code.write_text("import os\nos._exit(9)\n" + code.read_text())
    report = verify(rewritten(folder), base_model=str(base_folder), trust_remote_code=True, process=process)
    assert "ended with code 9" in report.problem
    assert verify(folder, base_model=str(base_folder), process=process).problem  # and the next one starts afresh


@pytest.mark.slow
def test_a_published_repo_with_its_revision(hub, trained, monkeypatch):
    """From the Hub, with the base that it names, at a tag and at main, by a user and by nobody."""
    token = hub.add_user("ana")
    monkeypatch.setenv("HF_TOKEN", token)
    first = push(trained["dora"], "ana/adapter", tag="v1", verify=False, progress=False)
    hub.repo("ana/adapter").push({"adapter_model.safetensors": b"broken"})
    with IsolatedProcess() as process:
        assert verify("ana/adapter", revision="v1", progress=False, process=process).revision == first.commit
        monkeypatch.setenv("HF_TOKEN", "")
        assert verify("ana/adapter", revision="v1", token=token, progress=False, process=process).ok
        report = verify("ana/adapter", token=token, progress=False, process=process)
    assert "changed since: adapter_model.safetensors" in report.problem
    with pytest.raises(AdapterError, match="ana/adapter is not on the Hub"):
        verify("ana/adapter", revision="main", progress=False)
    with pytest.raises(AdapterError, match="no such revision"):
        verify("ana/adapter", revision="v9", token=token, progress=False)


def test_what_is_no_adapter(tmp_path, hub):
    (tmp_path / "empty").mkdir()
    assert "neither config.json nor adapter_config.json" in verify(tmp_path / "empty", progress=False).problem
    with pytest.raises(AdapterError, match="neither a folder nor an id"):
        verify("a/b/c", progress=False)


def test_a_folder_that_was_never_pushed(trained):
    report = verify(trained["dora"], progress=False)
    assert not report.ok
    assert "no verification.json" in report.problem
    assert "`minilora push` writes" in report.problem


def test_the_registry_of_released_code(tmp_path):
    """This version's code is known without an entry; an entry is a version and its hashes."""
    assert release_of(remote_code_hash()) == "this version"
    assert release_of("sha256:0") is None
    copied = tmp_path / "code"
    copied.mkdir()
    for name, path in remote_code_files().items():
        shutil.copyfile(path, copied / name)
    assert code_hash(code_files(copied)) == remote_code_hash()
    for version, digests in json.loads(REGISTRY.read_text()).items():
        assert version[0].isdigit()
        assert all(len(digest) == len(remote_code_hash()) for digest in digests)


def test_difference_counts_what_overtakes():
    assert difference([[3.0, 2.0]], [[3.0, 2.0]], [1.0]) == 0
    assert difference([[3.0, 2.0]], [[3.0, 2.25]], [None]) == 0.25
    assert difference([[3.0, 2.0]], [[3.0, 2.0]], [2.5]) == 0.5
    assert difference([[3.0]], [[float("nan")]], [0.0]) != 0
