"""Base names become folders: local ones, and the Hub's."""

import os
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import errors
from processes import NOWHERE, run_python

from minilora_hub.bases import resolve_base
from minilora_hub.bases import resolving as bases
from minilora_hub.errors import BaseModelError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class TestLocalFolder:
    def test_a_folder(self, tmp_path, monkeypatch):
        (tmp_path / "embedded").mkdir()
        (tmp_path / "embedded" / "config.json").write_text("{}")
        expected = tmp_path / "embedded"
        assert resolve_base(expected) == bases.ResolvedBase(str(expected), expected, None, None, False)
        monkeypatch.chdir(tmp_path)
        assert resolve_base("./embedded").path == expected
        monkeypatch.setenv("HOME", str(tmp_path))
        assert resolve_base("~/embedded").path == expected

    @pytest.mark.parametrize("name", ["./missing", "/missing/model", "~/missing", "a/b/c", "missing/", Path("missing")])
    def test_a_missing_folder(self, name):
        with pytest.raises(BaseModelError, match=f"base '{os.fspath(name)}' does not exist"):
            resolve_base(name)

    def test_a_file(self, tmp_path):
        (tmp_path / "model.gguf").write_text("")
        with pytest.raises(BaseModelError, match=r"model\.gguf' is a file"):
            resolve_base(str(tmp_path / "model.gguf"))

    def test_no_config(self, tmp_path):
        with pytest.raises(BaseModelError, match=f"base '{tmp_path}' has no config.json"):
            resolve_base(str(tmp_path))

    def test_an_adapter(self, tmp_path):
        for name, content in (("adapter_config.json", "{}"), ("config.json", '{"model_type": "dora"}')):
            (tmp_path / name).write_text(content)
            with pytest.raises(BaseModelError, match="is an adapter, not a base model"):
                resolve_base(tmp_path)

    def test_pickled_weights(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(BaseModelError, match=r"only in pytorch_model\.bin, a pickle"):
            resolve_base(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"")
        assert resolve_base(tmp_path).path == tmp_path


class TestHub:
    @pytest.fixture
    def snapshot(self, tmp_path: Path) -> Path:
        folder = tmp_path / "models--owner--name" / "snapshots" / COMMIT
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"")
        return folder

    def test_arguments_and_commit(self, snapshot, monkeypatch):
        asked = {}

        def snapshot_download(repo: str, **arguments: object) -> str:
            asked.update(arguments, repo=repo)
            return str(snapshot)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        base = resolve_base("owner/name", revision="v1", token="hf_x", cache_dir="/c", local_files_only=True)
        assert base == bases.ResolvedBase("owner/name", snapshot, "owner/name", COMMIT, False)
        assert asked.pop("allow_patterns") == bases.WANTED_FILES
        assert asked.pop("ignore_patterns") == bases.UNWANTED_FILES
        assert asked == {
            "repo": "owner/name",
            "revision": "v1",
            "token": "hf_x",
            "cache_dir": "/c",
            "local_files_only": True,
            "tqdm_class": asked["tqdm_class"],
        }

    def test_which_files_are_fetched(self):
        from huggingface_hub.utils import filter_repo_objects

        wanted = [
            "config.json",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "tokenizer.model",
            "merges.txt",
            "chat_template.jinja",
            "modeling_own.py",
        ]
        unwanted = [
            "pytorch_model.bin",
            "model.Q4_K_M.gguf",
            "onnx/model.onnx",
            "onnx/config.json",
            "original/consolidated.safetensors",
            "consolidated.safetensors",
            "model.fp16.safetensors",
            "model.fp16-00001-of-00002.safetensors",
            "tf_model.h5",
            "README.md",
        ]
        fetched = filter_repo_objects(
            wanted + unwanted, allow_patterns=bases.WANTED_FILES, ignore_patterns=bases.UNWANTED_FILES
        )
        assert list(fetched) == wanted

    def test_a_repo_without_safetensors(self, snapshot, monkeypatch):
        (snapshot / "model.safetensors").unlink()
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
        with pytest.raises(BaseModelError, match=r"'owner/name' at revision 'v1' holds no safetensors weights"):
            resolve_base("owner/name", revision="v1")

    def test_a_repo_that_is_an_adapter(self, snapshot, monkeypatch):
        (snapshot / "config.json").rename(snapshot / "adapter_config.json")
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
        with pytest.raises(BaseModelError, match="'owner/name' is an adapter"):
            resolve_base("owner/name")

    @pytest.mark.parametrize(
        ("kind", "status", "message"),
        [
            (errors.GatedRepoError, 403, "is gated: accept its conditions .* `hf auth login`"),
            (errors.RepositoryNotFoundError, 401, "is not on the Hub, or is private: check the id"),
            (errors.RevisionNotFoundError, 404, "has no revision 'v9'"),
            (errors.HfHubHTTPError, 500, r"could not be downloaded \(HTTP 500\): .*try again"),
            (errors.HfHubHTTPError, 429, r"could not be downloaded \(HTTP 429\): .*try again"),
        ],
    )
    def test_refusals(self, kind, status, message, monkeypatch):
        def refuse(*_: object, **__: object) -> str:
            response = httpx2.Response(status, request=httpx2.Request("GET", f"{NOWHERE}/api/models/owner/name"))
            raise kind("the server says hf_hidden", response=response)

        monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
        with pytest.raises(BaseModelError, match=message) as caught:
            resolve_base("owner/name", revision="v9", token="hf_hidden")
        assert "'owner/name'" in str(caught.value)
        assert "hf_hidden" not in str(caught.value)

    @pytest.mark.parametrize(
        "failure",
        [OSError(28, "No space left"), httpx2.ReadError("cut"), errors.XetDownloadError("cut"), TimeoutError()],
    )
    def test_interruptions(self, failure, monkeypatch):
        def fail(*_: object, **__: object) -> str:
            raise failure

        monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
        with pytest.raises(BaseModelError, match=r"could not be downloaded .*what has arrived is kept"):
            resolve_base("owner/name")

    def test_no_token_of_its_own(self, tmp_path):
        code = "from minilora_hub.bases import resolve_base; resolve_base('owner/name', token=True)"
        done = run_python(code, HF_HOME=str(tmp_path), HF_ENDPOINT=NOWHERE, HF_TOKEN="")
        assert "token=True asks for your own token, and there is none: run `hf auth login`" in done.stderr

    @pytest.mark.parametrize("name", ["", "has space/name", "owner/na--me..x"])
    def test_an_invalid_id(self, name):
        with pytest.raises(BaseModelError, match="neither a folder nor a valid Hub id"):
            resolve_base(name)

    @pytest.mark.parametrize("environment", [{"HF_ENDPOINT": NOWHERE}, {"HF_HUB_OFFLINE": "1"}])
    def test_no_way_to_the_hub(self, environment, tmp_path):
        code = (
            "from minilora_hub.bases import resolve_base\nfrom minilora_hub.errors import BaseModelError\n"
            "try: resolve_base('owner/name', token='hf_hidden', progress=False)\n"
            "except BaseModelError as error: print(error)"
        )
        done = run_python(code, HF_HOME=str(tmp_path), **environment)
        assert done.returncode == 0, done.stderr
        assert "base 'owner/name' is not complete in the cache, and the Hub cannot be reached" in done.stdout
        assert 'pass a local folder or "embedded"' in done.stdout
        assert "hf_hidden" not in done.stdout + done.stderr

    @pytest.mark.parametrize("environment", [{"HF_ENDPOINT": NOWHERE}, {"HF_HUB_OFFLINE": "1"}])
    def test_from_the_cache_without_the_hub(self, environment, snapshot, tmp_path):
        refs = snapshot.parent.parent / "refs"
        refs.mkdir()
        (refs / "main").write_text(COMMIT)
        code = "from minilora_hub.bases import resolve_base; print(resolve_base('owner/name').revision)"
        done = run_python(code, HF_HUB_CACHE=str(tmp_path), **environment)
        assert done.stdout.strip() == COMMIT, done.stderr
