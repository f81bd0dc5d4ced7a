"""`minilora space push` as a shell sees it, against the HTTP Hub."""

from __future__ import annotations

import json

import pytest
from hub.server import HubServer

ADAPTER = {
    "config.json": b'{"model_type": "dora", "base_model_name_or_path": "org/base"}',
    "adapter_model.safetensors": b"weights",
}


@pytest.fixture
def hub():
    with HubServer(lfs_threshold=10**7) as server:
        server.add_repo("org/base", files={"config.json": b"{}"})
        server.add_repo("ana/dora", files=ADAPTER)
        yield server


@pytest.fixture
def shell(hub, run_on_hub):
    """A function that runs the command; no token is ever printed."""
    ours = hub.add_user("ana")

    def run(*arguments, token=ours, **variables):
        done = run_on_hub("space", "push", *arguments, token=token, **variables)
        assert ours not in done.stdout + done.stderr
        return done

    run.token = ours
    return run


@pytest.mark.slow
def test_push_prints_the_address_and_json(shell, hub):
    """First for people, with the steps on stderr, then for a script."""
    done = shell("ana/compare", "ana/dora", "--variable", "MINILORA_MAX_TOKENS=64", "--secret", "MINE", MINE="s3cret")
    assert done.returncode == 0, done.stderr
    repo = hub.repo("ana/compare", "space")
    assert done.stdout == f"{hub.endpoint}/spaces/ana/compare (commit {repo.commit().oid[:12]}, RUNNING)\n"
    assert [line.split(" (")[0] for line in done.stderr.splitlines() if line.startswith("✓")] == [
        "✓ Looking at the adapters",
        "✓ Looking at the Space",
        "✓ Staging",
        "✓ Setting it up",
        f"✓ Sending {len(repo.files())} files",
        "✓ Building",
        "✓ Starting",
    ]
    assert repo.space.secrets == {"MINE": "s3cret"}
    assert "s3cret" not in done.stdout + done.stderr
    done = shell("ana/compare", "ana/dora", "--json")
    told = json.loads(done.stdout)
    assert (told["space"], told["stage"], told["commit"]) == ("ana/compare", "RUNNING", repo.commit().oid)
    assert told["variables"] == {"MINILORA_BASE": "org/base", "MINILORA_ADAPTERS": "ana/dora"}
    assert "✓" not in done.stderr


def test_a_dry_run_shows_everything(shell, hub):
    """Files with their sizes, variables, names of secrets, requirements and card."""
    done = shell("ana/compare", "ana/dora", "--dry-run", "--hardware", "zero-a10g", "--secret", "MINE", MINE="s3cret")
    assert done.returncode == 0, done.stderr
    for part in (
        "ana/compare (a new Space, private), hardware: zero-a10g",
        "+ app.py ",
        "+ minilora_hub/demo/ui/app.py ",
        "variable: MINILORA_BASE=org/base",
        "secret: MINE",
        "torch==2.10.0",
        "sdk: gradio",
        "preload_from_hub:",
    ):
        assert part in done.stdout
    assert done.stdout.endswith("Nothing was sent.\n")
    assert "s3cret" not in done.stdout + done.stderr
    assert ("space", "ana/compare") not in hub.repos


def test_a_token_may_be_given_and_is_not_shown(shell, hub):
    """Though the environment is the safer place."""
    done = shell("ana/compare", "--token", shell.token, "--wait", "0", "--json", token=None)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stage"] is None
    assert hub.repo("ana/compare", "space").private


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ana/compare", "./mine"], "publish it first (minilora push ./mine OWNER/NAME)"),
        (["ana/compare", "ana/gone"], "ana/gone is not on the Hub"),
        (["ben/compare"], "ana may not write under 'ben'"),
    ],
)
def test_failures_are_one_line_and_exit_code_1(shell, arguments, message):
    done = shell(*arguments)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("minilora: ")
    assert message in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["ana/x", "--variable", "A"],
        ["ana/x", "--variable", "A=1", "--variable", "A=2"],
        ["ana/x", "--secret", "NOT_SET_ANYWHERE"],
        ["ana/x", "--secret", "MINE=s3cret"],
        ["ana/x", "--wait", "-1"],
        ["--bogus"],
    ],
)
def test_wrong_usage_is_2(shell, hub, arguments):
    done = shell(*arguments)
    assert done.returncode == 2
    assert "s3cret" not in done.stderr
    assert hub.requests == []


def test_a_variable_that_is_a_secret_is_refused_and_not_printed(shell, hub):
    for given in ("MINE=hf_abcdefghij0123456789", f"MINE={shell.token}", "HF_TOKEN=s3cret", "MINILORA_API_KEY=s3cret"):
        name, _, value = given.partition("=")
        done = shell("ana/x", "--variable", given, "--dry-run")
        assert done.returncode == 1
        assert f"variable {name}: " in done.stderr
        assert f"use secrets (--secret {name})" in done.stderr
        assert value not in done.stdout + done.stderr
    assert hub.requests == []
