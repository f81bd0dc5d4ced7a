"""PEFT's own tests: with MIXLORA among their cases, and with and without `minilora_hub.register()` for all others.

Not part of the test run, which it would make hours longer. In the environment of the tests:

    python tests/engines/peft_suite.py mixlora --work DIR
    python tests/engines/peft_suite.py others --work DIR tests/test_mixed.py tests/test_low_level_api.py
    python tests/engines/peft_suite.py others --work DIR -k "not Decoder"

mixlora: the tests of decoder models and of custom models, with MIXLORA's configurations alone (1397 tests, about 3
    minutes on one core). A failure that is not in `ON_PURPOSE` makes the exit code 1.
others: every test as it is, in a process that has registered MIXLORA and in one that has not (tens of thousands, which
    take hours). An outcome that differs makes the exit code 1. Tests that need data sets, trained adapters of the Hub,
    or a GPU fail or are skipped in both.

What follows goes to pytest: files, ``-k``. The tests are those of the sdist of the installed version, which pip fetches
from PyPI (``--tests FOLDER`` takes those of a checkout); no code of PEFT's is kept in this repository. Their models are
replaced by tiny random ones (`peft_suite_models.py`); `peft_suite_plugin.py` does the rest. `EXTRAS`, which they import
besides, are put into DIR.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from peft_suite_models import write_cache

HERE = Path(__file__).resolve().parent
EXTRAS = ("parameterized", "diffusers", "importlib_metadata", "zipp")
MIXLORA_FILES = ("tests/test_decoder_models.py", "tests/test_custom_models.py")
FOR_GPUS = ("test_common_gpu.py", "test_gpu_examples.py", "test_gptqmodel.py", "test_stablediffusion.py")

SETTINGS = """[pytest]
testpaths = tests
addopts = --continue-on-collection-errors {ignored}
markers =
    single_gpu_tests
    multi_gpu_tests
    regression
    bitsandbytes
"""

# (pattern in the test's id, pattern in its message, why it differs)
ON_PURPOSE = (
    ("", "a MixLoRA cannot be merged into its base", "merging: every token takes its own experts"),
    ("", 'must be "none": a MixLoRA trains no bias', "bias=: a MixLoRA has none, nor has the reference"),
    (
        "",
        "one adapter can be active",
        "several active adapters: outputs of mixtures do not add up",
    ),
    ("OPTFor", "no feed-forward block of a known form", "OPT: its layers hold the two linears, without a block"),
    (
        "autocast.*MixLora dora",
        "AssertionError|assert False",
        "DoRA's magnitude stays in float32: in bfloat16 it is off by 0.4%",
    ),
    (
        "disable_adapters.*MixLora switch",
        "assert False",
        "switch: the router's probability scales what a fresh mixture puts out",
    ),
)


def get_tests(work: Path, given: Path | None) -> Path:
    """Return a folder with PEFT's tests as a package named `tests`."""
    root = work / "suite"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    if given is None:
        release = f"peft=={version('peft')}"
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", release, "-d", str(work)]
        subprocess.run(pip, check=True)
        (archive,) = work.glob(f"peft-{version('peft')}.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(work / "sdist", filter="data")
        given = work / "sdist" / archive.name.removesuffix(".tar.gz") / "tests"
    shutil.copytree(given, root / "tests")
    if not list((root / "tests").glob("test_*.py")):
        raise SystemExit(f"{given} holds no test_*.py: pass --tests with the folder tests/ of a checkout of PEFT")
    (root / "tests/__init__.py").touch()
    ignored = " ".join(f"--ignore=tests/{name}" for name in FOR_GPUS)
    (root / "pytest.ini").write_text(SETTINGS.format(ignored=ignored))
    return root


def get_extras(work: Path) -> Path:
    """Install what PEFT's tests import besides into a folder of its own, and return the folder."""
    folder = work / "extras"
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(folder), *EXTRAS]
        subprocess.run(pip, check=True)
    return folder


def run(root: Path, work: Path, mode: str, arguments: list[str]) -> dict[str, tuple[str, str]]:
    """Run PEFT's tests in a mode of the plugin, and return {node id: (outcome, reason)}."""
    outcomes = work / f"outcomes-{mode}.jsonl"
    outcomes.unlink(missing_ok=True)
    path = os.pathsep.join(str(folder) for folder in (HERE.parents[1], HERE, get_extras(work)))
    environment = os.environ | {
        "PYTHONPATH": path,
        "PYTHONHASHSEED": "0",  # PEFT's tests make cases from sets
        "HF_HUB_CACHE": str(work / "hub"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    plugin = ["-p", "peft_suite_plugin", "--minilora", mode, "--outcomes", str(outcomes), "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", *plugin, *arguments]
    done = subprocess.run(command, cwd=root, env=environment)
    if done.returncode not in (0, 1) or not outcomes.exists():
        raise SystemExit(f"pytest ended with exit code {done.returncode}: {' '.join(command)}")
    rows = [json.loads(line) for line in outcomes.read_text(encoding="utf-8").splitlines()]
    return {node: (outcome, reason) for node, outcome, reason in rows}


def check_mixlora(outcomes: dict[str, tuple[str, str]]) -> int:
    """Print how MIXLORA fared and why where it differs, and return the number of failures without a reason."""
    print("\nMIXLORA:", dict(Counter(outcome for outcome, _ in outcomes.values())))
    reasons: Counter[str] = Counter()
    unexplained = []
    for node, (outcome, message) in outcomes.items():
        if outcome == "failed":
            why = [why for test, said, why in ON_PURPOSE if re.search(test, node) and re.search(said, message)]
            reasons[why[0] if why else "NOT ON PURPOSE"] += 1
            unexplained += [] if why else [f"{node}\n    {message}"]
    for why, count in reasons.most_common():
        print(f"{count:5} {why}")
    print("\n".join(unexplained))
    return len(unexplained)


def check_others(without: dict[str, tuple[str, str]], with_it: dict[str, tuple[str, str]]) -> int:
    """Print the tests whose outcome depends on whether MIXLORA is registered, and return their number."""
    for title, outcomes in (("not registered", without), ("registered", with_it)):
        print(f"\n{title}:", dict(Counter(outcome for outcome, _ in outcomes.values())))
    differing = [
        node for node in sorted(without | with_it) if without.get(node, ("",))[0] != with_it.get(node, ("",))[0]
    ]
    for node in differing:
        print(f"{node}\n    not registered: {without.get(node)}\n    registered: {with_it.get(node)}")
    print(f"{len(differing)} outcomes differ")
    return len(differing)


def main() -> int:
    """Run the part that was asked for, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("mixlora", "others"))
    parser.add_argument("--work", type=Path, required=True, help="folder for the tests, models and outcomes")
    parser.add_argument("--tests", type=Path, help="folder tests/ of a checkout of PEFT (default: the sdist's)")
    options, arguments = parser.parse_known_args()
    work = options.work.resolve()
    root = get_tests(work, options.tests)
    write_cache(work / "hub")
    if options.part == "mixlora":
        found = check_mixlora(run(root, work, "cases", [*MIXLORA_FILES, *arguments]))
    else:
        found = check_others(*(run(root, work, mode, arguments) for mode in ("absent", "registered")))
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
