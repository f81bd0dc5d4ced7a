"""Finished comparisons for tests, without a model."""

from minilora_hub.demo.record import Record, Weights

KINDS = {"base": "base", "dora": "DoRA", "mix": "MixLoRA", "lora": "LoRA"}


def column(name, text, state="eos", error=None):
    """What one column showed."""
    about = {"name": name, "kind": KINDS[name], "badge": name[0].upper(), "facts": f"{KINDS[name]} · r 2"}
    numbers = {"tokens": len(text), "first": 0.25, "rate": 12.5, "step": 80.0}
    return {"about": about, "state": state, "text": text, "error": error, **numbers}


def record(*columns, prompt="Why?", **fields):
    """A comparison of these columns; by default of a base, a DoRA and a MixLoRA."""
    columns = columns or (column("base", "because"), column("dora", "so"), column("mix", "thus"))
    weights = tuple(Weights(f"sha256:{one['about']['name']}") for one in columns)
    stage = {"run": 7, "prompt": prompt, "columns": list(columns)}
    status = {"phase": "done", "words": "Done. 3 tokens.", "count": ""}
    sampling = {"max_new_tokens": 8, "temperature": 0.5, "seed": 3}
    return Record(prompt, sampling, "org/base", stage, status, weights, **fields)
