"""Every value that a user gives is taken or refused by name: 0 above all, which is easily taken for nothing."""

from __future__ import annotations

import inspect
from typing import get_args

import pytest

from minilora_hub.cli import train as commands
from minilora_hub.cli.app import app
from minilora_hub.compare import engine
from minilora_hub.evaluation import run as evaluation
from minilora_hub.training import run as training
from minilora_hub.training import sweep as sweeping
from minilora_hub.training.sweep_trials import Range


class Captured(Exception):
    pass


def error_of(*arguments) -> Exception:
    """What ends a command."""
    with pytest.raises(Exception) as raised:  # noqa: PT011  whatever it is
        app(args=[str(argument) for argument in arguments], prog_name="minilora", standalone_mode=False)
    return raised.value


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Run minilora train over a YAML file that says something else for each flag, up to its settings or its error."""

    def capture(settings):
        raise Captured(settings)

    monkeypatch.setattr(training, "check_requirements", capture)
    (tmp_path / "config.yaml").write_text(
        "method: dora\nbase: embedded\ndata: rows.jsonl\nlearning_rate: 3.0e-4\nepochs: 2\nmax_steps: 7\n"
        "batch_size: 6\nmicro_batch_size: 2\nmax_length: 64\nvalidation: 0.3\nearly_stopping: 3\nsave_every: 5\n"
        "loraplus_ratio: 4\nseed: 3\ntruncate: true\nweight_decay: 0.1\n"
        "adapter:\n  r: 4\n  lora_alpha: 4\n  lora_dropout: 0.2\n"
    )
    command = ("train", "--config", tmp_path / "config.yaml", "--out", tmp_path / "out")
    return lambda *flags: error_of(*command, *flags)


TAKEN = {
    "--rank": ("r", 0),  # which the method's own configuration refuses by name
    "--seed": ("seed", 0),
    "--set seed": ("seed", 0),
    "--set weight_decay": ("weight_decay", 0.0),
    "--set warmup": ("warmup", 0.0),
    "--set max_grad_norm": ("max_grad_norm", 0.0),
    "--set lora_dropout": ("lora_dropout", 0),
}
REFUSED = {
    "--lr": "learning_rate=0.0: must be above 0",
    "--epochs": "epochs=0.0: must be above 0",
    "--max-steps": "max_steps=0: must be at least 1",
    "--budget": "budget=0: must be at least 1",
    "--batch-size": "batch_size=0: must be at least 1",
    "--micro-batch-size": "micro_batch_size=0: must be at least 1",
    "--max-length": "max_length=0: must be at least 1",
    "--early-stopping": "early_stopping=0: must be at least 1",
    "--save-every": "save_every=0: must be at least 1",
    "--loraplus-ratio": "loraplus_ratio=0.0: must be at least 1",
    "--validation": "early_stopping=3: needs --validation",  # 0 is taken, and does not go with the file's
    "--set keep_checkpoints": "keep_checkpoints=0: must be at least 1",
    "--set truncate": "truncate=0: must be true or false",
}


def zero(flag: str) -> list[str]:
    name, _, field = flag.partition(" ")
    return [name, f"{field}=0" if field else "0"]


def test_every_numeric_flag_of_train_is_above():
    hints = inspect.get_annotations(commands.train, eval_str=True)
    kinds = {name: get_args(get_args(kind)[0]) for name, kind in hints.items() if get_args(kind)}
    numeric = {name for name, options in kinds.items() if {int, float} & set(options)}
    flags = {flag.removeprefix("--").replace("-", "_") for flag in TAKEN | REFUSED}
    assert numeric | {"rank"} == (flags | {"learning_rate"}) & hints.keys()  # a rank may be "auto"
    assert len(numeric) == 12


@pytest.mark.parametrize("flag", TAKEN)
def test_zero_over_a_file_is_taken(flag, train):
    settings = train(*zero(flag)).args[0]
    name, value = TAKEN[flag]
    assert (settings.to_dict() | settings.recipe.adapter)[name] == value


@pytest.mark.parametrize("flag", REFUSED)
def test_zero_over_a_file_is_refused_by_name(flag, train):
    assert REFUSED[flag] in str(train(*zero(flag)))


def test_no_validation_and_switches_over_a_file_are_taken(train):
    settings = train("--validation", "0", "--set", "validation_data=other.jsonl").args[0]
    assert settings.recipe.validation == 0
    assert settings.validation_data == ("other.jsonl",)
    assert settings.recipe.truncate is True  # a switch that is not given says nothing
    assert train("--set", "truncate=false").args[0].recipe.truncate is False


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--set", "max_steps="], "--set 'max_steps=': has no value"),
        (["--set", "max_steps=null"], "--set 'max_steps=null': has no value"),
        (["--max-steps", "3", "--set", "max-steps=4"], "--set 'max-steps=4': max_steps is given twice"),
        (["--rank", "3", "--set", "r=4"], "--set 'r=4': r is given twice"),
        (["--set", "r=3", "--set", "r=4"], "--set 'r=4': r is given twice"),
        (["--base", ""], "base is missing"),
        (["--base-revision", ""], "base_revision='': is empty"),
        (["--license", ""], "license='': is empty"),
        (["--data", ""], "data=['']: contains an empty string"),
        (["--seed", "-1"], "seed=-1: must be at least 0"),
    ],
)
def test_values_that_say_nothing_or_twice_are_refused(flags, message, train):
    assert message in str(train(*flags))


# ---- sweep ----


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trials", "0"], "--trials"),
        (["--minutes", "0"], "minutes=0.0: must be above 0"),
        (["--set", "validation=0"], "validation=0: a sweep compares runs on held-out rows"),
        (["--set", "max_steps=0"], "max_steps=0: must be at least 1"),
        (["--vary", "validation=0,0.1"], "validation=0: a sweep compares runs"),
        (["--vary", "r=2,8"], "--vary 'r=2,8': r is given twice"),
        (["--set", "r=2"], "r is varied and set to 2"),
    ],
)
def test_sweep_takes_or_refuses(flags, message, tmp_path):
    (tmp_path / "config.yaml").write_text(
        "method: dora\nbase: embedded\ndata: rows.jsonl\nvalidation: 0.3\nmax_steps: 2\n"
    )
    command = ["sweep", "--config", tmp_path / "config.yaml", "--vary", "r=4,16", "--out", tmp_path / "out"]
    error = error_of(*command, *flags)
    assert message in str(error) + str(getattr(error, "param", "") and error.param.opts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "said", "expected"),
    [
        ("validation: 0.3", {}, None),  # as the file says
        ("validation-data: other.jsonl", {}, None),
        ("validation: 0.3", {"validation": 0.2}, 0.2),
        ("max_steps: 2", {}, sweeping.DEFAULT_VALIDATION),
        ("validation_data: []", {}, sweeping.DEFAULT_VALIDATION),
    ],
)
def test_a_sweep_keeps_what_its_file_says(config, said, expected, tmp_path, monkeypatch):
    """The share that is held out, and the seed of the search: the command line's alone were seen."""
    import optuna

    seeds, sampler = [], optuna.samplers.TPESampler

    def capture(out, **settings):
        raise Captured(settings)

    monkeypatch.setattr(sweeping, "train", capture)
    monkeypatch.setattr(
        optuna.samplers, "TPESampler", lambda seed, **said: seeds.append(seed) or sampler(seed=seed, **said)
    )
    (tmp_path / "config.yaml").write_text(f"method: dora\nbase: embedded\ndata: rows.jsonl\nseed: 5\n{config}\n")
    said = said | {"search": "tpe", "config": str(tmp_path / "config.yaml")}
    with pytest.raises(Captured) as raised:
        sweeping.sweep(tmp_path / "out", {"r": Range(4, 16)}, **said)
    assert raised.value.args[0].get("validation") == expected
    assert seeds == [5]


