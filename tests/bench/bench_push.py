"""A push of a 30 MB adapter over loopback against the bare `create_commit` of the same files.

    python tests/bench/bench_push.py

Both send the same bytes to the same HTTP Hub, which is part of both times. Building and checking are timed apart, too:
they load the base and compute with the adapter, which the bare commit does not. The limit of the ratio is 1.5.
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
    parser.add_argument("--rounds", type=int, default=7, help="pushes of each kind, taken in turns")
    rounds = parser.parse_args().rounds

    os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    from hub.server import HubServer

    with tempfile.TemporaryDirectory() as scratch, HubServer() as hub:
        os.environ.update(hub.environment(hub.add_user("ana"), cache_dir=scratch))
        print(json.dumps(measure(hub, Path(scratch), rounds), indent=2))


def measure(hub, scratch: Path, rounds: int) -> dict:
    """Make an adapter of 30 MB, and push it in both ways."""
    import huggingface_hub
    import tiny_stand_ins
    import torch
    from huggingface_hub import CommitOperationAdd, HfApi
    from tiny import fill_adapter

    import minilora_hub.publish.push as module
    from minilora_hub import MixLoraConfig, MixLoraForCausalLM
    from minilora_hub.results import Base, Results

    # The environment came after the client was imported for the server, so its constants are set by hand.
    huggingface_hub.constants.ENDPOINT = hub.endpoint
    base, folder = scratch / "base", scratch / "adapter"
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
    tiny_stand_ins.tiny_llama(**shape).save_pretrained(base)
    tiny_stand_ins.byte_tokenizer().save_pretrained(base)
    hub.add_repo("org/base", files={path.name: path.read_bytes() for path in base.iterdir()})
    model = MixLoraForCausalLM.from_base(str(base), MixLoraConfig(r=32, num_experts=16), adapter_dtype=torch.float32)
    fill_adapter(model)
    model.config.base_model_name_or_path = "org/base"
    model.save_pretrained(folder)
    Results("mixlora", Base("org/base", license="mit"), license="mit").save(folder)

    spent = {}

    def timed(name):
        inner = getattr(module, name)

        def outer(*args, **kwargs):
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                spent[name] = time.perf_counter() - start

        return outer

    api, bare, ours, parts, sizes = HfApi(), [], [], [], 0
    real = {name: getattr(module, name) for name in ("build", "check")}
    built = real["build"](folder, scratch / "built", repo_id="ana/bare", base_model=str(base))
    for count in range(rounds):
        api.create_repo(f"ana/bare-{count}", private=True)
        start = time.perf_counter()
        operations = [CommitOperationAdd(file.path, built.folder / file.path) for file in built.files]
        api.create_commit(f"ana/bare-{count}", operations, commit_message="bare")
        bare.append(time.perf_counter() - start)

        for name in real:
            setattr(module, name, real[name])
            setattr(module, name, timed(name))
        start = time.perf_counter()
        module.push(folder, f"ana/ours-{count}", base_model=str(base), verify=False, progress=False)
        ours.append(time.perf_counter() - start)
        parts.append(dict(spent))
    sizes = sum(file.size for file in built.files)
    median = statistics.median
    build, check = (median([part[name] for part in parts]) for name in ("build", "check"))
    sent = median([whole - part["build"] - part["check"] for whole, part in zip(ours, parts, strict=True)])
    return {
        "megabytes": round(sizes / 1e6, 1),
        "bare_seconds": round(median(bare), 3),
        "push_seconds": round(median(ours), 3),
        "of_which_build": round(build, 3),
        "of_which_check": round(check, 3),
        "ratio_whole": round(median(ours) / median(bare), 2),
        "ratio_sending": round(sent / median(bare), 2),
        "limit": LIMIT,
    }


if __name__ == "__main__":
    main()
