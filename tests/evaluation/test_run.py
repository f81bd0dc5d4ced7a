"""A whole measurement on tiny models: scores, perplexity, routing, stops, one alone against all together."""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from evaluation.small_tasks import SIZES, TASKS, small_tasks  # noqa: F401  a fixture
from formats.helpers import edit_json
from peft import PeftModel
from tiny import CAUSAL_LM
from tiny_stand_ins import byte_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM

from minilora_hub.adapter_folder.results import Base, Evaluation, Results
from minilora_hub.adapter_folder.verification import Verification
from minilora_hub.errors import AdapterError
from minilora_hub.evaluation import answer_cache, generation
from minilora_hub.evaluation import perplexity as general_text
from minilora_hub.evaluation.answer_cache import AnswerCache
from minilora_hub.evaluation.outputs import as_dict, save_results
from minilora_hub.evaluation.report import evaluations, updated_results
from minilora_hub.evaluation.run import evaluate

pytestmark = pytest.mark.usefixtures("small_tasks")


def measure(saved, *names, **settings):
    base, adapters = saved
    folders = [folder for folder in adapters if folder.name in names]
    return evaluate(folders, base=base, **({"cache": False, "few_shot": 2, "batch_size": 4} | settings))


def told(report):
    """Everything but the times and how much was known."""
    return {key: value for key, value in as_dict(report).items() if key not in ("seconds", "rows_computed")}


def test_the_answers_are_those_of_generate(saved):
    """With prompts written out by hand, for the base with and without examples, and an adapter."""
    base, adapters = saved
    report = measure(saved, "dora", held_out=True)
    tokenizer = byte_tokenizer()
    models = [AutoModelForCausalLM.from_pretrained(base)] * 2
    models.append(CAUSAL_LM["dora"].from_pretrained(adapters[1], base_model=tiny_llama()))
    assert [model.name for model in report.models] == ["base", "base, 2 examples", str(adapters[1])]
    assert {key: len(items) for key, items in report.items.items()} == {
        "echo": SIZES["test"],
        "record": SIZES["test"] - 1,
        "echo held_out": SIZES["held_out"],
        "record held_out": SIZES["held_out"] - 1,
    }
    assert report.limits == {"echo": 9 + 8, "record": 8 + 8, "echo held_out": 9 + 8, "record held_out": 8 + 8}
    for model, shown in zip(models, report.models, strict=True):
        for key, items in report.items.items():
            for line, item in enumerate(items):
                text = ""
                if shown.few_shot:
                    examples = report_examples(key.split()[0])
                    text = "".join(f"<|user|>{p}<|end|><|user|>{c}<|end|>" for p, c in examples)
                text += f"<|user|>{item.prompt}<|end|><|assistant|>"
                ids = tokenizer(text, return_tensors="pt")
                out = model.generate(
                    input_ids=ids["input_ids"],
                    attention_mask=ids["attention_mask"],
                    max_new_tokens=report.limits[key],
                    do_sample=False,
                    pad_token_id=0,
                )
                answer = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
                assert shown.scores[key].answers[line] == answer.strip()
                assert shown.scores[key].exact[line] == (answer.strip() == item.completion)


