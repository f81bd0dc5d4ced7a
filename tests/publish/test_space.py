"""`push_space` against the HTTP Hub: what is staged and sent, what is set, what is waited for, what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from hub.server import HubServer
from packaging.requirements import Requirement

from minilora_hub.errors import AdapterError, PublishError
from minilora_hub.publish.space import push as spaces
from minilora_hub.publish.space.files import MARKER, PACKAGE, SpaceSettings, requirements, space_card, stage
from minilora_hub.publish.space.push import push_space

ROOT = Path(__file__).parents[2]
DORA = {"config.json": b'{"model_type": "dora", "base_model_name_or_path": "org/base"}'}
WEIGHTS = {"adapter_model.safetensors": b"weights"}

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with a base and two adapters; the client in this process talks to it, and nobody sleeps."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with HubServer(lfs_threshold=10**7) as server:
        server.use_in_process(monkeypatch, tmp_path / "hf")
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        server.add_repo("org/base", files={"config.json": b"{}"})
        server.add_repo("ana/dora", files=DORA | WEIGHTS)
        server.add_repo("ana/lora", files=WEIGHTS | {"adapter_config.json": DORA["config.json"]})
        yield server


@pytest.fixture
def push(hub):
    """push_space as ana, without progress."""
    token = hub.add_user("ana")

    def pushed(*arguments, **options):
        return push_space(*arguments, **{"token": token, "progress": False, **options})

    return pushed


def card_of(files):
    text = files["README.md"].decode()
    return yaml.safe_load(text.split("---")[1])


def test_a_new_space(hub, push):
    """One commit, private, with everything that it needs; it is waited for until it runs."""
    done = push("ana/compare", ["ana/dora", "ana/lora"], hardware="zero-a10g", title="Compare mine")
    repo = hub.repo("ana/compare", "space")
    assert (done.commit, done.stage, done.creates) == (repo.commit().oid, "RUNNING", True)
    assert done.url == f"{hub.endpoint}/spaces/ana/compare"
    assert repo.private
    assert repo.sdk == "gradio"
    assert len(repo.commits()) == 2
    assert repo.space.hardware == "zero-a10g"
    assert repo.space.variables == {"MINILORA_BASE": "org/base", "MINILORA_ADAPTERS": "ana/dora,ana/lora"}
    files = repo.files()
    assert set(files) == set(done.files)
    assert files["app.py"] == (ROOT / "app.py").read_bytes()
    assert files["minilora_hub/demo/ui/app.py"] == (PACKAGE / "demo" / "ui" / "app.py").read_bytes()
    assert files["minilora_hub/demo/static/page.css"]
    assert not any(path.startswith("model_cards/") or "__pycache__" in path for path in files)
    card = card_of(files)
    assert (card["title"], card["sdk"], card["app_file"]) == ("Compare mine", "gradio", "app.py")
    assert card["models"] == ["org/base", "ana/dora", "ana/lora"]
    links = re.findall(r"\]\((.*?)\)", files["README.md"].decode())
    assert links == [f"{hub.endpoint}/{name}" for name in card["models"]]
    assert card["preload_from_hub"] == ["org/base", "ana/dora", "ana/lora"]
    assert card["suggested_hardware"] == "zero-a10g"
    assert "torch==2.10.0" in files["requirements.txt"].decode().splitlines()


def test_without_adapters_the_shipped_ones_travel(hub, push):
    """With the embedded base, and what that needs."""
    done = push("compare")
    repo = hub.repo("ana/compare", "space")
    assert done.space == "ana/compare"
    assert repo.space.variables == {"MINILORA_BASE": "embedded"}
    for folder in (ROOT / "model_cards").iterdir():
        assert f"model_cards/{folder.name}/adapter_model.safetensors" in repo.files()
    assert "gguf==" in repo.files()["requirements.txt"].decode()
    assert "preload_from_hub" not in card_of(repo.files())


def test_an_update_changes_what_differs(hub, push):
    """The second push of the same changes nothing; one of something else sets, removes and deletes what is ours."""
    first = push("ana/compare")
    repo = hub.repo("ana/compare", "space")
    repo.push({"notes.md": b"mine", "minilora_hub/gone.py": b"old"})
    second = push("ana/compare")
    assert not second.creates
    assert second.deletes == ("minilora_hub/gone.py",)
    assert "minilora_hub/gone.py" not in repo.files()
    assert repo.files()["notes.md"] == b"mine"
    assert push("ana/compare").commit == second.commit != first.commit
    assert repo.space.restarts == 0
    third = push("ana/compare", ["ana/dora"], variables={"MINILORA_MAX_TOKENS": "64"}, hardware="zero-a10g", mcp=True)
    assert repo.space.variables == {
        "MINILORA_BASE": "org/base",
        "MINILORA_ADAPTERS": "ana/dora",
        "MINILORA_MAX_TOKENS": "64",
        "MINILORA_MCP": "1",
    }
    assert repo.space.hardware == "zero-a10g"
    assert repo.commit().oid == third.commit
    assert not any(path.startswith("model_cards/") for path in repo.files())
    assert "gradio[mcp]==" in repo.files()["requirements.txt"].decode()
    push("ana/compare")
    assert repo.space.variables == {"MINILORA_BASE": "embedded", "MINILORA_MAX_TOKENS": "64"}


def test_secrets_reach_the_settings_and_no_file(hub, push):
    """Nor the plan, nor what is printed of it."""
    hub.add_repo("ana/hidden", files=DORA | WEIGHTS, private=True)
    with pytest.raises(PublishError, match="ana/hidden is private: the Space needs a token to read it"):
        push("ana/compare", ["ana/hidden"])
    assert ("space", "ana/compare") not in hub.repos
    done = push("ana/compare", ["ana/hidden"], secrets={"HF_TOKEN": "hf_very_secret"})
    repo = hub.repo("ana/compare", "space")
    assert repo.space.secrets == {"HF_TOKEN": "hf_very_secret"}
    assert "very_secret" not in json.dumps(done.to_dict())
    assert not any(b"very_secret" in data for data in repo.files().values())
    assert done.secrets == ("HF_TOKEN",)
    assert card_of(repo.files())["preload_from_hub"] == ["org/base"]
    push("ana/compare", ["ana/hidden"], secrets={"HF_TOKEN": "hf_another"})
    assert repo.space.secrets == {"HF_TOKEN": "hf_another"}


def test_a_dry_run_sends_nothing(hub, push):
    """It only looks."""
    plan = push("ana/compare", ["ana/dora"], dry_run=True)
    assert (plan.dry_run, plan.commit, plan.stage, plan.creates) == (True, None, None, True)
    assert plan.files["app.py"] == (ROOT / "app.py").stat().st_size
    assert MARKER in plan.card
    assert ("space", "ana/compare") not in hub.repos
    assert {record.method for record in hub.requests} <= {"GET", "HEAD"}


def test_a_dry_run_knows_whose_a_bare_name_is(hub, push):
    push("ana/compare")
    done = push("compare", dry_run=True)
    assert (done.space, done.creates) == ("ana/compare", False)
    with pytest.raises(PublishError, match=r"nobody knows whose Space 'compare' is: write OWNER/compare, or log in"):
        push("compare", dry_run=True, token=None)


def test_a_private_space_is_not_made_public(hub, push):
    commit = push("ana/compare").commit
    with pytest.raises(PublishError, match=rf"is private, and --public .*{hub.endpoint}/spaces/ana/compare/settings"):
        push("ana/compare", private=False)
    repo = hub.repo("ana/compare", "space")
    assert (repo.private, repo.commit().oid) == (True, commit)


def test_a_dry_run_needs_no_hub(monkeypatch):
    """Nor a token."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    plan = push_space("me/compare", dry_run=True, progress=False)
    assert plan.creates
    with pytest.raises(AdapterError, match="name it with --base"):
        push_space("me/compare", ["me/x"], dry_run=True, progress=False)
    assert push_space("me/compare", ["me/x"], base="org/b", dry_run=True, progress=False).variables == {
        "MINILORA_BASE": "org/b",
        "MINILORA_ADAPTERS": "me/x",
    }


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (["ana/compare", ["./mine"]], {}, "publish it first"),
        (["ana/compare", ["ana/gone"]], {}, "ana/gone is not on the Hub"),
        (["ana/compare", ["org/base"]], {}, "org/base holds no adapter"),
        (["ana/compare", ["ana/dora", "ana/other"]], {}, "must be for one base"),
        (["ana/compare", ["no id"]], {}, "must be an id on the Hub"),
        (["ana/compare"], {"base": "./here"}, "needs the id of a model on the Hub"),
        (["ana/compare"], {"base": "org/gone"}, "the base org/gone is not on the Hub"),
        (["ana/compare"], {"hardware": "h900"}, "hardware='h900': must be one of cpu-basic"),
        (["ana/compare"], {"variables": {"1x": "a"}}, "variable '1x'"),
        (["ana/compare"], {"variables": {"HF_TOKEN": "a"}}, "variable HF_TOKEN: is the name of a secret"),
        (
            ["ana/compare"],
            {"variables": {"A": "x hf_abcdefghij0"}},
            r"A: its value looks like a Hub token, and every\w+ ",
        ),
        (["ana/compare"], {"variables": {"MINILORA_BASE": "a"}}, "variable MINILORA_BASE: .* sets itself: pass base"),
        (["ana/compare"], {"secrets": {"MINILORA_MCP": "1"}}, "variable MINILORA_MCP: .* sets itself: pass mcp"),
        (["ana/compare", ["ana/dora", "ana/dora"]], {}, "adapter 'ana/dora': is given 2 times"),
        (["ana/compare"], {"secrets": {"A": ""}}, "secret A=''"),
        (["ana/compare"], {"secrets": {"A": "a"}, "variables": {"A": "b"}}, "given as a variable and as a secret"),
        (["ben/compare"], {}, "ana may not write under 'ben'"),
        (["ana/taken"], {}, "did not make: nothing is overwritten"),
        (["ana/open"], {}, "ana/open is public already: pass --public"),
        (["ana/compare"], {"token": "hf_unknown"}, "the token is not valid"),
    ],
)
def test_what_is_refused_changes_nothing(hub, push, arguments, options, message):
    """One line that says what to do, before anything is changed."""
    other = {"config.json": DORA["config.json"].replace(b"org/base", b"org/another")}
    hub.add_repo("ana/other", files=other | WEIGHTS)
    for name, private in (("ana/taken", True), ("ana/open", False)):
        hub.add_repo(name, "space", files={"app.py": b"mine", "README.md": b"---\nsdk: gradio\n---\n"}, private=private)
    before = {key: repo.commit().oid for key, repo in hub.repos.items()}
    with pytest.raises((PublishError, AdapterError, ValueError), match=message) as caught:
        push(*arguments, **options)
    assert "\n" not in str(caught.value)
    assert {key: repo.commit().oid for key, repo in hub.repos.items()} == before
    assert {record.method for record in hub.requests} <= {"GET", "HEAD"}


