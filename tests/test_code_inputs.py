"""Which code a stored result depends on, found by imports, and that an edit of it is seen where results are kept."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minilora_hub import code_inputs
from minilora_hub.bases import embedded
from minilora_hub.code_inputs import code_hash, imported_names

PACKAGE = Path(code_inputs.__file__).parent
TESTS = Path(__file__).parent

MEASURE = """
import json, sys
from evaluation.small_tasks import TASKS
import minilora_hub.evaluation.tasks.registry
minilora_hub.evaluation.tasks.registry.TASKS = TASKS
from minilora_hub.evaluation.run import evaluate
from pathlib import Path
base, adapter, cache = sys.argv[1:]

def measured(cache):
    report = evaluate([adapter], base=base, tasks=["echo"], count=4, few_shot=0, cache=cache)
    return report.computed, [model.scores["echo"].answers for model in report.models]

kept, again, fresh = measured(Path(cache)), measured(Path(cache)), measured(None)
print(json.dumps({"code": minilora_hub.__file__, "kept": kept, "again": again, "fresh": fresh}))
"""

ROUTE_BY_THE_SMALLEST = """

_largest = route_top_k


def route_top_k(logits, k):
    return _largest(-logits, k)
"""


@pytest.mark.slow
def test_after_an_edit_of_the_router_answers_are_computed_again(saved, tmp_path):
    """By a copy of the package, in a process before the edit and one after it."""
    base, (mix, *_) = saved
    shutil.copytree(PACKAGE, tmp_path / "copy" / "minilora_hub", ignore=shutil.ignore_patterns("__pycache__"))
    environment = os.environ | {"PYTHONPATH": f"{tmp_path / 'copy'}{os.pathsep}{TESTS}"}

    def measured():
        command = [sys.executable, "-c", MEASURE, str(base), str(mix), str(tmp_path / "cache")]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout.splitlines()[-1])
        assert said["code"].startswith(str(tmp_path))
        computed, answers = said["kept"]
        assert said["again"] == [0, answers]
        assert said["fresh"] == [8, answers]
        return computed, answers

    computed, before = measured()
    assert computed == 8
    with (tmp_path / "copy" / "minilora_hub" / "remote_code" / "routing.py").open("a") as routing:
        routing.write(ROUTE_BY_THE_SMALLEST)
    computed, answers = measured()
    assert computed == 8
    assert answers[0] == before[0], "the base has no router"
    assert answers[1] != before[1]


@pytest.mark.parametrize(
    ("module", "must"),
    [
        (
            "minilora_hub.evaluation.run",
            {"remote_code/routing.py", "compare/banked_layers.py", "evaluation/generation.py", "evaluation/prompts.py"},
        ),
        (
            "minilora_hub.recording.reference",
            {"remote_code/modeling_minilora.py", "formats/peft.py", "bases/resolving.py"},
        ),
        ("minilora_hub.training.sweep", {"training/trainer.py", "remote_code/mixture.py", "training/settings.py"}),
        ("minilora_hub.bases.gguf", {"bases/gguf.py"}),
    ],
)
def test_the_closure_holds_what_computes(module, must):
    found = code_inputs.code_inputs(module)
    assert {f"code/{name}" for name in must} <= found.keys()
    assert found["code/" + sorted(must)[0]] == hashlib.sha256((PACKAGE / sorted(must)[0]).read_bytes()).hexdigest()
    assert not {"code/cli/app.py", "code/demo/ui/app.py", "code/errors.py", "code/__init__.py"} & found.keys()


def test_the_embedded_base_is_kept_under_the_hash_of_what_converts_it(tmp_path, monkeypatch):
    def name():
        code_inputs.code_inputs.cache_clear()
        return f"smollm2-135m-instruct-q4_1-{code_hash('minilora_hub.bases.gguf')[:8]}"

    assert name() == embedded.FOLDER_NAME
    monkeypatch.setattr(code_inputs, "PACKAGE", tmp_path)
    (tmp_path / "bases").mkdir()
    copy = shutil.copy(PACKAGE / "bases/gguf.py", tmp_path / "bases")
    assert name() == embedded.FOLDER_NAME
    with open(copy, "a") as file:
        file.write("CONTROL_TOKEN = 4\n")
    assert name() != embedded.FOLDER_NAME
    code_inputs.code_inputs.cache_clear()


def test_a_module_that_is_not_there():
    with pytest.raises(ValueError, match=r"module 'minilora_hub\.nothing': must be a module of minilora_hub"):
        code_hash("minilora_hub.nothing")


def test_every_import_statement_is_found():
    """By the regular expression as by Python's own parser, in every file of the package."""
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        package = ".".join(path.relative_to(PACKAGE.parent).parts[:-1])
        found = imported_names(source, package)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                assert {alias.name for alias in node.names} <= found, path
            elif isinstance(node, ast.ImportFrom):
                parts = package.split(".")
                above = parts[: len(parts) - node.level + 1] if node.level else []
                module = ".".join([*above, *([node.module] if node.module else [])])
                assert {module, *(f"{module}.{alias.name}" for alias in node.names)} <= found, path


def test_relative_and_lazy_names():
    assert imported_names("from .x import (\n    a,\n    b as c,\n)\n", "p.q") >= {"p.q.x", "p.q.x.a", "p.q.x.b"}
    assert imported_names("    from .. import y", "p.q") >= {"p", "p.y"}
    assert "minilora_hub.training.run" in imported_names("from minilora_hub import train", "p")