def test_an_adapter_is_asked_with_its_own_chat_template(saved, tmp_path):
    """And its answers end where that ends a turn; the base, which has none, is asked with the text alone."""
    base, adapters = tmp_path / "base", saved[1]
    tiny_llama().save_pretrained(base)
    byte_tokenizer(chat=False).save_pretrained(base)
    shutil.copytree(adapters[2], tmp_path / "lora")
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|assistant|>{% endfor %}[answer]"
    (tmp_path / "lora" / "chat_template.jinja").write_text(template)
    lines = []
    report = evaluate(
        [tmp_path / "lora"], base=base, tasks=["echo"], count=4, cache=False, few_shot=0, progress=lines.append
    )
    assert lines[-2:] == [
        "  answers end at <|end|> <|user|>",
        f"  + {tmp_path / 'lora'}: LoRA, rank 4, own chat template, ends at <|end|> <|user|> <|assistant|>",
    ]
    tokenizer = byte_tokenizer(chat=False)
    models = [tiny_llama(), PeftModel.from_pretrained(tiny_llama(), adapters[2]).eval()]
    for model, shown, wrap in zip(models, report.models, ("{}", "[user]{}<|assistant|>[answer]"), strict=True):
        for item, answer in zip(report.items["echo"], shown.scores["echo"].answers, strict=True):
            ids = tokenizer(wrap.format(item.prompt), return_tensors="pt")["input_ids"]
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=report.limits["echo"],
                do_sample=False,
                pad_token_id=0,
                eos_token_id=[256, 257] if wrap == "{}" else [256, 257, 258],
            )
            assert answer == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def report_examples(task):
    """The two examples, which are the same in every run: (prompt, completion)."""
    return [(i.prompt, i.completion) for i in random.Random(0).sample(list(TASKS[task].items("train")), 2)]


def test_perplexity_is_that_of_a_plain_loop(saved, tmp_path):
    base, adapters = saved
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    report = measure(saved, "mix", tasks=["record"], count=1, few_shot=0, perplexity=True, text=text)
    ids = byte_tokenizer()(text.read_text())["input_ids"]
    windows = [ids[start : start + 256] for start in range(0, len(ids) - 255, 256)]
    assert len(windows) == 7
    mix = CAUSAL_LM["mixlora"].from_pretrained(adapters[0], base_model=tiny_llama()).eval()
    for model, shown in zip([AutoModelForCausalLM.from_pretrained(base).eval(), mix], report.models, strict=True):
        total, count = 0.0, 0
        for window in windows:
            with torch.no_grad():
                probabilities = model(torch.tensor([window])).logits[0].double().softmax(-1)
            for place in range(1, 256):
                total -= math.log(probabilities[place - 1, window[place]])
                count += 1
        (row,) = [row for row in evaluations(report, shown) if row.metric == "perplexity"]
        assert row.value == pytest.approx(math.exp(total / count), rel=1e-4)
        assert row.interval[0] < row.value < row.interval[1]
        assert (row.n, row.lower_is_better) == (7, True)
        assert report.text[0].sha256[:16] in row.note


def test_the_default_text_is_that_of_every_published_perplexity():
    """It does not depend on the version of Python, and its licence lies beside it."""
    root = Path(__file__).parents[2]
    text = general_text.read_text()
    notes = [
        row["note"]
        for file in root.glob("model_cards/*/results.json")
        for row in json.loads(file.read_text(encoding="utf-8"))["evaluation"]
        if row["metric"] == "perplexity"
    ]
    assert len(notes) == 4
    assert {note == text.describe(general_text.WINDOWS) for note in notes} == {True}
    licence = (general_text.MANUAL.parent / "LICENSE.txt").read_text(encoding="utf-8")
    assert "Copyright (c) 2001" in licence
    assert general_text.MANUAL.name in licence


def test_a_long_text_is_sampled_evenly():
    text = general_text.GeneralText("x", "abcdefgh" * 32 * 200)
    windows = general_text.windows_of(byte_tokenizer(), text)
    assert len(windows) == general_text.WINDOWS
    assert {len(window) for window in windows} == {general_text.WINDOW}
    default = general_text.read_text()
    assert len(default.content) > 300_000
    assert len(general_text.windows_of(byte_tokenizer(), default)) == general_text.WINDOWS


@pytest.mark.slow
def test_together_is_the_same_as_each_alone(saved):
    together = told(measure(saved, "mix", "dora", "lora", perplexity=True))
    for index, name in enumerate(("mix", "dora", "lora")):
        alone = told(measure(saved, name, perplexity=True))
        assert alone["models"][0] == together["models"][0]
        assert alone["models"][1] == together["models"][1]
        assert alone["models"][2] == together["models"][2 + index]
    one_task = told(measure(saved, "mix", tasks=["record"]))
    assert one_task["models"][2]["answers"]["record"] == together["models"][2]["answers"]["record"]


