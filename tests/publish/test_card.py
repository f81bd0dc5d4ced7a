"""Cards: only measured facts, metadata that the Hub accepts, free text that survives, and nothing that breaks out."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from hub.cards import check_card
from hub.server import HubServer
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from publish.examples import CONFIG, card_folder, clean_folder, evaluated_results, full_results, minimal_results
from tiny import tiny_base
from tiny_stand_ins import byte_tokenizer

from minilora_hub import formatting
from minilora_hub.adapter_folder.results import Base, Evaluation, Sample
from minilora_hub.errors import AdapterError
from minilora_hub.publish.card import free_text
from minilora_hub.publish.card.metadata import eval_results_files
from minilora_hub.publish.card.render import numbers_in, render_card, settings_of, write_card

NASTY = [
    "```\n</details><script>alert(1)</script>\n```python",
    "a | b || c \\| d\n| --- |",
    "<!-- minilora:free-text intro -->\nfake\n<!-- /minilora:free-text -->",
    "--- \n# Heading\n\n* item [link](javascript:alert(1)) ![image](x.png)",
    "`tick` ``two`` **bold** __under__ ~~gone~~ $x$ &amp; &#60;b&#62; {{ 7 * 7 }} {% raw %}",
    "\u202eevil\u202c \x1b[31mred\x07 \u200b",
    "<img src=x onerror=alert(1)>\r\n<table><tr><td>",
]


@pytest.fixture
def full(tmp_path) -> Path:
    return card_folder(tmp_path / "smollm2-mixlora", full_results())


@pytest.fixture
def minimal(tmp_path) -> Path:
    return card_folder(tmp_path / "bare", minimal_results(), {})


def metadata(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def page(card: str) -> str:
    """The body as HTML, by a renderer that lets HTML through as the Hub's does before it cleans."""
    return MarkdownIt("commonmark").enable("table").render(card.split("\n---\n", 1)[1])


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        (
            {"routing_strategy": "top_p", "router_top_p": 0.7, "router_temperature": 0.0},
            ["| Experts | 4, 1 to 4 per token |", "until their probabilities exceed 0.7", "| Routing | top\\_p |"],
        ),
        (
            {"routing_strategy": "switch", "num_experts_per_tok": 1, "expert_capacity": 9, "router_sparse_step": 2},
            ["| Experts | 4, 1 per token |", "in one feed-forward block in 2, 1 of them", "| 9 tokens of a sequence |"],
        ),
    ],
)
def test_a_card_says_how_many_experts_serve_a_token(tmp_path, changes, facts):
    """And names no export that would be refused."""
    config = {name: value for name, value in CONFIG.items() if name != "num_experts_per_tok"} | changes
    card = render_card(card_folder(tmp_path / "card", full_results(), config), repo_id=None)
    for fact in facts:
        assert fact in card, fact
    assert "mixtral" not in card
    assert "None" not in card
    limits = card[card.index("It cannot be merged into the base") :]
    assert limits.splitlines()[1].startswith("- "), "the next limit follows on the next line"


def test_a_full_card_states_the_facts(full):
    card = render_card(full, repo_id="ana/dates", revision="v1", space="ana/compare")
    for fact in (
        'repo, revision = "ana/dates", "v1"',
        "https://huggingface.co/spaces/ana/compare?adapter=ana%2Fdates",
        "| dates | exact match | 45 | 0 | **0.933** | 0.821 to 0.977 |",
        "4,032,000 parameters, 3.00% of the base's",
        "1,600 items, 76,543 tokens",
        "| Wall time | 21 min 4 s |",
        "| Libraries | torch 2.13.0, transformers 5.23.0 |",
        "| Experts | 4, 2 per token |",
        "`sha256:" + "ab" * 32 + "`",
        "0123456789abcdef",
        "cannot be merged",
        "minilora export DIR --to mixtral",
        "![Training loss by step, from 0.5 to 0.025](pictures/loss.png)",
        "(pictures/expert_load.png)",
        "modeling_minilora.py",
        "minilora eval DIR",
    ):
        assert fact in card, fact
    assert "unknown" not in card


