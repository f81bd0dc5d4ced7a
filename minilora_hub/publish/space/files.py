"""Write the files of a Space: `app.py`, this package, requirements with the versions installed here, a card.

The package is copied into the Space's repo instead of being listed in requirements.txt, so that the Space runs exactly
the installed code, whether or not it is released.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from huggingface_hub.utils import yaml_dump
from packaging.requirements import Requirement

from minilora_hub.bases.embedded import HUB_ID
from minilora_hub.errors import PublishError
from minilora_hub.hub.client import PUBLIC_HUB

PACKAGE = Path(__file__).resolve().parents[2]
APP, README, REQUIREMENTS = "app.py", "README.md", "requirements.txt"
FOR_OTHER_PLACES = ("space_app.py", "pyproject.toml")
"""Files of the package with another use: a wheel's copy of app.py, and the project that Flower runs."""
VENDORED = ("minilora_hub/", "model_cards/")
"""Folders of a Space in which a later push deletes files that it does not contain."""

OUR_VARIABLES = {"MINILORA_BASE": "base", "MINILORA_ADAPTERS": "adapters", "MINILORA_MCP": "mcp"}
"""Variables of `SpaceSettings.variables`, and the settings that they are: a later push removes those that it does not
set."""

MARKER = "<!-- Written by `minilora space push`. -->"
PYTHON = "3.12"
ZERO_GPU = "zero-"
ZERO_GPU_TORCH = "2.10.0"
"""ZeroGPU has torch 2.8 to 2.11; this is the oldest of them that the tests run with."""

SHORT_DESCRIPTION = "One prompt, one base, its adapters side by side"


@dataclass(frozen=True)
class SpaceSettings:
    """What a Space shows, and its hardware.

    Attributes:
        title: its headline on the Hub.
        base: ``"embedded"``, or the id of the base.
        adapters: ids on the Hub; empty for the adapters that are shipped with minilora_hub.
        public: the base and adapters that are public.
        hardware: the hardware to request; None leaves it to the Hub.
        mcp: whether the page also serves a tool for MCP clients.
        hub: URL of the Hub for links.
    """

    title: str
    base: str = "embedded"
    adapters: tuple[str, ...] = ()
    public: tuple[str, ...] = ()
    hardware: str | None = None
    mcp: bool = False
    hub: str = PUBLIC_HUB

    @property
    def zero_gpu(self) -> bool:
        """Whether it runs on ZeroGPU, which needs its own version of torch."""
        return bool(self.hardware) and str(self.hardware).startswith(ZERO_GPU)

    def variables(self) -> dict[str, str]:
        """Return the environment variables of app.py."""
        found = {"MINILORA_BASE": self.base}
        found |= {"MINILORA_ADAPTERS": ",".join(self.adapters)} if self.adapters else {}
        return found | ({"MINILORA_MCP": "1"} if self.mcp else {})


def stage(folder: Path, settings: SpaceSettings) -> list[str]:
    """Write the files of a Space into an empty folder.

    Returns:
        The paths of the files, in order.

    Raises:
        PublishError: minilora_hub is not installed, so the versions of its dependencies are not known.
    """
    shutil.copyfile(_app_file(), folder / APP)
    for path in _package_files():
        target = folder / "minilora_hub" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PACKAGE / path, target)
    if not settings.adapters:
        from minilora_hub.compare.found_adapters import shipped_adapters

        for adapter in shipped_adapters():
            shutil.copytree(adapter, folder / "model_cards" / adapter.name)
    (folder / REQUIREMENTS).write_text(requirements(settings), encoding="utf-8")
    (folder / README).write_text(space_card(settings), encoding="utf-8")
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _app_file() -> Path:
    """Find app.py: next to the package in a checkout, inside it in an installed wheel."""
    for path in (PACKAGE / "demo" / "space_app.py", PACKAGE.parent / APP):
        if path.is_file():
            return path
    raise PublishError("this copy of minilora_hub has no app.py: install it again, or run from a clone")


