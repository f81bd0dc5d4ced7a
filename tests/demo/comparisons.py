"""Finished comparisons for tests, made without a model."""

import json
import re

from minilora_hub.demo.runs.comparison import Comparison, Weights

KINDS = {"base": "base", "dora": "DoRA", "mix": "MixLoRA", "lora": "LoRA"}


def column(name, text, state="eos", error=None):
    """A column of a stage: one token a word, with everything that a log holds beside the texts."""
    kind = KINDS[name]
    about = {"name": name, "adapter": None if name == "base" else name, "kind": kind, "badge": name[0].upper()}
    about |= {"facts": f"{kind} · rank 2", "experts": 2 if name == "mix" else 0, "solo": None}
    words = re.findall(r"\S*\s*", text)
    lines = [
        {"t": word, "i": 7, "l": -0.625, "a": [["alternative", -0.625]], "r": [[1, 1000]]} for word in words if word
    ]
    log = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    numbers = {"tokens": len(lines), "first": 0.25, "rate": 12.5, "step": 80.0}
    return {"about": about, "state": state, "log": log, "error": error, **numbers}


def comparison(*columns, prompt="Why?", **fields):
    """A comparison of these columns; by default of a base, a DoRA and a MixLoRA."""
    columns = columns or (column("base", "because"), column("dora", "so"), column("mix", "thus"))
    weights = tuple(Weights(f"sha256:{one['about']['name']}") for one in columns)
    stage = {"run": 7, "prompt": prompt, "sampling": {"seed": 3}, "replay": None, "columns": list(columns)}
    status = {"phase": "done", "words": "Done. 3 tokens.", "badge": "1 pass"}
    sampling = {"max_new_tokens": 8, "temperature": 0.5, "seed": 3}
    return Comparison(prompt, sampling, "org/base", stage, status, weights, **fields)
