"""Measure what continuing from adapters gains: single-task LoRAs routed, distillation, sequences of tasks, the anchor.

    python tests/evidence/train_on.py run                      # every step; goes on after a stop
    python tests/evidence/train_on.py run --part router        # one part
    python tests/evidence/train_on.py run --dtype float32      # several times faster without products in bfloat16

    router      one LoRA for each task; their mean, TIES, the untrained, Arrow's and the trained router over them, a
                router for each feed-forward block
    linears     the same LoRAs with a router on each linear: untrained, Arrow's and trained, beside `routed-all` again
    distill     one LoRA from the shipped MixLoRA, and the same LoRA trained on the labels alone
    sequence    the tasks one after the other: one LoRA continued, and a new one beside those that are kept, with and
                without the orthogonal term
    anchor      the LoRA of `distill` trained on the labels, without and with the anchor; perplexity on general text
    rank        the LoRA of `distill` trained on the labels, its parameters distributed over the linears by EVA
    document    a LoRA of one's own from a text, here docstrings of Python's library: the loss on its last fifth
    votes       that LoRA trained on synthetic votes, each for the shipped MixLoRA's answer beside the base's: held-out
                pairs, and exact match on items that nobody voted on

Every step's result is a small file in tests/evidence/results/train_on, named after the step and its sizes; adapters go
into --work. A step whose file is there is not measured again; an adapter that another step starts from is made again
where the folder lacks it. The most informative steps come first.
"""

from __future__ import annotations

import ast
import json
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from evidence.measure import finish, work_folder
from evidence.plan import DTYPE, MIX, TASKS, TRAINING
from evidence.store import CODE, RESULTS, command_line, keep
from evidence.tables import bits

from minilora_hub.bases.loading import load_tokenizer
from minilora_hub.bases.resolving import resolve_base
from minilora_hub.demo.runs import measured_answers
from minilora_hub.documents import write_whole
from minilora_hub.evaluation.metrics import perplexity
from minilora_hub.evaluation.run import evaluate
from minilora_hub.formats.combine import Combination, combine
from minilora_hub.formats.experts_from_loras import Router
from minilora_hub.formats.importing import Route, import_as_experts
from minilora_hub.training.run import train
from minilora_hub.training.votes import Answer, VotedAnswers

FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
LORA: dict[str, Any] = {"method": "lora", "learning_rate": 1.5e-3}
ON_BLOCKS = LORA | {"r": 8, "target_modules": FEED_FORWARD}
ON_ALL = LORA | {"r": 12}
BUDGET = 3_663_360
"""The parameters of `ON_ALL` on the embedded base."""
ROUTER: dict[str, Any] = {"learn": "router", "learning_rate": 1e-2, "router_aux_loss_coef": 0.0}
VOTES: dict[str, Any] = LORA | {"r": 12, "epochs": 1, "validation": 1 / 3, "save_every": 1000, "record": False}
VOTED_TASKS, NOT_VOTED = ("dates", "numbers", "inflection"), 30
"""The tasks of the votes, and their first test items, which nobody votes on. A third of the others is held out."""
DOCUMENT: dict[str, Any] = LORA | {"r": 12, "validation": 0.2, "max_length": 256, "truncate": True, "batch_size": 4}
DOCUMENT_STEPS = 16
SAID_FILE = "said.json"
"""What a training of votes or of a document said of itself, in its folder."""
SEQUENCES = ("continued", "kept", "orthogonal")
SHIPPED = Path(__file__).parents[2] / "model_cards" / "smollm2-135m-mixlora"
FOLDER = RESULTS / "train_on"


@dataclass(frozen=True)
class Sizes:
    """How long the runs are: optimizer steps of eight rows for one task, test items of each task, and the dtype."""

    steps: int
    items: int
    dtype: str = DTYPE

    @property
    def precision(self) -> str:
        """The end of names of files and folders."""
        return "" if self.dtype == DTYPE else f"-{self.dtype}"

    def named(self, step: str) -> str:
        """The name of a step's file."""
        return f"{step}-steps{self.steps}-items{self.items}{self.precision}"


@dataclass(frozen=True)
class Evidence:
    """A step: its part and name, what makes its adapter in a folder, the steps whose adapters that takes, and whether
    perplexity is measured.
    """

    part: str
    name: str
    make: Callable[[Path], Any]
    needs: tuple[str, ...] = ()
    perplexity: bool = False


