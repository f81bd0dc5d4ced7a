"""What the README says of pushes, the page and training steps is what the benchmarks' files hold."""

import json
from pathlib import Path

HERE = Path(__file__).parent
README = " ".join((HERE.parent.parent / "README.md").read_text(encoding="utf-8").split())


def held(name):
    """The JSON that a benchmark printed."""
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def test_pushes():
    told = held("push")
    trained, again, unrecorded, published = (
        told["push_over_bare_commit"][way]["median"] for way in ("trained", "again", "unrecorded", "published")
    )
    assert (
        f"medians of {told['rounds']} interleaved rounds): the first push of a freshly trained folder takes "
        f"{trained:.2f} times as long, the second push of it {again:.2f}, a push that must record {unrecorded:.1f}, "
        f"of a folder that was pulled {published:.1f}."
    ) in README


def test_the_page():
    told = held("page")
    first, many = told["first_token_seconds"]["median"], told["many"]
    assert many["served"] == many["visitors"]
    assert (
        f"the page can be used {told['usable_seconds']:.1f} s after the server's start (imports and models aside), the "
        f"first token of all five columns is there {first:.2f} s after the click, and of {many['visitors']} visitors "
        f"who ask at once none waits longer than {many['longest_as_fair_shares']:.2f} times the fair share."
    ) in README


def test_training_steps():
    told = held("training")
    kept = {name: row["activations_mb"] / told["PEFT LoRA"]["activations_mb"] for name, row in told.items()}
    ratio = {name: row["ratio"] for name, row in told.items()}
    assert (
        f"our LoRA {kept['LoRA']:.2f}, DoRA {kept['DoRA']:.2f}, MixLoRA with 8 experts {kept['MixLoRA']:.2f} "
        "(`python tests/bench/bench_training.py`, which times whole optimizer steps of eight rows, too: our LoRA "
        f"{ratio['LoRA']:.2f}, DoRA {ratio['DoRA']:.2f}, MixLoRA {ratio['MixLoRA']:.2f}, PEFT's DoRA "
        f"{ratio['PEFT DoRA']:.2f})."
    ) in README