def test_hardware_that_costs_is_the_hubs_word(hub, push):
    """What the Hub refuses is told with its reason; the files are as they were."""
    push("ana/compare")
    head = hub.repo("ana/compare", "space").commit().oid
    with pytest.raises(PublishError, match=r"402.*needs a payment method.*its files are as they were"):
        push("ana/compare", hardware="a10g-small")
    assert hub.repo("ana/compare", "space").commit().oid == head


@pytest.mark.parametrize("fault", [{"kind": "status", "status": 503}, {"kind": "drop"}])
@pytest.mark.parametrize("applied", [False, True])
def test_a_lost_answer_is_looked_up(hub, push, fault, applied):
    """Whether the commit was made or not: in the end there is exactly one."""
    hub.faults.add(**fault, method="POST", path_regex="/commit/", applied=applied)
    done = push("ana/compare", ["ana/dora"])
    repo = hub.repo("ana/compare", "space")
    assert (repo.commit().oid, len(repo.commits())) == (done.commit, 2)


def test_somebody_elses_commit_is_not_overwritten(hub, push, monkeypatch):
    """One between the look and the commit."""
    push("ana/compare")
    repo = hub.repo("ana/compare", "space")
    staged = spaces.stage

    def meanwhile(folder, settings):
        repo.push({"app.py": b"theirs"})
        return staged(folder, settings)

    monkeypatch.setattr(spaces, "stage", meanwhile)
    with pytest.raises(PublishError, match="ana/compare has received another commit meanwhile"):
        push("ana/compare", ["ana/dora"])
    assert repo.files()["app.py"] == b"theirs"