def test_batch_sizes_make_no_difference_here(saved):
    """In fp32, up to ties, which a random model has none of."""
    whole, small = (measure(saved, "mix", batch_size=size) for size in (64, 3))
    for one, other in zip(whole.models, small.models, strict=True):
        assert one.scores == other.scores
        assert {k: v.chosen for k, v in one.routing.items()} == {k: v.chosen for k, v in other.routing.items()}


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_where_it_was(saved, tmp_path, monkeypatch):
    """Stopped in the middle of a batch, and its last line torn: the numbers are those of a run without a stop."""
    whole = measure(saved, "mix", "lora", perplexity=True)
    assert whole.computed == 4 * 21 + 3 * general_text.WINDOWS
    calls = 0

    def interrupted(*args):
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return generation.generate(*args)

    monkeypatch.setattr("minilora_hub.evaluation.run.generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(saved, "mix", "lora", perplexity=True, cache=tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr("minilora_hub.evaluation.tasks.registry.TASKS", whole.tasks)
    last = max(tmp_path.glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    last.write_bytes(last.read_bytes()[:-7])
    before = [line for path in tmp_path.glob("*.jsonl") for line in path.read_text().splitlines()]
    values = [json.loads(line)["value"] for line in before if line.endswith("}")]
    assert len(values) == len(before) - 1, "one is torn"
    known = sum(len(value["tokens"]) if isinstance(value, dict) else len(value) for value in values)
    resumed = measure(saved, "mix", "lora", perplexity=True, cache=tmp_path)
    assert told(resumed) == told(whole)
    assert 21 + general_text.WINDOWS < known < whole.computed
    assert resumed.computed == whole.computed - known
    again = measure(saved, "mix", "lora", perplexity=True, cache=tmp_path)
    assert again.computed == 0
    assert told(again) == told(whole)


@pytest.mark.parametrize("changed", ["weights", "settings", "prompts", "base"])
def test_what_was_computed_is_not_taken_for_something_else(saved, tmp_path, changed, monkeypatch):
    from safetensors.torch import load_file, save_file

    base, adapters = saved
    base = shutil.copytree(base, tmp_path / "base")
    folder = shutil.copytree(adapters[1], tmp_path / "dora")

    def once(**settings):
        options = {"tasks": ["echo"], "few_shot": 0, "cache": tmp_path / "cache", "batch_size": 4}
        return evaluate([folder], base=base, **(options | settings))

    first = once()
    assert first.computed == 2 * SIZES["test"]
    assert once().computed == 0
    if changed == "weights":
        weights = load_file(folder / "adapter_model.safetensors")
        save_file({k: v + 0.05 for k, v in weights.items()}, folder / "adapter_model.safetensors")
        assert once().computed == SIZES["test"], "the base is known"
    elif changed == "settings":
        assert once(dtype="bfloat16").computed == 2 * SIZES["test"]
        assert once(batch_size=5).computed > 0
    elif changed == "base":
        edit_json(base / "config.json", rms_norm_eps=0.5)
        assert once().computed == 2 * SIZES["test"], "its weights are the same, and compute something else"
    else:
        assert once(split="validation").computed == 2 * SIZES["validation"]


@pytest.mark.parametrize("changed", ["library/torch", "code/remote_code/routing.py", "code/evaluation/generation.py"])
def test_a_cache_of_other_libraries_or_code_is_not_used(tmp_path, monkeypatch, changed):
    cache = AnswerCache(tmp_path, {"base": "x"})
    cache.put(cache.key({"a": 1}), [1])
    again = AnswerCache(tmp_path, {"base": "x"})
    assert again.get(again.key({"a": 1})) == [1]
    assert changed in answer_cache.CODE_AND_LIBRARIES
    monkeypatch.setitem(answer_cache.CODE_AND_LIBRARIES, changed, "9")
    other = AnswerCache(tmp_path, {"base": "x"})
    assert other.get(other.key({"a": 1})) is None


def test_results_have_it_all(saved, tmp_path):
    base, adapters = saved
    folder = tmp_path / "mix"
    folder.mkdir()
    for path in adapters[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    older = Evaluation("something else", "accuracy", 0.5)
    Results(
        "mixlora",
        Base("org/base", parameters=7),
        license="mit",
        evaluation=(older, Evaluation("x", "exact match", 1.0)),
    ).save(folder)
    report = evaluate([folder], base=base, cache=False, few_shot=2, perplexity=True, held_out=True)
    model = report.models[-1]
    results = updated_results(report, model)
    results.save(folder)
    assert Results.load(folder) == results
    assert (results.license, results.base.parameters) == ("mit", 7)
    assert older in results.evaluation
    assert [(row.task, row.metric, row.n) for row in results.evaluation[:-2]] == [
        ("Say it again", "exact match", 11),
        ("As a record", "exact match", 10),
        ("As a record", "JSON field F1", 10),
        ("Say it again, in formats that are not in training", "exact match", 2),
        ("As a record, in formats that are not in training", "exact match", 1),
        ("As a record, in formats that are not in training", "JSON field F1", 1),
        ("echo, record together", "exact match", 21),
        ("general text", "perplexity", general_text.WINDOWS),
    ]
    first = results.evaluation[0]
    assert first.few_shot == 2
    assert [(part.name, part.n) for part in first.parts] == [("difficulty 1", 6), ("difficulty 2", 5)]
    exact = [model.scores["echo"].exact, report.models[0].scores["echo"].exact, report.models[1].scores["echo"].exact]
    assert [first.value, first.base_value, first.few_shot_value] == [round(sum(s) / 11, 4) for s in exact]
    assert first.command == (
        f"minilora eval DIR --base {'BASE'} --task echo --task record --split test --held-out --few-shot 2 "
        "--perplexity --dtype float32 --batch-size 64"
    )
    routed = sum(sums.tokens for sums in model.routing.values())
    assert sum(use.tokens for use in results.router) == routed > 0
    assert [use.task for use in results.router][:2] == ["Say it again", "As a record"]
    for layer in range(2):
        shares = [
            sum(sums.chosen[layer][expert] for sums in model.routing.values()) / (2 * routed) for expert in range(4)
        ]
        assert results.expert_load[layer] == pytest.approx(shares, abs=1e-4)
    assert len(results.samples) == 4
    assert results.samples[0].adapter == model.scores["echo"].answers[0]
    assert "float32" in results.decoding


@pytest.mark.parametrize("changed_before", [False, True])
def test_a_verification_that_knew_the_results_knows_the_new_ones(tmp_path, changed_before):
    """But none that recorded another file: that would hide what happened to it."""
    first, second = Results("dora", Base("org/base")), Results("dora", Base("org/base"), license="mit")
    old = hashlib.sha256(first.save(tmp_path).read_bytes()).hexdigest()
    recorded = "0" * 64 if changed_before else old
    Verification(
        prompts=((1,),),
        top_tokens=((1,),),
        top_logits=((1.0,),),
        tolerance=1e-4,
        sha256={"results.json": recorded, "config.json": "1" * 64},
        base_fingerprint="unknown",
        dtype="float32",
    ).save(tmp_path)
    path = save_results(second, tmp_path)
    new = hashlib.sha256(path.read_bytes()).hexdigest()
    assert new != old
    expected = {"results.json": recorded if changed_before else new, "config.json": "1" * 64}
    assert Verification.load(tmp_path).sha256 == expected
    assert Results.load(tmp_path) == second


def test_items_for_training_are_no_test_of_it(saved):
    """Their numbers are not in the place of those of test items."""
    report = measure(saved, "lora", few_shot=0, split="train", count=2)
    titles = [row.task for row in evaluations(report, report.models[1])]
    assert titles == [
        "Say it again, train split",
        "As a record, train split",
        "As a record, train split",
        "echo, record together, train split",
    ]


def test_an_adapter_without_results_gets_them(saved, tmp_path):
    report = measure(saved, "lora", tasks=["echo"], count=2, few_shot=0)
    results = updated_results(report, report.models[-1])
    assert (results.method, results.base.id, results.base.fingerprint) == ("lora", "base", report.fingerprint)
    assert results.expert_load is None
    assert results.router == ()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tasks": ["ecko"]}, "task='ecko': must be one of echo, record"),
        ({"tasks": ["echo", "echo"]}, r"task=\['echo'\]: must be named once each"),
        ({"split": "tset"}, "split='tset': must be one of train, validation, test, held_out"),
        ({"count": 0}, "count=0: must be at least 1"),
        ({"count": 12}, "count=12: must be between 1 and 11"),
        ({"few_shot": -1}, "few_shot=-1: must be at least 0"),
        ({"dtype": "float8"}, "dtype='float8': must be one of float32, bfloat16"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"text": "x.txt"}, "text='x.txt': must be given with perplexity only"),
        ({"perplexity": True, "text": "no/such/file"}, "text='no/such/file': must be a readable file"),
    ],
)
def test_a_wrong_setting_is_told_before_anything_is_loaded(saved, settings, said, monkeypatch):
    from pathlib import Path

    monkeypatch.setattr("minilora_hub.evaluation.run.load_base", lambda *_, **__: pytest.fail("loaded"))
    if "text" in settings:
        settings = settings | {"text": Path(settings["text"])}
    with pytest.raises(ValueError, match=said):
        measure(saved, "mix", **settings)


