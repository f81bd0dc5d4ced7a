"""Every check has a folder that it finds something in, and the clean folder, in which none does."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from publish.examples import clean_folder, evaluated_results, full_results, write_verification
from publish.spoilt_folders import (
    ADVICE,
    AWS_KEYS,
    GITHUB_TOKEN,
    HF_TOKEN,
    PRIVATE_KEY,
    SPOILT,
    WEIGHTS,
    append,
    edit_card,
    edit_json,
    edit_results,
    put,
    remove,
)
from safetensors.torch import load_file, save_file
from tiny import SWITCH, TOP_P, tiny_model

from minilora_hub.adapter_folder.results import Results
from minilora_hub.errors import AdapterError
from minilora_hub.publish.card.render import write_card
from minilora_hub.publish.checks.files import looks_like_pickle
from minilora_hub.publish.checks.folder import Problem, check_folder
from minilora_hub.publish.checks.tensors import _is_finite, expected_tensors
from minilora_hub.publish.checks.texts import IN_EVERY_MACHINE_PATH, MACHINE_PATH

RIGHT_BASE = {"base_exists": lambda base, revision: True, "base_license": lambda base, revision: "apache-2.0"}


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clean")
    return {method: clean_folder(folder / method, method) for method in ("mixlora", "dora", "mixdora")}


@pytest.fixture
def folder(clean, tmp_path) -> Path:
    return shutil.copytree(clean["mixlora"], tmp_path / "adapter")


def found(folder: Path, **lookups) -> list[Problem]:
    return check_folder(folder, **(RIGHT_BASE | lookups))


@pytest.mark.parametrize("method", ["mixlora", "dora", "mixdora"])
def test_the_clean_folder_is_clean(clean, method):
    assert found(clean[method]) == []


def test_what_minilora_eval_adds_may_be_published(folder):
    measured = evaluated_results()
    results = dataclasses.replace(Results.load(folder), evaluation=measured.evaluation, router=measured.router)
    results.save(folder)
    write_card(folder, repo_id="author/adapter")
    assert (folder / "pictures" / "expert_load_by_task.png").is_file()
    write_verification(folder)
    assert found(folder) == []


@pytest.mark.parametrize("family", ["gemma2", "phi3", "phi", "qwen3", "gpt_neox"])
def test_other_bases_have_no_false_alarms(family, tmp_path):
    assert found(clean_folder(tmp_path / family, "mixlora", family)) == []


@pytest.mark.filterwarnings("ignore:.*(pickle|tar).*:DeprecationWarning")
@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_folder_is_found(name, folder):
    spoil, code, file = SPOILT[name]
    spoil(folder)
    problems = found(folder)
    matching = [problem for problem in problems if (problem.code, problem.file) == (code, file)]
    assert matching, problems
    assert all(problem.message and problem.remedy for problem in problems)
    assert all(problem.blocking == (code not in ADVICE) for problem in matching)
    for secret in (HF_TOKEN, GITHUB_TOKEN, AWS_KEYS.split()[-1], PRIVATE_KEY):
        assert secret not in str([problem for problem in problems if problem.code == "secret"])


# ---- what harmless things look like problems ----


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("LICENSE", "Apache License, see https://example.org/home/page and ~/notes and https://x.org/Users/y.\n"),
        ("LICENSE", "cos\nsystem\n(S'a sentence'\n"),
        ("special_tokens_map.json", json.dumps({"eos_token": "<|end|>", "hash": "d41d8cd98f00b204e9800998ecf8427e"})),
        (".gitattributes", "*.safetensors filter=lfs diff=lfs merge=lfs -text\n"),
        (".eval_results/openai__gsm8k.yaml", "- dataset: {id: openai/gsm8k}\n"),
    ],
)
def test_harmless_files(name, content, folder):
    put(name, content)(folder)
    assert found(folder) == []


def test_a_vocabulary_may_hold_anything(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {"/home/ana/x": 300, "/root/x": 301}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    write_verification(folder)
    assert found(folder) == []


@pytest.mark.parametrize("strategy", [TOP_P, SWITCH, SWITCH | {"router_sparse_step": 2}])
def test_other_routers_have_no_false_alarms(strategy, tmp_path):
    assert found(clean_folder(tmp_path / "adapter", **strategy)) == []


def test_the_tensors_of_a_sparse_mixture_are_known():
    """Its first mixture is not in the first layer, the one whose block is filled to be looked at."""
    model = tiny_model("llama", "mixlora", router_sparse_step=2, **SWITCH)
    shapes, _, why_not = expected_tensors(model.config)
    assert not why_not
    assert shapes == {name: tuple(tensor.shape) for name, tensor in model.adapter_parameters().items()}


def test_free_text_may_say_anything_but_secrets(folder):
    note = "<!-- minilora:free-text intro -->\nOn 3 of my 7 evenings it was 42.5% faster.\n"
    edit_card("<!-- minilora:free-text intro -->\n", note)(folder)
    assert found(folder) == []
    edit_card("evenings", HF_TOKEN)(folder)
    assert [problem.code for problem in found(folder)] == ["secret"]


def test_a_card_of_ones_own_with_true_numbers(folder):
    (folder / "README.md").write_text("# Mine\n\nExact match 0.933 (93.3%) against 0, interval 0.821 to 0.977.\n")
    assert found(folder) == []


def test_ones_own_token_is_found_whatever_it_looks_like(folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "opaque-words-of-a-test-hub")
    append("README.md", "\nopaque-words-of-a-test-hub\n")(folder)
    (problem,) = [problem for problem in found(folder) if problem.code == "secret"]
    assert problem.message == "holds the token you are logged in to the Hub with"


def test_the_peft_folder(folder, clean):
    """`peft/` must hold the same adapter."""
    from minilora_hub.adapter_folder.names import to_peft

    target = shutil.copytree(clean["dora"], folder.parent / "dora")
    tensors = {to_peft(name, "model.layers"): t for name, t in load_file(target / WEIGHTS).items()}
    (target / "peft").mkdir()
    save_file(tensors, target / "peft" / WEIGHTS, {"format": "pt"})
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "use_dora": True, "r": 4}
    put("peft/adapter_config.json", json.dumps(config))(target)
    assert found(target) == []
    for change in ({"peft_type": "MIXLORA"}, {"base_model_name_or_path": "org/else"}, {"auto_mapping": {"x": "y"}}):
        put("peft/adapter_config.json", json.dumps(config | change))(target)
        assert [problem.file for problem in found(target)] == ["peft/adapter_config.json"]
    put("peft/adapter_config.json", json.dumps(config))(target)
    next(iter(tensors.values())).add_(1)
    save_file(tensors, target / "peft" / WEIGHTS, {"format": "pt"})
    assert [(p.code, p.file) for p in found(target)] == [("tensors", f"peft/{WEIGHTS}")]
    remove("peft/adapter_config.json")(target)
    assert ("missing-file", "peft/adapter_config.json") in [(p.code, p.file) for p in found(target)]


def test_pefts_own_layout(tmp_path, folder):
    target = tmp_path / "lora"
    target.mkdir()
    full_results(method="lora", parameters=64, expert_load=None).save(target)
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "revision": "0" * 40, "r": 4}
    put("adapter_config.json", json.dumps(config))(target)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{prefix}.lora_A.weight": torch.ones(4, 8), f"{prefix}.lora_B.weight": torch.ones(8, 4)}, target / WEIGHTS
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / name, target / name)
    write_card(target, repo_id="ana/lora")
    assert found(target) == []
    put("attach.py", "import os\n")(target)
    assert ("code-differs", "attach.py") in [(p.code, p.file) for p in found(target)]
    remove("attach.py")(target)
    save_file({"model.norm.weight": torch.ones(64)}, target / WEIGHTS)
    assert "tensors" in [p.code for p in found(target)]


# ---- base and licence ----


@pytest.mark.parametrize(
    ("own", "theirs", "code", "blocking"),
    [
        ("apache-2.0", "apache-2.0", None, None),
        ("mit", "apache-2.0", None, None),
        ("cc-by-nc-4.0", "mit", None, None),
        ("apache-2.0", "llama3.2", "license-contradicts", True),
        ("mit", "cc-by-nc-4.0", "license-contradicts", True),
        ("mit", "gpl-3.0", "license-contradicts", True),
        ("llama3.2", "llama3.2", None, None),
        ("Llama3.2", "llama3.2", None, None),
        ("apache-2.0", None, "license-unknown", False),
    ],
)
def test_licences(own, theirs, code, blocking, folder):
    edit_results(license=own, base={"license": None})(folder)
    write_card(folder, repo_id="author/adapter")
    write_verification(folder)
    problems = found(folder, base_license=lambda base, revision: theirs)
    assert [(problem.code, problem.blocking) for problem in problems] == ([(code, blocking)] if code else [])


def test_an_unknown_licence_of_the_base_does_not_hide_what_the_author_wrote(folder):
    edit_results(license="mit", base={"license": "cc-by-nc-4.0"})(folder)
    write_card(folder, repo_id="author/adapter")
    write_verification(folder)
    codes = [problem.code for problem in found(folder, base_license=lambda base, revision: None)]
    assert codes == ["license-contradicts", "license-unknown"]


def test_the_base_is_asked_for_by_id_and_revision(folder):
    asked = []
    problems = found(folder, base_exists=lambda base, revision: asked.append((base, revision)) or False)
    assert asked == [("org/base", "0" * 40)]
    assert [(p.code, p.blocking) for p in problems] == [("base-not-found", True)]
    assert "org/base" in problems[0].message


@pytest.mark.parametrize("answer", [None, OSError("no route")])
def test_an_unknown_base_is_said_to_be_unknown(answer, folder):
    def exists(base, revision):
        if answer:
            raise answer

    problems = found(folder, base_exists=exists)
    assert [(p.code, p.blocking) for p in problems] == [("base-unknown", False)]


def test_without_a_hub_both_are_unknown(folder):
    """The test run's endpoint answers nobody."""
    problems = check_folder(folder)
    assert [(p.code, p.blocking) for p in problems] == [("base-unknown", False), ("license-unknown", False)]


