"""Ways to spoil a published folder, one thing each, and what the checks must say about it."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from minilora_hub.adapter_folder.results import Results

WEIGHTS = "adapter_model.safetensors"
# Put together here, so that no scanner of this repository takes them for real ones.
HF_TOKEN = "hf_" + "nVpKqRtWxYzAbCdEfGhJkLmNoPsUvBcDeF"
GITHUB_TOKEN = "ghp_" + "R4nD0mT3xtF0rT3st1ngS3cr3tSc4nn3rsQz"
AWS_KEYS = (
    "aws_access_key_id = "
    + "AKIA"
    + "QYLPMN5HHHFPZAM2\naws_secret_access_key = "
    + "dGtq8Wn3Zb7Lm2Xc9Vp4Rf6Yh1Js5Kd0Ta+Ue/Bo"
)
PRIVATE_KEY = (
    "-----BEGIN RSA PRIVATE "
    + "KEY-----\n"
    + 12 * ("MIIEpAIBAAKCAQEAx3Zb7Lm2Xc9Vp4Rf6Yh1Js5Kd0Taq8Wn3Zb7Lm2Xc9Vp4Rf\n")
    + ("-----END RSA PRIVATE " + "KEY-----\n")
)


def edit_json(name: str, **changes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not KeyError}))

    return spoil


def put(name: str, content: str | bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def append(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: put(name, (folder / name).read_bytes() + content.encode())(folder)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def edit_tensors(change: Callable[[dict], None], metadata: dict | None = None) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata or {"format": "pt"})

    return spoil


def edit_results(**changes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        results = Results.load(folder)
        base = changes.pop("base", None)
        fields = {**vars(results), **changes}
        if base:
            fields["base"] = type(results.base)(**{**vars(results.base), **base})
        Results(**fields).save(folder)

    return spoil


def edit_card(old: str, new: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        text = (folder / "README.md").read_text()
        assert old in text
        (folder / "README.md").write_text(text.replace(old, new, 1))

    return spoil


def archive(kind: str, member: str) -> bytes:
    stream = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(stream, "w") as file:
            file.writestr(member, "content")
    else:
        with tarfile.open(fileobj=stream, mode="w:gz") as file:
            file.addfile(tarfile.TarInfo(member), io.BytesIO())
    return stream.getvalue()


def first(tensors: dict, suffix: str = "lora_A") -> str:
    return next(name for name in sorted(tensors) if name.endswith(suffix))


def nest(depth: int) -> str:
    return "[" * depth + "]" * depth


ROUTER = "layers.0.mlp.router"
GENERATION, TOKENS, TEMPLATES = "generation_config.json", "special_tokens_map.json", "additional_chat_templates"
UNTRAIN = edit_tensors(lambda tensors: [t.zero_() for name, t in tensors.items() if name.endswith("lora_B")])
NOT_FINITE = {"nan": float("nan"), "inf": float("inf")}
SPOILT = {
    # what is there
    "a stray file": (put("notes.txt", "todo"), "stray", "notes.txt"),
    "a stray folder": (put("checkpoint-10/optimizer.json", "{}"), "stray", "checkpoint-10"),
    "an environment file": (put(".env", "A=1"), "stray", ".env"),
    "version control": (put(".git/config", "x"), "stray", ".git"),
    "base weights": (put("model.safetensors", b"x"), "stray", "model.safetensors"),
    "a log in pictures": (put("pictures/run.log", "x"), "stray", "pictures/run.log"),
    "no weights": (remove(WEIGHTS), "missing-file", WEIGHTS),
    "no config": (remove("config.json"), "missing-file", "config.json"),
    "no code file": (remove("attach.py"), "missing-file", "attach.py"),
    "no tokenizer": (remove("tokenizer.json"), "missing-file", "tokenizer.json"),
    "no results": (remove("results.json"), "missing-file", "results.json"),
    "no verification": (remove("verification.json"), "missing-file", "verification.json"),
    "no card": (remove("README.md"), "missing-file", "README.md"),
    "an empty file": (put("chat_template.jinja", ""), "empty", "chat_template.jinja"),
    "PEFT's config at the root": (put("adapter_config.json", "{}"), "adapter-config", "adapter_config.json"),
    "a huge licence": (put("LICENSE", "x" * 2_000_000), "oversized", "LICENSE"),
    "an executable": (lambda folder: (folder / "config.json").chmod(0o755), "executable", "config.json"),
    "a link to a file": (lambda folder: (folder / "LICENSE").symlink_to("/etc/hostname"), "link", "LICENSE"),
    "a link to a folder": (lambda folder: (folder / "peft").symlink_to("/etc"), "link", "peft"),
    "a pipe": (lambda folder: os.mkfifo(folder / "NOTICE"), "special-file", "NOTICE"),
    "an odd name": (put(f"{TEMPLATES}/a \u202e.jinja", "x"), "odd-name", f"{TEMPLATES}/a \u202e.jinja"),
    "a reserved name": (put(f"{TEMPLATES}/con.jinja", "x"), "odd-name", f"{TEMPLATES}/con.jinja"),
    "two names in one": (put("License", "x"), "stray", "License"),
    # pickles and archives
    "a pickle by name": (put("pytorch_model.bin", b"x"), "pickle", "pytorch_model.bin"),
    "a pickle by content": (put("NOTICE", pickle.dumps({"a": [1]})), "pickle", "NOTICE"),
    "an old pickle by content": (put("NOTICE", pickle.dumps(print, protocol=0)), "pickle", "NOTICE"),
    "a pickle in a zip": (put("LICENSE", archive("zip", "archive/data.pkl")), "pickle", "LICENSE"),
    "a pickle in a tar": (put("LICENSE", archive("tar", "x.pkl")), "pickle", "LICENSE"),
    "a zip": (put("LICENSE", archive("zip", "a.txt")), "archive", "LICENSE"),
    "a zip behind text": (put("LICENSE", b"Licence\n" + archive("zip", "a.txt")), "archive", "LICENSE"),
    "a picture that is none": (put("pictures/loss.png", "<svg/>"), "picture", "pictures/loss.png"),
    "something behind a picture": (append("pictures/loss.png", "more"), "picture", "pictures/loss.png"),
    # secrets
    "a Hub token": (append("README.md", f"\n{HF_TOKEN}\n"), "secret", "README.md"),
    "a Hub token in the config": (edit_json("config.json", token=HF_TOKEN), "secret", "config.json"),
    "a GitHub token": (put("LICENSE", GITHUB_TOKEN), "secret", "LICENSE"),
    "AWS keys": (put("LICENSE", AWS_KEYS), "secret", "LICENSE"),
    "a private key": (put("LICENSE", PRIVATE_KEY), "secret", "LICENSE"),
    "a token in the weights' metadata": (edit_tensors(lambda t: None, {"by": HF_TOKEN}), "secret", WEIGHTS),
    "a token in the tokenizer": (edit_json("tokenizer.json", note=HF_TOKEN), "secret", "tokenizer.json"),
    "an escaped token": (
        put(GENERATION, json.dumps({"x": HF_TOKEN}).replace("V", "\\u0056")),
        "secret",
        GENERATION,
    ),
    # places on the author's machine
    "a home on Linux": (edit_json("config.json", log="/home/ana/run"), "machine-path", "config.json"),
    "a home on a Mac": (edit_json("tokenizer_config.json", x="/Users/ana/m"), "machine-path", "tokenizer_config.json"),
    "a home on Windows": (edit_json(GENERATION, x="C:\\Users\\ana"), "machine-path", GENERATION),
    "a file URL": (append("README.md", "\nfile:///home/ana/x\n"), "machine-path", "README.md"),
    "this process's folder": (edit_json("config.json", out=os.getcwd() + "/out"), "machine-path", "config.json"),
    "this user's home": (edit_json("config.json", out=f"{Path.home()}/out"), "machine-path", "config.json"),
    "a path in the weights": (edit_tensors(lambda t: None, {"from": "/home/ana/x"}), "machine-path", WEIGHTS),
    "a path in the tokenizer": (edit_json("tokenizer.json", x="/home/ana/x"), "machine-path", "tokenizer.json"),
    "an escaped path": (put(GENERATION, '{"x": "\\u002fhome/ana"}'), "machine-path", GENERATION),
    # JSON
    "JSON cut off": (put("config.json", '{"model_type": "mix'), "json", "config.json"),
    "a key twice": (put(GENERATION, '{"top_k": 1, "top_k": 2}'), "json", GENERATION),
    "NaN in JSON": (put(GENERATION, '{"temperature": NaN}'), "json", GENERATION),
    "JSON nested deeply": (put(TOKENS, nest(100_000)), "json", TOKENS),
    "a list for an object": (put(TOKENS, "[]"), "json", TOKENS),
    "JSON in another encoding": (put(TOKENS, '{"a": "é"}'.encode("utf-16")), "json", TOKENS),
    # code
    "a changed code file": (append("attach.py", "\n# changed\n"), "code-differs", "attach.py"),
    "a forbidden import": (append("attach.py", "\nimport subprocess\n"), "code-imports", "attach.py"),
    "ours imported": (append("attach.py", "\nfrom minilora_hub import push\n"), "code-imports", "attach.py"),
    "code from text": (append("attach.py", "\nexec('1')\n"), "code-imports", "attach.py"),
    "a code file that is no Python": (append("attach.py", "\ndef (\n"), "code-syntax", "attach.py"),
    "code of one's own": (put("evil.py", "import socket\n"), "code-imports", "evil.py"),
    "code from another repo": (
        edit_json("config.json", auto_map={"AutoConfig": "other/repo--configuration.Config"}),
        "auto-map",
        "config.json",
    ),
    "a tokenizer with code": (
        edit_json("tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]}),
        "auto-map",
        "tokenizer_config.json",
    ),
    # base and licence
    "no base": (edit_json("config.json", base_model_name_or_path=None), "base-missing", "config.json"),
    "a folder as base": (edit_json("config.json", base_model_name_or_path="./base"), "base-local", "config.json"),
    "an alias as base": (edit_json("config.json", base_model_name_or_path="embedded"), "base-local", "config.json"),
    "a branch of the base": (edit_json("config.json", base_model_revision="main"), "base-unpinned", "config.json"),
    "no licence": (edit_results(license=None), "license-missing", "results.json"),
    "another licence of the base": (edit_results(base={"license": "mit"}), "license-contradicts", "results.json"),
    # configuration and tensors
    "another model type": (edit_json("config.json", model_type="llama"), "config", "config.json"),
    "no model type": (edit_json("config.json", model_type=KeyError), "config", "config.json"),
    "a bad rank": (edit_json("config.json", r=0), "config", "config.json"),
    "a misspelt field": (edit_json("config.json", num_expert=4), "config", "config.json"),
    "no base config": (edit_json("config.json", text_config=None), "config", "config.json"),
    "another architecture": (edit_json("config.json", architectures=["LlamaForCausalLM"]), "config", "config.json"),
    "a newer format": (edit_json("config.json", format_version=5), "newer-format", "config.json"),
    "another rank": (edit_json("config.json", r=8), "tensors", WEIGHTS),
    "another number of experts": (edit_json("config.json", num_experts=8), "tensors", WEIGHTS),
    "a base that is unknown": (edit_json("config.json", text_config={"model_type": "new"}), "tensors-unknown", WEIGHTS),
    "a missing tensor": (edit_tensors(lambda t: t.pop(ROUTER)), "tensors", WEIGHTS),
    "a surplus tensor": (edit_tensors(lambda t: t.update(extra=torch.ones(2))), "tensors", WEIGHTS),
    "a base tensor": (edit_tensors(lambda t: t.update({"lm_head.weight": torch.ones(2)})), "tensors", WEIGHTS),
    "a tensor of another shape": (edit_tensors(lambda t: t.update({ROUTER: torch.ones(1, 2)})), "tensors", WEIGHTS),
    "a tensor of whole numbers": (edit_tensors(lambda t: t.update({ROUTER: t[ROUTER].int()})), "tensors", WEIGHTS),
    "nan": (edit_tensors(lambda t: t[first(t)].view(-1)[3:4].fill_(NOT_FINITE["nan"])), "tensors", WEIGHTS),
    "infinity": (edit_tensors(lambda t: t[first(t)].view(-1)[3:4].fill_(NOT_FINITE["inf"])), "tensors", WEIGHTS),
    "weights cut off": (lambda f: put(WEIGHTS, (f / WEIGHTS).read_bytes()[:-8])(f), "tensors", WEIGHTS),
    "something behind the weights": (append(WEIGHTS, "more"), "tensors", WEIGHTS),
    "no safetensors": (put(WEIGHTS, b"\x08" * 64), "tensors", WEIGHTS),
    "not trained": (UNTRAIN, "untrained", WEIGHTS),
    "a damaged tokenizer": (edit_json("tokenizer.json", model={"type": "BPE"}), "tokenizer", "tokenizer.json"),
    "a damaged template": (put("chat_template.jinja", "{% for %}"), "tokenizer", "chat_template.jinja"),
    "bad generation settings": (edit_json(GENERATION, max_new_tokens=-1), "config", GENERATION),
    # what the folder says about itself
    "another method": (edit_results(method="dora"), "results", "results.json"),
    "another base in the results": (edit_results(base={"id": "org/other"}), "results", "results.json"),
    "another number of parameters": (edit_results(parameters=7), "results", "results.json"),
    "a bad field in the results": (edit_json("results.json", share=-1), "results", "results.json"),
    "newer results": (edit_json("results.json", schema_version=99), "results", "results.json"),
    "a bad verification": (edit_json("verification.json", tolerance=0), "verification", "verification.json"),
    "a file changed since": (edit_json("tokenizer_config.json", x=1), "hash", "tokenizer_config.json"),
    "a better number on the card": (edit_card("**0.933**", "**0.983**"), "card-numbers", "README.md"),
    "a number of another row": (edit_card("**0.933**", "**0.605**"), "card-numbers", "README.md"),
    "a better number in the metadata": (edit_card("value: 0.605", "value: 0.933"), "card-numbers", "README.md"),
    "a claim on the card": (edit_card("## Limits", "It is 99% right.\n\n## Limits"), "card-numbers", "README.md"),
    "a licence of its own on the card": (edit_card("license: apache-2.0", "license: mit"), "card-edited", "README.md"),
    "a limit taken away": (edit_card("- It cannot be merged", "- It can be merged"), "card-edited", "README.md"),
    "a section taken away": (edit_card("## Security\n", ""), "card-edited", "README.md"),
    "a claim on a card of one's own": (put("README.md", "# Mine\n\nAccuracy: 98.7%\n"), "card-numbers", "README.md"),
    "a card in another encoding": (put("README.md", "# é".encode("latin-1")), "card", "README.md"),
    "an open section": (append("README.md", "<!-- minilora:free-text x -->\n"), "card", "README.md"),
    "a picture that is not there": (remove("pictures/loss.png"), "card", "README.md"),
}  # fmt: skip
ADVICE = {"base-unpinned", "tensors-unknown", "untrained"}
