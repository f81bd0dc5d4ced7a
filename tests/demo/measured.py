"""A file of measured answers for tests: two parrots and their base on six items."""

from minilora_hub.evaluation.answer_cache import adapter_digest

ADAPTERS = {"parrot-dora": "dora", "parrot-mix": "mixlora"}
RIGHT = {"base": "000001", "parrot-dora": "110110", "parrot-mix": "101010"}


def measured(folders, prefix="there/"):
    """What `minilora eval --out` writes, in short; its names are those of another place."""
    items = [
        {"prompt": f"<b>{at}</b>?", "reference": f"{at}!", "difficulty": 1 + at % 2, "entity": "", "labels": {}}
        for at in range(6)
    ]
    models = [
        {
            "name": name if name == "base" else prefix + name,
            "method": None if name == "base" else ADAPTERS[name],
            "adapter_sha256": None if name == "base" else adapter_digest(folders[name]),
            "router": [
                {"task": "Dates", "load": [[0.25, 0.75], [0.5, 0.5]]},
                {"task": "Numbers", "load": [[0.5, 0.5], [0.9, 0.1]]},
            ]
            if name == "parrot-mix"
            else [],
            "answers": {"dates": [{"text": f"{name} {at}", "exact": float(one)} for at, one in enumerate(RIGHT[name])]},
        }
        for name in RIGHT
    ]
    few = {**models[0], "name": "base, 4 examples"}
    base = {"name": "scripted", "fingerprint": "unknown"}
    return {
        "command": "minilora eval …",
        "base": base,
        "items": {"dates": items},
        "models": [models[0], few, *models[1:]],
    }