@pytest.mark.parametrize("late", [0, 3])
def test_the_stage_of_the_commit_before_is_not_believed(hub, push, late):
    """Right after a commit the Hub may still tell what ran before."""
    push("ana/compare")
    space = hub.repo("ana/compare", "space").space
    space.late, space.stages = late, ("RUNNING_BUILDING", "RUNNING_APP_STARTING", "RUNNING")
    looks = len(hub.sent("GET", "/runtime"))
    assert push("ana/compare", ["ana/dora"]).stage == "RUNNING"
    assert len(hub.sent("GET", "/runtime")) - looks == late + 3


@pytest.mark.parametrize(
    ("stage_name", "log"), [("BUILD_ERROR", "No matching distribution"), ("RUNTIME_ERROR", "app.py: MINILORA_BASE")]
)
def test_a_space_that_fails_is_told_with_its_logs_last_line(hub, push, stage_name, log):
    """And where to read all of it."""
    push("ana/compare")
    space = hub.repo("ana/compare", "space").space
    space.stages, space.log = ("BUILDING", stage_name), ("first", log, "")
    with pytest.raises(PublishError, match=rf"ana/compare: {stage_name}: {log} \(the whole log: http.*logs="):
        push("ana/compare", ["ana/dora"])


def test_a_space_that_never_runs_is_not_waited_for_for_ever(hub, push):
    """The limit is the caller's."""
    push("ana/compare", wait=0)
    hub.repo("ana/compare", "space").space.stages = ("BUILDING",)
    with pytest.raises(PublishError, match=r"does not run after 0.2 s \(BUILDING\)"):
        push("ana/compare", wait=0.2)