# ---- eval and compare ----


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--few-shot", "0"], {"few_shot": 0}),
        (["--count", "0"], "count=0: must be at least 1"),
        (["--batch-size", "0"], "batch_size=0: must be at least 1"),
        (["--lm-eval", "arc", "--count", "0"], "count=0: must be at least 1"),
        (["--lm-eval", "arc", "--few-shot", "0"], "--few-shot: only applies to the built-in tasks"),
        (["--lm-eval", "arc", "--few-shot", "4"], "--few-shot: only applies to the built-in tasks"),
        (["--lm-eval", "arc", "--split", "test"], "--split: only applies to the built-in tasks"),
        (["--lm-eval", "arc", "--fresh"], "--fresh: only applies to the built-in tasks"),
        (["--lm-eval", "arc", "--held-out"], "--held-out: only applies to the built-in tasks"),
    ],
)
def test_eval_takes_or_refuses(flags, expected, monkeypatch):
    if isinstance(expected, str):
        assert expected in str(error_of("eval", "./nowhere", *flags))
        return

    def capture(**settings):
        raise Captured(settings)

    monkeypatch.setattr(evaluation, "Settings", capture)
    assert expected.items() <= error_of("eval", "./nowhere", *flags).args[0].items()


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--max-new-tokens", "max_new_tokens=0: must be an integer of at least 1"),
        ("--top-p", "top_p=0.0: must be a number above 0"),
        ("--repetition-penalty", "repetition_penalty=0.0: must be a number from 0.01 to 10"),
        ("--temperature", 0.0),
        ("--top-k", 0),
        ("--seed", 0),
    ],
)
def test_compare_takes_or_refuses(flag, expected, monkeypatch):
    sampling = engine.Sampling

    def capture(*values):
        raise Captured(sampling(*values))

    monkeypatch.setattr(engine, "Sampling", capture)
    error = error_of("compare", "./nowhere", "--prompt", "hi", flag, "0")
    if isinstance(expected, str):
        assert expected in str(error)
    else:
        assert getattr(error.args[0], flag.removeprefix("--").replace("-", "_")) == expected