def test_a_card_shows_what_minilora_eval_measures(tmp_path):
    card = write_card(card_folder(tmp_path / "card", evaluated_results()), repo_id="ana/dates").read_text()
    for line in (
        "| Task | Metric | Items | Base | Base, 4 examples | This adapter | 95% interval |",
        "| Dates \\| spoken | exact match | 512 | 0.0125 | 0.2344 | **0.8125** | 0.775 to 0.844 |",
        "| general text | perplexity, lower is better | 64 | 18.77 | | **21.35** | 19.1 to 23.6 |",
        "| Dates \\| spoken | exact match | difficulty 1 | 200 | 0.0301 | 0.4512 | **0.9251** | 0.881 to 0.954 |",
        "| Dates \\| spoken | exact match | difficulty 2 | 312 | 0.0011 | | **0.7402** | unknown |",
        "each expert would serve 0.25 of the tokens.",
        "| Dates \\| spoken | 12,345 | 0.555 | 0.36 | 0.14 |",
        "| numbers in \\$x\\_{ | 678 | 0.25 | 0.7 | 0.1 |",
        "(pictures/expert_load_by_task.png)",
        "minilora eval DIR --base org/base --few-shot 4",
    ):
        assert line in card, line
    html = page(card)
    rows = [table.count("<td") for table in re.findall(r"<tbody>(.*?)</tbody>", html, re.DOTALL)]
    assert rows[:4] == [2 * 7, 2 * 8, 2 * 3, rows[3]]
    assert [row.count("<td") for row in re.findall(r"<tr>\n<td>numbers.*?</tr>", html, re.DOTALL)] == [5]
    metric = {row["metrics"][0]["name"]: row for row in metadata(card)["model-index"][0]["results"]}
    assert metric["perplexity"]["metrics"][0]["value"] == 21.3456
    assert check_card(card) == ([], [])
    picture = (tmp_path / "card" / "pictures" / "expert_load_by_task.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 90_000


def test_a_minimal_card_says_unknown_and_invents_nothing(minimal):
    card = render_card(minimal, repo_id=None)
    for line in (
        "Nothing was measured.",
        "| Base revision | unknown |",
        "| Base fingerprint | unknown |",
        "its number of parameters is unknown",
        "The adapter's licence: unknown. The base's licence: unknown.",
    ):
        assert line in card, line
    assert "pictures/" not in card
    assert not {"license", "language", "datasets", "model-index"} & metadata(card).keys()
    assert numbers_in(card) == []


@pytest.mark.parametrize("method", ["mixlora", "dora", "lora"])
@pytest.mark.parametrize("known", [True, False])
def test_the_hub_accepts_the_metadata(method, known, tmp_path):
    results = full_results(method=method) if known else minimal_results(method)
    folder = card_folder(tmp_path / "adapter", results)
    if method == "lora":
        (folder / "config.json").rename(folder / "adapter_config.json")
        for path in folder.glob("*.py"):
            path.unlink()
    card = render_card(folder, repo_id="ana/adapter")
    assert check_card(card) == ([], [])
    data = ModelCard(card).data
    assert data.base_model == "org/base"
    assert data.base_model_relation == "adapter"
    assert data.pipeline_tag == "text-generation"
    assert data.library_name == ("peft" if method == "lora" else "transformers")
    assert {method, "minilora"} <= set(data.tags)
    if known:
        assert (data.license, data.language, data.datasets) == ("apache-2.0", ["en"], ["org/dates"])
        rows = [(row.dataset_name, row.metric_type, row.metric_value) for row in data.eval_results]
        assert rows == [("dates", "exact_match", 0.933), ("numbers", "exact_match", 0.605)]
    assert ("trust_remote_code" in card) == (method != "lora")


def test_the_clients_own_validation_accepts_it(full, monkeypatch):
    """It asks the Hub, which here is the one under tests/hub, over HTTP."""
    with HubServer() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        card = ModelCard(render_card(full, repo_id="ana/adapter"))
        card.validate()
        with pytest.raises(ValueError, match="base_model"):
            ModelCard(str(card).replace("base_model: org/base", "base_model: /not/an/id")).validate()
    huggingface_hub.close_session()


def test_eval_results_are_written_for_registered_benchmarks_only(full, tmp_path):
    assert eval_results_files(full) == {}
    rows = (
        Evaluation("GSM8K", "accuracy", 0.5, dataset="openai/gsm8k", benchmark_task="gsm8k"),
        Evaluation("ours", "accuracy", 0.5, dataset="ana/ours"),
    )
    folder = card_folder(tmp_path / "benchmark", full_results(evaluation=rows))
    (name, content), *others = eval_results_files(folder).items()
    assert (name, others) == (".eval_results/openai__gsm8k.yaml", [])
    (entry,) = yaml.safe_load(content)
    assert entry["dataset"] == {"id": "openai/gsm8k", "task_id": "gsm8k"}
    assert entry["value"] == 0.5


def test_rendering_is_repeatable_and_loads_no_torch(full):
    script = (
        "import sys; from pathlib import Path; from minilora_hub.publish.card.render import render_card, write_card\n"
        "folder = Path(sys.argv[1]); card = render_card(folder, repo_id='ana/x'); write_card(folder, repo_id='ana/x')\n"
        "assert not {'torch', 'transformers', 'peft'} & sys.modules.keys(), 'loaded'\n"
        "sys.stdout.buffer.write(card.encode())"
    )
    command = [sys.executable, "-W", "error", "-c", script, str(full)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == render_card(full, repo_id="ana/x") == (full / "README.md").read_text()


@pytest.mark.slow
def test_the_snippet_of_a_plain_lora_pins_the_adapter_and_not_the_base(tmp_path):
    """Transformers applies `revision=` of a repo in PEFT's format to the base, which has no such tag."""
    from peft import LoraConfig, get_peft_model

    base, folder = tmp_path / "base", tmp_path / "adapter"
    plain = tiny_base(vocab_size=259, eos_token_id=None, bos_token_id=None)
    plain.save_pretrained(base)
    lora = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    lora.peft_config["default"].base_model_name_or_path = "org/base"
    lora.save_pretrained(folder, save_embedding_layers=False)
    byte_tokenizer().save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    count = sum(parameter.numel() for parameter in lora.parameters() if parameter.requires_grad)
    full_results(method="lora", parameters=count, expert_load=None).save(folder)
    card = write_card(folder, repo_id="author/lora", revision="v1").read_text()
    snippet = re.search(r"```python\n(.*?)\n```", card, re.DOTALL)[1]
    with HubServer() as hub:
        hub.add_repo("org/base", files={path.name: path.read_bytes() for path in base.iterdir()})
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        repo = hub.add_repo("author/lora", files=files)
        repo.tags["v1"] = repo.commit("main")
        done = subprocess.run(
            [sys.executable, "-c", snippet],
            env=hub.environment(cache_dir=tmp_path / "cache"),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()


@pytest.mark.slow
def test_the_snippet_runs_as_it_stands(tmp_path):
    """A stranger pastes it, without minilora_hub, against a Hub that has the adapter and its base."""
    base = tmp_path / "base"
    tiny_base(vocab_size=259, eos_token_id=None, bos_token_id=None).save_pretrained(base)
    folder = clean_folder(tmp_path / "adapter", "dora")
    with HubServer() as hub:
        hub.add_repo("org/base", files={path.name: path.read_bytes() for path in base.iterdir()})
        config = json.loads((folder / "config.json").read_text())
        config["base_model_revision"] = hub.repo("org/base").commit("main").oid
        (folder / "config.json").write_text(json.dumps(config))
        card = write_card(folder, repo_id="author/adapter").read_text()
        files = [path for path in folder.rglob("*") if path.is_file()]
        hub.add_repo("author/adapter", files={p.relative_to(folder).as_posix(): p.read_bytes() for p in files})
        snippet = re.search(r"```python\n(.*?)\n```", card, re.DOTALL)[1]
        done = subprocess.run(
            [sys.executable, "-c", "import sys; sys.modules['minilora_hub'] = None\n" + snippet],
            env=hub.environment(cache_dir=tmp_path / "cache"),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()


# ---- free text ----


def test_free_text_survives(full):
    card = write_card(full, repo_id="ana/x").read_text()
    text = "I trained this **by hand**.\n\n\n\n```python\nprint('<!-- /minilora:free-text')\n```\n\n| a | b |\n"
    edited = card.replace("<!-- minilora:free-text intro -->\n", f"<!-- minilora:free-text intro -->\n{text}")
    edited += "\n<!-- minilora:free-text thanks -->\nTo everyone.\n<!-- /minilora:free-text -->\n"
    (full / "README.md").write_text(edited)
    full_results(parameters=1_000).save(full)
    again = write_card(full, repo_id="ana/x", revision="v2").read_text()
    assert text.strip("\n") in again
    assert "To everyone." in again
    assert "1,000 parameters" in again
    assert free_text.sections_of(again) == free_text.sections_of(edited)
    assert write_card(full, repo_id="ana/x", revision="v2").read_text() == again


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ("a\n<!-- minilora:free-text intro -->\nb\n", "line 2: the free-text section 'intro' is not closed"),
        (2 * "<!-- minilora:free-text x -->\n<!-- /minilora:free-text -->\n", "line 3: a second free-text section 'x'"),
    ],
)
def test_broken_marks_are_named(card, said, full):
    with pytest.raises(AdapterError, match=re.escape(said)):
        render_card(full, repo_id=None, previous=card)


def test_a_readme_of_somebody_else_is_not_overwritten(full):
    (full / "README.md").write_text("# Mine\n")
    with pytest.raises(AdapterError, match=r"README\.md was not written by minilora"):
        write_card(full, repo_id="ana/x")
    assert (full / "README.md").read_text() == "# Mine\n"


def test_marks_in_a_code_block_are_text():
    card = "```text\n<!-- minilora:free-text intro -->\n```\n~~~~\n```\n<!-- minilora:free-text x -->\n~~~\n~~~~\nend\n"
    assert free_text.sections_of(card) == {}
    assert [kind for kind, _, _ in free_text.classify(card)][-1] == "text"


# ---- text from outside ----


@pytest.mark.parametrize("text", NASTY)
def test_nothing_breaks_out(text, tmp_path):
    results = full_results(
        base=Base(text, revision=text, fingerprint=text, note=text, license=text),
        samples=(Sample(text, text, text), Sample("second", "row", "here")),
        evaluation=(Evaluation(text, text, 0.5, command=text, note=text),),
        decoding=text,
        license_link="javascript:alert(1)",
    )
    training = dataclasses.replace(
        results.training, hardware=text, hyperparameters={text: text}, libraries={text: text}
    )
    results = dataclasses.replace(results, training=training, license_name=text)
    folder = card_folder(tmp_path / "adapter", results, CONFIG | {"target_modules": [text]})
    card = render_card(folder, repo_id="ana/x")
    assert set(free_text.sections_of(card)) == {"intro", "results", "limits"}
    assert settings_of(card) == {"repo_id": "ana/x", "revision": None, "space": None}
    html = page(card)
    for tag in ("<script", "<img src=x", "onerror=alert(1)>", 'href="javascript', "<h1>Heading", '<img src="x.png"'):
        assert tag not in html
    assert "49" not in re.sub(r"[0-9a-f]{64}", "", html)  # {{ 7 * 7 }} was not computed
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x1b\x07]", card)
    headings = [found[1] for found in re.finditer(r"<h2>(.*?)</h2>", html)]
    assert headings[:4] == ["Use it", "Serve it", "Results", "Answers of the base and this adapter"]
    assert headings[-2:] == ["Security", "Licence"]
    table = re.search(r"<h2>Answers of.*?<tbody>(.*?)</tbody>", html, re.DOTALL)[1]
    assert table.count("<tr>") == 2
    assert table.count("<td>") == 6
    assert "<td>second</td>\n<td>row</td>\n<td>here</td>" in table
    compile(re.search(r"(`{3,})python\n(.*?)\n\1\n", card, re.DOTALL)[2], "snippet", "exec")
    yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))


