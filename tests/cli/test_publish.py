"""push, verify, card, info, list and pull as a shell sees them; once as `hf` runs its extensions."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_stand_ins
from hub.server import HubServer

from minilora_hub.adapter_folder.results import Base, Results


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A tiny adapter as training leaves it, and its base."""
    from minilora_hub import MixLoraConfig, MixLoraForCausalLM

    folder = tmp_path_factory.mktemp("cli")
    tiny_stand_ins.tiny_llama().save_pretrained(folder / "base")
    tiny_stand_ins.byte_tokenizer().save_pretrained(folder / "base")
    model = MixLoraForCausalLM.from_base(str(folder / "base"), MixLoraConfig(r=4, num_experts=2))
    for name, parameter in model.adapter_parameters().items():
        if name.endswith("lora_B"):
            parameter.data.fill_(0.05)
    model.config.base_model_name_or_path = "org/base"
    model.save_pretrained(folder / "mine", tokenizer=tiny_stand_ins.byte_tokenizer())
    Results("mixlora", Base("org/base", license="mit"), license="mit", language=("en",)).save(folder / "mine")
    return folder


@pytest.fixture
def hub(adapter):
    with HubServer(lfs_threshold=10_000) as server:
        files = {path.name: path.read_bytes() for path in (adapter / "base").iterdir()}
        server.add_repo("org/base", files={**files, "README.md": b"---\nlicense: mit\n---\n"})
        yield server


@pytest.fixture
def shell(hub, run_on_hub, tmp_path):
    """A function that runs a command of ours, logged in as ana; a given program in a process of its own."""
    ours = hub.add_user("ana")

    def run(*arguments, program=None, token=ours):
        if program is None:
            done = run_on_hub(*arguments, token=token)
        else:
            done = subprocess.run(
                [*program, *map(str, arguments)],
                env={**os.environ, **hub.environment(token, cache_dir=tmp_path / "hf"), "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=200,
                cwd=tmp_path,
                stdin=subprocess.DEVNULL,
            )
        assert ours not in done.stdout + done.stderr
        return done

    return run


@pytest.mark.slow
def test_as_hf_runs_it_from_folder_to_verified_repo(shell, hub, adapter, tmp_path):
    """`hf` finds the script `hf-minilora` of the extension and runs it with HF_TOKEN in the environment."""
    script = shutil.which("hf-minilora", path=str(Path(sys.executable).parent))
    assert script, "the script hf-minilora is not installed beside python"
    done = shell("push", adapter / "mine", "ana/mine", "--yes", "--tag", "v1", "--json", program=[script])
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["ok"]
    assert result["verification"]["ok"]
    assert hub.repo("ana/mine").commit("v1").oid == result["commit"]
    assert hub.repo("ana/mine").private

    done = shell("verify", "ana/mine", "--revision", "v1")
    assert done.returncode == 0, done.stderr
    assert "computes the recorded logits" in done.stdout
    listed = shell("list", "--base", "org/base").stdout.splitlines()
    assert listed[0].split()[:2] == ["adapter", "method"]
    assert listed[1].split()[:2] == ["ana/mine", "MixLoRA"]
    told = json.loads(shell("info", "ana/mine", "--json").stdout)
    assert (told["method"], told["revision"]) == ("MixLoRA", result["commit"])
    done = shell("pull", "ana/mine", "--out", tmp_path / "pulled")
    assert done.stdout.strip() == str(tmp_path / "pulled")
    assert (tmp_path / "pulled" / "config.json").is_file()

    hub.repo("ana/mine").push({"adapter_model.safetensors": b"damaged"})
    done = shell("verify", "ana/mine", "--json")
    assert done.returncode == 1
    assert not json.loads(done.stdout)["ok"]
    assert done.stderr.splitlines()[-1].startswith("minilora: ana/mine does not verify: hashes: changed since")


def test_dry_run_shows_files_hashes_and_card(shell, hub, adapter):
    done = shell("push", adapter / "mine", "ana/mine", "--space", "ana/compare", "--endpoint", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "ana/mine (a new repo, private), main" in done.stdout
    assert "+ adapter_model.safetensors" in done.stdout
    assert "+ handler.py" in done.stdout
    assert "base_model: org/base" in done.stdout
    assert f"({hub.endpoint}/spaces/ana/compare?adapter=ana%2Fmine)" in done.stdout
    assert done.stdout.endswith("Nothing was sent.\n")
    assert ("model", "ana/mine") not in hub.repos


def test_notes_are_told_with_a_yes_too(shell, adapter, tmp_path):
    folder = shutil.copytree(adapter / "mine", tmp_path / "mine")
    (folder / "README.md").write_text("# Mine\n")
    done = shell("push", folder, "ana/noted", "--yes", "--no-verify")
    assert done.returncode == 0, done.stderr
    assert "note: the folder's own README.md was not written by minilora: a new one replaces it" in done.stderr
    assert "note:" not in done.stdout


def test_a_push_that_cannot_ask_needs_a_yes(shell, hub, adapter):
    for extra in ([], ["--json"]):
        done = shell("push", adapter / "mine", "ana/mine", *extra)
        assert done.returncode == 2
        assert "--yes" in done.stderr
    assert hub.requests == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["push", "{mine}", "ana/x", "--yes"], "no token for the Hub: log in with `hf auth login`"),
        (["verify", "ana/gone"], "ana/gone is not on the Hub"),
        (["info", "ana/gone"], "ana/gone is not on the Hub"),
        (["pull", "ana/gone"], "ana/gone is not on the Hub"),
        (["info", "{root}"], "neither config.json nor adapter_config.json"),
        (["card", "{base}"], "results.json"),
        (["info", "{mine}", "--revision", "x"], "mine' is a folder, which has no revisions"),
        (["verify", "{mine}", "--revision", "x"], "mine' is a folder, which has no revisions"),
        (["pull", "org/base"], "'org/base' is a whole model"),
    ],
)
def test_failures_are_one_line_and_exit_code_1(shell, adapter, arguments, message):
    folders = {"root": adapter, "mine": adapter / "mine", "base": adapter / "base"}
    done = shell(*(argument.format(**folders) for argument in arguments), token=None)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("minilora: ")]
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize(
    "arguments",
    [["push"], ["verify"], ["list", "--sort", "size"], ["list", "--method", "x"], ["push", "a", "b", "--layout", "x"]],
)
def test_wrong_usage_is_2(shell, arguments):
    assert shell(*arguments).returncode == 2