def test_a_task_without_items_is_refused(saved, monkeypatch):
    from minilora_hub.evaluation.tasks.items import Task

    monkeypatch.setattr(
        "minilora_hub.evaluation.tasks.registry.TASKS", {"none": Task("none", "Nothing", "exact", lambda split: ())}
    )
    with pytest.raises(ValueError, match="task='none': has no items in split 'test'"):
        measure(saved, "mix")


def test_of_the_held_out_items_there_may_be_fewer(saved):
    report = measure(saved, tasks=["echo"], count=3, few_shot=0, held_out=True)
    assert {key: len(items) for key, items in report.items.items()} == {"echo": 3, "echo held_out": 2}
    alone = measure(saved, tasks=["echo"], split="held_out", few_shot=0, held_out=True)
    assert alone.models[0].scores["echo"] == report.models[0].scores["echo held_out"]


def test_more_examples_than_there_are_and_too_long_prompts(saved):
    with pytest.raises(ValueError, match="few_shot=8: task 'echo' has 7 items to train on"):
        measure(saved, few_shot=8)


def test_an_adapter_for_another_base_is_refused_before_anything_is_loaded(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("minilora_hub.evaluation.run.load_base", lambda *_, **__: pytest.fail("loaded"))
    other = tmp_path / "other"
    tiny_llama(seed=1).save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    base, adapters = saved
    folder = tmp_path / "dora"
    folder.mkdir()
    for path in adapters[1].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    from minilora_hub.remote_code.adapter_files import base_fingerprint

    config["base_fingerprint"] = base_fingerprint(str(base))
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"was trained on another base: .*pass its own, base= \(--base\)"):
        evaluate([folder], base=other, cache=False)
    with pytest.raises(AdapterError, match=r"the adapters do not name one base \(.*: pass base="):
        evaluate([folder, adapters[2]], cache=False)
    with pytest.raises(ValueError, match="base=None: must be given where no adapter names one"):
        evaluate([], cache=False)
    with pytest.raises(AdapterError, match="no such folder"):
        evaluate(["no-such-folder"], base=base, cache=False)
    with pytest.raises(ValueError, match=r"adapters=.* must be named once each"):
        evaluate([folder, folder], base=base, cache=False)


def test_progress_reaches_the_end(saved):
    seen = []
    measure(saved, "mix", few_shot=0, perplexity=True, on_progress=seen.append)
    assert [step.done for step in seen] == sorted(step.done for step in seen)
    assert seen[-1].done == seen[-1].total == seen[-1].computed == 2 * (21 + general_text.WINDOWS)