def test_the_hub_is_asked_by_default(folder, monkeypatch):
    from hub.server import HubServer

    with HubServer() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", hub.endpoint)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert [p.code for p in check_folder(folder)] == ["base-not-found", "license-unknown"]
        hub.add_repo("org/base", files={"README.md": b"---\nlicense: llama3.2\n---\n"})
        edit_json("config.json", base_model_revision=hub.repo("org/base").commit("main").oid)(folder)
        codes = {p.code for p in check_folder(folder)}
        assert "license-contradicts" in codes
        assert not {"base-not-found", "base-unknown", "license-unknown", "base-unpinned"} & codes
    huggingface_hub.close_session()


# ---- the whole ----


def test_blocking_problems_come_first(folder):
    edit_json("config.json", base_model_revision=None)(folder)
    put("notes.txt", "x")(folder)
    problems = found(folder)
    assert [p.blocking for p in problems] == sorted((p.blocking for p in problems), reverse=True)
    assert not problems[-1].blocking


def test_no_folder(tmp_path):
    with pytest.raises(AdapterError, match="no such folder"):
        check_folder(tmp_path / "nothing")


def test_an_empty_folder_lacks_everything(tmp_path):
    codes = {problem.code for problem in found(tmp_path)}
    assert codes == {"missing-file"}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_protocol(protocol):
    assert looks_like_pickle(pickle.dumps(Path("x"), protocol=protocol))


def test_no_text_looks_like_a_pickle():
    root = Path(__file__).parents[2]
    texts = [
        path for pattern in ("*.py", "*.md", "*.json", "*.jinja") for path in root.glob(f"minilora_hub/**/{pattern}")
    ]
    assert texts
    assert [path.name for path in texts if looks_like_pickle(path.read_bytes())] == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_values_that_are_not_finite_are_found(dtype):
    assert _is_finite(torch.zeros(0, dtype=dtype))
    for wrong in (float("nan"), float("inf"), -float("inf")):
        values = torch.ones(3, 5)
        assert _is_finite(values.to(dtype))
        values[1, 3] = wrong
        assert not _is_finite(values.to(dtype))


@pytest.mark.parametrize(
    "path",
    [
        "/home/ana/x", "/Users/ana/x", "file:///root/x", "/mnt/c/x", "/content/drive/My", "/kaggle/working",
        "/private/var/folders/a", "C:\\Users\\ana", "C:/Users/ana", "c:\\\\Users\\\\ana",
    ],
)  # fmt: skip
def test_the_quick_look_for_paths_misses_none(path):
    assert MACHINE_PATH.search(f"at {path}")
    assert any(part in path for part in IN_EVERY_MACHINE_PATH)
