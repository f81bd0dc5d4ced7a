"""Measure starts of a low-bit adapter that fit more than the diagonal form of `--init calibrated`: docs/evidence.md.

    python tests/evidence/low_bit_fits.py run       # 15 minutes on one thread; goes on after a stop
    python tests/evidence/low_bit_fits.py report    # the table

For the exact weight W of a linear, the rounded one Q, and inputs x in the exact base, each start is the best update M
of the rank over the same training rows:

    diagonal    (W - Q - M) D, with D from E[x^2]: `--init calibrated`
    whole       the same with E[x x^T]: QERA's exact form (arXiv 2410.06040)
    in turn     E |W x - (Q + M) y|^2 with the inputs y that the linear gets behind the linears fitted before it: what
                ApiQ (arXiv 2402.05147) minimises layer by layer by gradients, here in closed form

The whole moments are damped with a hundredth of their mean diagonal.
"""

from __future__ import annotations

import copy
import json
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from evidence.low_bit import FOLDER, TASK, Runs
from evidence.measure import with_rows
from evidence.store import command_line, keep
from evidence.tables import table
from torch import Tensor

from minilora_hub.bases.loading import load_base, load_tokenizer
from minilora_hub.bases.quantizing import quantize_base
from minilora_hub.bases.resolving import resolve_base
from minilora_hub.training.compensation import TOKENS, dense_weight

KIND, GROUP_SIZE, RANK = "int3", 64, 16
FITS = ("diagonal", "whole", "in turn")
DAMPING = 0.01
SHARED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Linears of a layer with the same input, in the order in which they are computed."""


class Fits:
    """The three starts on one quantized base.

    Args:
        work: folder of rows and quantized bases, as low_bit.py has it.
        base: the exact base.
        rank: of the updates.
    """

    def __init__(self, work: Path, base: str = "embedded", rank: int = RANK) -> None:
        self.rank = rank
        quantized = work / f"{KIND}-{GROUP_SIZE}"
        if not quantized.exists():
            quantize_base(base, KIND, quantized, group_size=GROUP_SIZE, dtype="float32")
        self.perplexity = Runs(work, base).perplexity
        self.exact: Any = load_base(resolve_base(base), dtype="float32").eval()
        rounded: Any = load_base(resolve_base(quantized), dtype="float32").eval()
        self.layers = len(self.exact.model.layers)
        paths = [f"model.layers.{layer}.{name}" for layer in range(self.layers) for part in SHARED for name in part]
        self.rounded = {path: dense_weight(rounded.get_submodule(path)) for path in paths}
        self.rows = _rows(work / "data" / f"{TASK}.train.jsonl", base)

    def measure(self, fit: str) -> dict[str, Any]:
        """The perplexity of general text on the base with the updates of a fit."""
        began = time.process_time()
        model = self.fitted(fit)
        cpu_seconds = round(time.process_time() - began)
        return {"fit": fit, "perplexity": self.perplexity(model), "cpu_seconds": cpu_seconds}

    @torch.no_grad()
    def fitted(self, fit: str) -> Any:
        """The exact base with Q + M in place of each W."""
        model = copy.deepcopy(self.exact)
        for path, rounded in self.rounded.items():
            model.get_submodule(path).weight.copy_(rounded)
        exact = [self.exact.model.embed_tokens(row) for row in self.rows]
        fitted = exact
        for layer in range(self.layers):
            firsts = [f"model.layers.{layer}.{part[0]}" for part in SHARED]
            with _inputs(self.exact, firsts) as given:
                after = [_layer(self.exact, layer, hidden) for hidden in exact]
            for part, first in zip(SHARED, firsts, strict=True):
                x = y = torch.cat(given[first]).double()
                if fit == "in turn":
                    with _inputs(model, [first]) as found:
                        for hidden in fitted:
                            _layer(model, layer, hidden)
                    y = torch.cat(found[first]).double()
                moments, crossed = y.T @ y / len(y), x.T @ y / len(y)
                if fit == "diagonal":
                    moments = crossed = moments.diag().diag()
                else:
                    damping = DAMPING * moments.diag().mean() * torch.eye(len(moments)).double()
                    moments, crossed = moments + damping, crossed + damping
                root = torch.linalg.cholesky(moments)
                for path in (f"model.layers.{layer}.{name}" for name in part):
                    weight, rounded = self.exact.get_submodule(path).weight.double(), self.rounded[path]
                    best = torch.cholesky_solve((weight @ crossed - rounded @ moments).T, root).T  # of full rank
                    u = torch.linalg.svd(best @ root, full_matrices=False)[0][:, : self.rank]
                    model.get_submodule(path).weight.copy_(rounded + u @ (u.T @ best))
            exact = after
            if fit == "in turn":
                fitted = [_layer(model, layer, hidden) for hidden in fitted]
        return model


def _rows(file: Path, base: str) -> list[Tensor]:
    """The first tokens of the shuffled rows, (1, tokens) each."""
    tokenizer = load_tokenizer(resolve_base(base))
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(lines)
    rows, left = [], TOKENS
    for line in lines:
        turns = [{"role": "user", "content": line["prompt"]}, {"role": "assistant", "content": line["completion"]}]
        ids = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"][:left]
        if not ids:
            break
        rows, left = [*rows, torch.tensor([ids])], left - len(ids)
    return rows


@contextmanager
def _inputs(model: Any, paths: list[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Record the inputs of these linears, (tokens, in) for each call."""
    found: dict[str, list[Tensor]] = {path: [] for path in paths}
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(lambda _, given, path=path: found[path].append(given[0][0]))
        for path in paths
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _layer(model: Any, layer: int, hidden: Tensor) -> Tensor:
    positions = torch.arange(hidden.shape[1])[None]
    return model.model.layers[layer](
        hidden, position_embeddings=model.model.rotary_emb(hidden, positions), attention_mask=None
    )


def _file(fit: str) -> Path:
    return FOLDER / f"{KIND}-r{RANK}-fit-{fit.replace(' ', '-')}.json"


def report() -> str:
    """The perplexity of each fit that was measured."""
    results = [json.loads(_file(fit).read_text(encoding="utf-8")) if _file(fit).is_file() else None for fit in FITS]
    shown = [str(result["perplexity"]) if result else "not run" for result in results]
    head = [f"{KIND} in groups of {GROUP_SIZE}, r = {RANK}", *FITS]
    return "\n".join(table(head, [["perplexity on general text", *shown]]))


def main() -> None:
    """Parse the command line."""
    parser = command_line(__doc__, "evidence-work/low_bit")
    arguments = parser.parse_args()
    if arguments.what == "run":
        missing = [fit for fit in FITS if not _file(fit).is_file()]
        fits = Fits(with_rows(arguments.work.resolve())) if missing else None
        for fit in missing:
            assert fits is not None
            keep(_file(fit), partial(fits.measure, fit))
    print(report())


if __name__ == "__main__":
    main()