def _package_files() -> Iterator[Path]:
    """Yield the package's own files, without compiled or generated ones and without the adapters of a wheel."""
    for path in sorted(PACKAGE.rglob("*")):
        inside = path.relative_to(PACKAGE)
        generated = path.suffix in (".pyc", ".pyo", ".pyi") or "__pycache__" in inside.parts
        if (
            path.is_file()
            and not generated
            and inside.parts[0] != "model_cards"
            and inside.name not in FOR_OTHER_PLACES
        ):
            yield inside


def requirements(settings: SpaceSettings) -> str:
    """Return requirements.txt: each dependency at the version that is installed here.

    Gradio is installed by the Space's `sdk_version`, and `spaces` by ZeroGPU.

    Raises:
        PublishError: minilora_hub is not installed, so the versions of its dependencies are not known.
    """
    try:
        declared = [Requirement(line) for line in metadata.requires("minilora_hub") or []]
    except metadata.PackageNotFoundError:
        raise PublishError("minilora_hub is not installed here, only run: `pip install` it, then push again") from None
    extras = ["", "demo", *(["embedded"] if settings.base == "embedded" else [])]
    wanted = {
        requirement.name.lower()
        for requirement in declared
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras)
    }
    lines = [f"{name}=={_version(name, settings)}" for name in sorted(wanted - {"gradio", "pip"})]
    if settings.mcp:
        lines.append(f"gradio[mcp]=={_installed('gradio')}")
    return "\n".join(lines) + "\n"


def _version(name: str, settings: SpaceSettings) -> str:
    return ZERO_GPU_TORCH if name == "torch" and settings.zero_gpu else _installed(name)


def _installed(name: str) -> str:
    try:
        return metadata.version(name).partition("+")[0]  # the public index has no "2.13.0+cpu"
    except metadata.PackageNotFoundError:
        extra = {"gradio": "demo", "gguf": "embedded"}.get(name)
        install = f"pip install 'minilora_hub[{extra}]'" if extra else f"pip install {name}"
        raise PublishError(f"{name} is not installed here, so its version is not known: {install}") from None


def space_card(settings: SpaceSettings) -> str:
    """Render the README of a Space: its configuration, and the models that it shows."""
    base = HUB_ID if settings.base == "embedded" else settings.base
    public = [name for name in dict.fromkeys([settings.base, *settings.adapters]) if name in settings.public]
    fields = {
        "title": settings.title,
        "emoji": "🧩",
        "colorFrom": "yellow",
        "colorTo": "purple",
        "sdk": "gradio",
        "sdk_version": _installed("gradio"),
        "python_version": PYTHON,
        "app_file": APP,
        "short_description": SHORT_DESCRIPTION,
        "license": "apache-2.0",
        "models": list(dict.fromkeys([base, *settings.adapters])),
        "tags": ["lora", "dora", "mixlora", "text-generation", *(["mcp-server"] if settings.mcp else [])],
        **({"suggested_hardware": settings.hardware} if settings.hardware else {}),
        # Fetched while the Space is built, so that it starts sooner. A build has no secrets: public repos only.
        **({"preload_from_hub": public} if public else {}),
    }
    shown = "\n".join(f"- [{name}]({settings.hub}/{name})" for name in settings.adapters)
    return (
        f"---\n{yaml_dump(fields)}---\n\n{MARKER}\n\n"
        f"One prompt, answered side by side by [{base}]({settings.hub}/{base}) and adapters on it, in one "
        "batched pass.\n\n"
        + (f"{shown}\n\n" if shown else "The adapters are those shipped with minilora_hub.\n\n")
        + "`?adapter=owner/name` in the address shows any small public adapter for this base. The Space's variables "
        "say which base and adapters, and what a visitor may ask for; app.py lists them.\n"
    )