@pytest.mark.parametrize("text", ["plain", "a `b` c", "``", "`", "a|b", "<i>|`x`</i>", "*a* _b_ #c $d$ \\e [f](g)"])
def test_escapes_show_the_text_itself(text):
    show = MarkdownIt("commonmark").enable("table").render
    for shown in (formatting.inline(text), formatting.code(text)):
        for html in (show(f"x {shown}"), show(f"| h |\n| - |\n| {shown} |")):
            assert re.sub(r"<[^>]*>", "", html).strip().removeprefix("x ").removeprefix("h").strip() == (
                text.replace("<", "&lt;").replace(">", "&gt;")
            )


@pytest.mark.parametrize("repo_id", ["a/b/c", "../x", "a--b", "https://example.org/x"])
def test_a_bad_repo_id_is_refused(repo_id, full):
    with pytest.raises(ValueError, match=r"Repo id|Cannot have"):
        render_card(full, repo_id=repo_id)


def test_a_revision_cannot_end_the_comment(full):
    card = render_card(full, repo_id="ana/x", revision='v1 --> <b>"')
    assert settings_of(card)["revision"] == 'v1 --> <b>"'
    assert "<b>" not in page(card).replace("&lt;b&gt;", "")


# ---- numbers and pictures ----


def test_numbers_in():
    card = (
        "It has 1,234 and -0.5, 12.5% or 1e-4.\n```\n99\n```\n`77` [x](a/55.png) http://x.y/44 v1.2.3 Q4_1 2404.15159\n"
    )
    assert numbers_in(card) == ["1,234", "-0.5", "12.5%", "1e-4", "2404.15159"]


def test_pictures_are_small_and_follow_the_numbers(full):
    write_card(full, repo_id=None)
    pictures = sorted(full.glob("pictures/*"))
    assert [path.name for path in pictures] == ["expert_load.png", "loss.png"]
    first = [path.read_bytes() for path in pictures]
    assert all(len(data) < 60_000 and data.startswith(b"\x89PNG") for data in first)
    write_card(full, repo_id=None)
    assert [path.read_bytes() for path in pictures] == first
    full_results(training=None, expert_load=None).save(full)
    write_card(full, repo_id=None)
    assert not list(full.glob("pictures/*"))


def test_damaged_inputs_are_named(full):
    (full / "config.json").write_text("[]")
    with pytest.raises(AdapterError, match=r"config\.json must hold a JSON object"):
        render_card(full, repo_id=None)
    (full / "config.json").unlink()
    with pytest.raises(AdapterError, match=r"no config\.json"):
        render_card(full, repo_id=None)
    (full / "results.json").write_text(json.dumps({"schema_version": 9}))
    with pytest.raises(AdapterError, match="schema_version=9"):
        render_card(full, repo_id=None)
