"""A push of a 30 MB adapter over loopback against the bare `create_commit` of the same files.

    python tests/bench/bench_push.py

Both send the same bytes to the same HTTP Hub, whose work is part of both times. Three pushes are timed:

    trained    a folder as `save_pretrained` left it
    built      a folder as it is published: it has its card, its pictures and its verification.json
    whole      `trained`, with the reference logits recorded anew

Verifying is left out everywhere (verify=False). Its first half, recording what the model computes on its base, happens
while a push builds: the first two are handed a recording that was made before, and `whole` makes it.
Everything else is in all of them: copying, hashing, every check, card, plan, credentials, every request. Rounds are
interleaved; a ratio is one push over the bare commit of its own round. Imports and first calls are not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

LIMIT = 1.5


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="pushes of each kind, taken in turns")
    rounds = parser.parse_args().rounds

    os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    from hub.server import HubServer

    with tempfile.TemporaryDirectory() as scratch, HubServer() as hub:
        os.environ.update(hub.environment(hub.add_user("ana"), cache_dir=scratch))
        print(json.dumps(measure(hub, Path(scratch), rounds), indent=2))


def measure(hub, scratch: Path, rounds: int) -> dict:
    """Make an adapter of 30 MB, and push it in every way."""
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, HfApi

    import minilora_hub.publish.build as module
    from minilora_hub.publish.push import push

    # The environment came after the client was imported for the server, so its constants are set by hand.
    huggingface_hub.constants.ENDPOINT = hub.endpoint
    base, folder = make_adapter(hub, scratch)
    built = module.build(folder, scratch / "built", repo_id="ana/adapter", base_model=str(base))
    api, record, recorded = HfApi(), module.Reference, {}

    def bare(repo):
        api.create_repo(repo, private=True)
        yield
        additions = [CommitOperationAdd(file.path, built.folder / file.path) for file in built.files]
        api.create_commit(repo, additions, commit_message="bare")

    def pushed(source, reference):
        def way(repo):
            module.Reference = reference
            yield
            push(source, repo, base_model=str(base), verify=False, progress=False)

        return way

    def kept(source, *arguments):
        if source.folder not in recorded:
            recorded[source.folder] = record(source, *arguments)
        return recorded[source.folder]

    ways = {
        "bare": bare,
        "trained": pushed(folder, kept),
        "built": pushed(built.folder, kept),
        "whole": pushed(folder, record),
    }
    seconds = {name: [] for name in ways}
    for count in range(-2, rounds):  # two rounds to warm up
        for name, way in ways.items():
            steps = way(f"ana/{name}-{count + 2}")
            next(steps)
            start = time.perf_counter()
            next(steps, None)
            if count >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {
        "megabytes": round(sum(file.size for file in built.files) / 1e6, 1),
        "rounds": rounds,
        "bare_milliseconds": round(1000 * statistics.median(seconds["bare"]), 1),
        "ratio_recording_and_verifying_aside": summary(seconds, "trained"),
        "ratio_recording_and_verifying_aside_already_built": summary(seconds, "built"),
        "ratio_verifying_aside": summary(seconds, "whole"),
        "limit_recording_and_verifying_aside": LIMIT,
    }


def make_adapter(hub, scratch: Path) -> tuple[Path, Path]:
    """Save a tiny base, on disk and on the Hub, and a MixLoRA of 30 MB on it, with its results.json."""
    import tiny_stand_ins
    import torch
    from tiny import fill_adapter

    from minilora_hub import MixLoraConfig, MixLoraForCausalLM
    from minilora_hub.results import Base, Results

    base, folder = scratch / "base", scratch / "adapter"
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
    tiny_stand_ins.tiny_llama(**shape).save_pretrained(base)
    tiny_stand_ins.byte_tokenizer().save_pretrained(base)
    hub.add_repo("org/base", files={path.name: path.read_bytes() for path in base.iterdir()})
    model = MixLoraForCausalLM.from_base(str(base), MixLoraConfig(r=32, num_experts=12), adapter_dtype=torch.float32)
    fill_adapter(model)
    model.config.base_model_name_or_path = "org/base"
    model.save_pretrained(folder, tokenizer=tiny_stand_ins.byte_tokenizer())
    Results("mixlora", Base("org/base", license="mit"), license="mit").save(folder)
    return base, folder


def summary(seconds: dict[str, list[float]], name: str) -> dict:
    """Median and quartiles of a push over the bare commit of its round, and its median time."""
    ratios = [ours / bare for ours, bare in zip(seconds[name], seconds["bare"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    milliseconds = round(1000 * statistics.median(seconds[name]), 1)
    return {"median": round(middle, 2), "quartiles": [round(low, 2), round(high, 2)], "milliseconds": milliseconds}


if __name__ == "__main__":
    main()