# ---- what is staged ----


def test_the_committed_space_is_what_the_code_renders():
    """spaces/compare/ is what a push of the shipped adapters sends, whatever versions are installed here."""

    def pins(text):
        return {requirement.name: requirement.specifier for requirement in map(Requirement, text.split())}

    committed = ROOT / "spaces" / "compare"
    rendered = space_card(SpaceSettings("minilora compare"))
    ours, theirs = (yaml.safe_load(text.split("---")[1]) for text in (rendered, (committed / "README.md").read_text()))
    assert theirs.pop("sdk_version").split(".")[0] == ours.pop("sdk_version").split(".")[0]
    assert theirs == ours
    assert (committed / "README.md").read_text().split("---\n", 2)[2] == rendered.split("---\n", 2)[2]
    wanted = pins(requirements(SpaceSettings("minilora compare")))
    pinned = pins((committed / "requirements.txt").read_text())
    assert pinned.keys() == wanted.keys()
    assert all(str(pin).startswith("==") for pin in pinned.values())


def test_every_pin_is_a_version_that_the_package_allows():
    """Those of ZeroGPU, too, whose torch is not the one that is installed here."""
    from importlib import metadata

    declared = {}
    for line in metadata.requires("minilora_hub"):
        requirement = Requirement(line)
        if requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in ("demo", "embedded")
        ):
            declared[requirement.name.lower()] = requirement.specifier
    for hardware in (None, "zero-a10g"):
        for line in requirements(SpaceSettings("x", hardware=hardware)).split():
            name, _, version = line.partition("==")
            assert "+" not in version
            assert version in declared[name], line


def test_the_short_description_fits(tmp_path):
    """The Hub takes 60 characters."""
    assert len(yaml.safe_load(space_card(SpaceSettings("x")).split("---")[1])["short_description"]) <= 60


def test_staging_leaves_out_what_was_generated(tmp_path):
    """Compiled and generated files, and the folders of tests."""
    paths = stage(tmp_path, SpaceSettings("x", "org/base", ("a/b",)))
    assert {path.rpartition(".")[2] for path in paths} <= {
        "py", "md", "txt", "gz", "js", "css", "html", "svg", "json", "jinja", "typed",
    }  # fmt: skip