class Runs:
    """The steps, in the order in which they are made.

    Args:
        work: folder of rows and adapters.
        sizes: of the runs.
        base: the base of all adapters.
        teacher: the MixLoRA that is distilled.
        budget: the parameters that EVA distributes.
    """

    def __init__(
        self, work: Path, sizes: Sizes, base: str = "embedded", teacher: Path = SHIPPED, budget: int = BUDGET
    ) -> None:
        self.work, self.sizes, self.base, self.teacher, self.budget = work, sizes, base, teacher, budget

    def adapter(self, name: str) -> Path:
        """The folder of a step's adapter."""
        return self.work / f"{name}-steps{self.sizes.steps}{self.sizes.precision}"

    def steps(self) -> list[Evidence]:
        """Every step; one that needs another's adapter comes after it."""
        routed, linears, rest = self._router()
        continued, kept, orthogonal = (self._sequence(kind) for kind in SEQUENCES)
        return [
            *routed,
            *self._distill(),
            *continued,
            *orthogonal,
            *self._anchor(),
            *kept,
            *rest,
            *self._rank(),
            Evidence("document", "document", self._document),
            Evidence("votes", "voted", self._vote),
            *linears,
        ]

    def _trained(self, data: str, steps: int, **settings: Any) -> Callable[[Path], Any]:
        chosen = TRAINING | settings | {"dtype": self.sizes.dtype, "save_dtype": self.sizes.dtype}
        chosen |= {"base": self.base, "max_steps": steps, "save_every": max(1, steps // 2), "record": False}
        return lambda out: finish(out, data=str(self.work / "data" / f"{data}.train.jsonl"), **chosen)

    def _router(self) -> tuple[list[Evidence], list[Evidence], list[Evidence]]:
        one = self.sizes.steps
        names = tuple(f"single-{task}" for task in TASKS)
        singles = [self.adapter(name) for name in names]

        def combined(method: str) -> Callable[[Path], None]:
            how = Combination(method, (1 / len(TASKS),) * len(TASKS))
            return lambda out: _once(out, lambda: combine(singles, out, how, base=self.base))

        def mixture(router: Router, route: Route = "blocks") -> Callable[[Path], None]:
            settings: dict[str, Any] = {"base": self.base, "num_experts_per_tok": len(TASKS), "router": router}
            settings["route"] = route
            return lambda out: _once(out, lambda: import_as_experts(singles, out, **settings))

        def routed(active: int, of: str = "mixture") -> Callable[[Path], None]:
            said = ROUTER | {"from_adapter": str(self.adapter(of)), "num_experts_per_tok": active}
            return self._trained(MIX, one, **said)

        first = [
            *(Evidence("router", f"single-{task}", self._trained(task, one, **ON_BLOCKS)) for task in TASKS),
            Evidence("router", "mean", combined("cat"), names),
            Evidence("router", "mixture", mixture("fresh"), names),
            Evidence("router", "arrow", mixture("arrow"), names),
            Evidence("router", "routed-all", routed(len(TASKS)), ("mixture",)),
        ]
        rest = [
            Evidence("router", "routed-2", routed(2), ("mixture",)),
            Evidence("router", "ties", combined("ties_svd"), names),
        ]
        linears = [
            Evidence("linears", "linears-mixture", mixture("fresh", "all-linears"), names),
            Evidence("linears", "linears-arrow", mixture("arrow", "all-linears"), names),
            Evidence("linears", "linears-routed-all", routed(len(TASKS), "linears-mixture"), ("linears-mixture",)),
            Evidence("linears", "blocks-routed-all", routed(len(TASKS)), ("mixture",)),
        ]
        return first, linears, rest

    def _distill(self) -> list[Evidence]:
        steps, teacher = self.sizes.steps * len(TASKS), f"distill:teacher={self.teacher},labels=0"
        return [
            Evidence("distill", "labels-only", self._trained(MIX, steps, **ON_ALL), perplexity=True),
            Evidence("distill", "distilled", self._trained(MIX, steps, objective=[teacher], **ON_ALL)),
            Evidence("distill", "teacher", lambda out: _once(out, lambda: shutil.copytree(self.teacher, out))),
        ]

    def _sequence(self, kind: str) -> list[Evidence]:
        """The tasks after the first, whose adapter is `single-…`."""
        found, before = [], f"single-{TASKS[0]}"
        for number, task in enumerate(TASKS[1:], 2):
            name = f"sequence-{kind}-{number}-{task}"
            if kind == "continued":
                settings = {"learning_rate": LORA["learning_rate"], "from_adapter": str(self.adapter(before))}
            else:
                term = {"objective": ["orthogonal:weight=0.5"]} if kind == "orthogonal" else {}
                settings = ON_BLOCKS | {"keep": [str(self.adapter(before))]} | term
            found.append(Evidence("sequence", name, self._trained(task, self.sizes.steps, **settings), (before,)))
            before = name
        return found

    def _anchor(self) -> list[Evidence]:
        said = {"objective": [f"anchor:data={self.work / 'general.txt'},weight=1"]}
        make = self._trained(MIX, self.sizes.steps * len(TASKS), **ON_ALL, **said)
        return [Evidence("anchor", "anchored", make, perplexity=True)]

    def _rank(self) -> list[Evidence]:
        by_eva = LORA | {"r": "auto", "budget": self.budget}
        return [Evidence("rank", "rank-auto", self._trained(MIX, self.sizes.steps * len(TASKS), **by_eva))]

    def _document(self, out: Path) -> None:
        """Train on a text, unless it is done, and write the loss on its held-out part before and after."""
        if (out / SAID_FILE).is_file():
            return
        said = DOCUMENT | {"data": str(self.work / "general.txt"), "base": self.base, "dtype": self.sizes.dtype}
        started, losses = time.process_time(), []
        for settings in (  # the first changes nothing
            {"max_steps": 1, "learning_rate": 1e-30},
            {"max_steps": DOCUMENT_STEPS, "save_every": DOCUMENT_STEPS},
        ):
            shutil.rmtree(out, ignore_errors=True)
            losses.append(train(out, record=False, **said | settings).validation_loss)
        facts = {"before": losses[0], "after": losses[1], "cpu_seconds": round(time.process_time() - started)}
        write_whole(out / SAID_FILE, json.dumps(facts | {"steps": DOCUMENT_STEPS}))

    def _vote(self, out: Path) -> None:
        """Train on the votes, unless it is done, and write what that does to held-out pairs."""
        if (out / SAID_FILE).is_file():
            return
        shutil.rmtree(out, ignore_errors=True)
        file = self.work / "voted-answers.jsonl"
        write_votes(file, load_tokenizer(resolve_base(self.base)))
        started = time.process_time()
        result = train(out, base=self.base, from_votes=str(file), dtype=self.sizes.dtype, **VOTES)
        assert result.pairs is not None
        said = {"trained_on": result.plan.rows, "steps": result.steps, **asdict(result.pairs)}
        said["cpu_seconds"] = round(time.process_time() - started)
        write_whole(out / SAID_FILE, json.dumps(said))

    def make(self, step: Evidence) -> Path:
        """Make a step's adapter, and those that it starts from, where they are not there; gives its folder."""
        for other in self.steps():
            if other.name in step.needs:
                self.make(other)
        step.make(self.adapter(step.name))
        return self.adapter(step.name)

    def measure(self, step: Evidence) -> dict[str, Any]:
        """Make a step's adapter and measure it: exact match item by item, and perplexity where it is asked for."""
        started = time.process_time()
        out = self.make(step)
        items = min(self.sizes.items, NOT_VOTED) if step.part == "votes" else self.sizes.items
        report = evaluate(
            [out],
            base=self.base,
            tasks=TASKS,
            count=items,
            few_shot=0,
            perplexity=step.perplexity,
            dtype=self.sizes.dtype,
            cache=self.work / "answers",
        )
        base, model = report.models[0], report.models[-1]
        result: dict[str, Any] = {"step": step.name, "part": step.part, "code": CODE}
        result["steps"], result["items"], result["dtype"] = self.sizes.steps, items, self.sizes.dtype
        for key, measured in (("exact", model), ("base_exact", base)):
            result[key] = {task: bits(measured.scores[task].exact) for task in TASKS}
        if (out / SAID_FILE).is_file():
            result[step.part] = json.loads((out / SAID_FILE).read_text(encoding="utf-8"))
            result["steps"] = result[step.part]["steps"]
        if step.perplexity:
            result["perplexity"], result["base_perplexity"] = (
                round(perplexity(one.nll, report.text[1]), 3) for one in (model, base)
            )
        return result | {"cpu_seconds": round(time.process_time() - started)}


def write_votes(file: Path, tokenizer: Any) -> None:
    """Write votes on recorded answers of the bare base and the shipped MixLoRA, each for the MixLoRA's."""
    recorded = json.loads(measured_answers.SHIPPED.read_text(encoding="utf-8"))
    sides = [
        next(model["answers"] for model in recorded["models"] if model["name"].endswith(name))
        for name in ("base", SHIPPED.name)
    ]
    lines = []
    for task in VOTED_TASKS:
        for index, item in [*enumerate(recorded["items"][task])][NOT_VOTED:]:
            texts = [side[task][index]["text"] for side in sides]
            limit = recorded["limits"][task]
            answers = tuple(Answer(text, len(tokenizer(text)["input_ids"]) < limit - 1) for text in texts)
            vote = VotedAnswers(f"{task}-{index}", "2026-11-29T00:00:00+00:00", item["prompt"], "", answers, 1)
            lines.append(json.dumps(vote.to_dict()))
    write_whole(file, "\n".join(lines) + "\n")


def _once(out: Path, make: Callable[[], Any]) -> None:
    if not out.is_dir():
        make()


def write_general_text(file: Path) -> None:
    """Write the docstrings of the standard library's modules, which are not in the text for perplexity."""
    texts = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if text:
            texts.append(text)
    write_whole(file, "\n\n".join(texts) + "\n")


def main() -> None:
    """Parse the command line."""
    parser = command_line(__doc__)
    parser.add_argument(
        "--part",
        action="append",
        choices=("router", "linears", "distill", "sequence", "anchor", "rank", "document", "votes"),
    )
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps for one task")
    parser.add_argument("--items", type=int, default=100, help="test items of each task")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=DTYPE)
    arguments = parser.parse_args()
    if arguments.what == "report":
        from evidence.train_on_report import report

        print(report())
        return
    work = work_folder(arguments.work)
    write_general_text(work / "general.txt")
    runs = Runs(work, Sizes(arguments.steps, arguments.items, arguments.dtype))
    for step in runs.steps():
        if not arguments.part or step.part in arguments.part:
            keep(FOLDER / f"{runs.sizes.named(step.name)}.json", partial(runs.measure, step))


if __name__ == "__main__":
    main()
