"""A push of a 30 MB adapter over loopback against the bare `create_commit` of the same files.

    python tests/bench/bench_push.py

Both send the same bytes to the same HTTP Hub, whose work is part of both times. Four pushes are timed, each of a whole
push but for verifying (verify=False), nothing of it replaced:

    trained       the first push of a folder as `minilora train` leaves it: it has the recording.json that training made
    again         the second push of the same folder, into a repo that is new
    unrecorded    the first push of a folder without one: the base is loaded, and what the adapter computes is recorded
    published     a folder that was pulled from a repo: the base is loaded, and its verification.json compared

Processor time is that of both sides, of all threads: other programs on the machine hardly move it.

Rounds are interleaved; a ratio is one push over the bare commit of its own round. Imports and first calls are not
timed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
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

    from minilora_hub.bases import resolve_base
    from minilora_hub.publish.push.build import build
    from minilora_hub.publish.push.push import push
    from minilora_hub.recording.document import RECORDING_FILE
    from minilora_hub.recording.reference import store_recording

    # The environment came after the client was imported for the server, so its constants are set by hand.
    huggingface_hub.constants.ENDPOINT = hub.endpoint
    base, folder = make_adapter(hub, scratch)
    start = time.perf_counter()
    store_recording(folder, resolve_base(base))  # as `train` does when it ends
    recording = time.perf_counter() - start
    built = build(folder, scratch / "built", repo_id="ana/adapter", base_model=str(base))
    api, first, unrecorded = HfApi(), scratch / "first", scratch / "unrecorded"

    def bare(repo):
        api.create_repo(repo, private=True)
        yield
        additions = [CommitOperationAdd(file.path, built.folder / file.path) for file in built.files]
        api.create_commit(repo, additions, commit_message="bare")

    def pushed(source, reused):
        def way(repo):
            yield
            result = push(source, repo, base_model=str(base), verify=False, progress=False)
            assert result.plan.recording.reused == reused

        return way

    def pushed_first(repo):
        shutil.rmtree(first, ignore_errors=True)
        shutil.copytree(folder, first)
        yield from pushed(first, True)(repo)

    def pushed_unrecorded(repo):
        shutil.rmtree(unrecorded, ignore_errors=True)
        shutil.copytree(folder, unrecorded, ignore=shutil.ignore_patterns(RECORDING_FILE))
        yield from pushed(unrecorded, False)(repo)

    ways = {
        "bare": bare,
        "trained": pushed_first,
        "again": pushed(first, True),
        "unrecorded": pushed_unrecorded,
        "published": pushed(built.folder, False),
    }
    seconds, processor = {name: [] for name in ways}, {name: [] for name in ways}
    for count in range(-2, rounds):  # two rounds to warm up
        for name, way in ways.items():
            steps = way(f"ana/{name}-{count + 2}")
            next(steps)
            start, busy = time.perf_counter(), time.process_time()
            next(steps, None)
            if count >= 0:
                seconds[name].append(time.perf_counter() - start)
                processor[name].append(time.process_time() - busy)
    return {
        "megabytes": round(sum(file.size for file in built.files) / 1e6, 1),
        "megabytes_of_base": round((base / "model.safetensors").stat().st_size / 1e6, 1),
        "rounds": rounds,
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "recording_at_the_end_of_training_milliseconds": round(1000 * recording, 1),
        "bare_milliseconds": round(1000 * statistics.median(seconds["bare"]), 1),
        "push_over_bare_commit": {name: summary(seconds, name) for name in ways if name != "bare"},
        "processor_time_over_bare_commit": {
            name: round(statistics.median(processor[name]) / statistics.median(processor["bare"]), 2)
            for name in ways
            if name != "bare"
        },
        "limit_of_trained": LIMIT,
    }


def make_adapter(hub, scratch: Path) -> tuple[Path, Path]:
    """Save a tiny base, on disk and on the Hub, and a MixLoRA of 30 MB on it, with its results.json."""
    import tiny_stand_ins
    import torch
    from tiny import fill_adapter

    from minilora_hub import MixLoraConfig, MixLoraForCausalLM
    from minilora_hub.adapter_folder.results import Base, Results

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