def test_card_shows_and_writes(shell, adapter, tmp_path):
    folder = shutil.copytree(adapter / "mine", tmp_path / "mine")
    shown = shell("card", folder, "--repo", "ana/mine")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("---\n")
    assert not (folder / "README.md").exists()
    assert shell("card", folder, "--repo", "ana/mine", "--write").returncode == 0
    assert (folder / "README.md").read_text() == shown.stdout
    assert shell("card", folder).stdout == shown.stdout  # the repo's name is remembered


@pytest.mark.parametrize("extra", [[], ["--write"]])
def test_a_card_that_is_not_utf8_is_named(shell, adapter, tmp_path, extra):
    folder = shutil.copytree(adapter / "mine", tmp_path / "mine")
    (folder / "README.md").write_bytes(b"\xff\xfehello")
    done = shell("card", folder, *extra)
    assert done.returncode == 1
    assert f"{folder / 'README.md'} is not UTF-8" in done.stderr
    assert "repair or delete it" in done.stderr


def test_commands_on_a_card_quote_the_folder(shell, adapter, tmp_path):
    folder = shutil.copytree(adapter / "mine", tmp_path / "my model_é")
    assert "`minilora verify './my model_é'` loads it" in shell("card", folder).stdout


def test_what_strangers_wrote_does_not_act_on_the_terminal(shell, adapter, tmp_path):
    folder = shutil.copytree(adapter / "mine", tmp_path / "mine")
    results = json.loads((folder / "results.json").read_text())
    results["license"] = "mit\nand more"
    results["evaluation"] = [{"task": "t\x1b]0;pwned\x07", "metric": "exact\r\x9bm", "value": 0.5}]
    (folder / "results.json").write_text(json.dumps(results))
    done = shell("info", folder)
    assert done.returncode == 0, done.stderr
    assert not {"\x1b", "\x07", "\r", "\x9b"} & set(done.stdout)
    rows = {line.split("  ")[0].strip(): line.split("  ")[-1].strip() for line in done.stdout.splitlines()}
    assert rows["license"] == "mit and more"
    assert rows["t\\u001b]0;pwned\\u0007"] == "exact \\u009bm 0.5"


def test_help_has_an_example_and_loads_nothing_heavy():
    """In one process, as the imports of one command would be seen in the next one's."""
    program = (
        "import sys, minilora_hub.cli as cli\n"
        "for command in ('push', 'verify', 'card', 'info', 'list', 'pull', 'eval'):\n"
        "    try: cli.main([command, '--help'])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "try: cli.main(['space', 'push', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'gradio', 'peft', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    for command in ("push", "verify", "card", "info", "list", "pull", "eval", "space push"):
        assert f"Example: minilora {command}" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_during_a_push_leaves_the_repo_and_the_disk(number, code, hub, adapter, tmp_path):
    """Sent while the files are on their way: no word of Python's, the repo without a file."""
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    hub.faults.add(kind="slow", method="PUT", delay=20)
    environment = hub.environment(hub.add_user("ana"), cache_dir=tmp_path / "hf")
    process = subprocess.Popen(
        [sys.executable, "-m", "minilora_hub.cli", "push", adapter / "mine", "ana/mine", "--yes", "--no-verify"],
        env={**os.environ, **environment, "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not hub.sent("POST", "/objects/batch") and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(number)
    hub.closing.set()  # the slow answers come at once now: the client's threads end with what they have begun
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in out + err
    assert hub.repo("ana/mine").files("main") == {}
    assert list(scratch.iterdir()) == []
