"""The experiment: which runs there are, what each is trained on, and in which order they are made.

Four methods with equally many trainable parameters, on the same rows in the same order for as many steps. The learning
rate of each is chosen in the same two rounds: short runs over a common grid, then runs of full length with the two
rates of the lowest validation loss, of which the lower one wins. (What is best after a short run is too high for a long
one.) Then three seeds of each on the mix of the tasks; and each task alone, for as many rows as the mix has of it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"r": 12},
    "dora": {"r": 12},
    "mixlora": {"r": 12, "expert_r": 3, "num_experts": 4},
    "mixdora": {"r": 8, "expert_r": 3, "num_experts": 4},
}
"""3.66, 3.82, 3.73 and 3.76 million trainable parameters on SmolLM2-135M: within 5% of each other."""
METHODS = tuple(ADAPTERS)
TITLES = {"lora": "LoRA", "dora": "DoRA", "mixlora": "MixLoRA", "mixdora": "MixDoRA"}
TASKS = ("dates", "numbers", "inflection", "records")
MIX = "mix"

VARIANTS: dict[str, dict[str, Any]] = {
    "all-active": {"num_experts_per_tok": 4},
    "decided": {"router_init_range": 0.1},
}
"""What is tried with the MixLoRA, one seed each, to find out what holds it back: every expert for every token, so that
as much rank is active as in the LoRA; and routers that begin with clear preferences (five times the usual logits),
since after so few steps they hardly prefer any expert."""

LEARNING_RATES = (5e-4, 1.5e-3, 4.5e-3, 1.35e-2)
SWEEP_STEPS, STEPS = 40, 240
SINGLE_STEPS = STEPS // len(TASKS)
FULL_LENGTH = 2
"""How many learning rates of a method are tried at full length."""
SEEDS = (0, 1, 2)

TRAIN_ITEMS, VALIDATION_ITEMS = 1000, 24
"""Of each task."""
DATA_COMMANDS = (
    f"minilora tasks --out . --split train --count {TRAIN_ITEMS}",
    f"minilora tasks --out . --split validation --count {VALIDATION_ITEMS}",
)
TEST_ITEMS = {"seeds": None, "single": 250, "trial": None}
"""Of each task; None is all, held-out formats included."""

TRAINING: dict[str, Any] = {
    "batch_size": 8,
    "save_dtype": "bfloat16",
    "attention": "eager",
    "keep_checkpoints": 1,
}
DTYPE = "bfloat16"
"""In which runs are trained and measured."""
SINGLE_DTYPES = {"lora": DTYPE, "mixlora": DTYPE, "dora": "float32", "mixdora": "float32"}
"""The same of single tasks: two methods were run on a processor whose products in bfloat16 take eight times as long."""
FEW_SHOT = 4
"""Examples that the base is shown in its second measurement."""


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        part: ``"sweep"`` (short), ``"full"`` (a sweep's at full length), ``"seeds"``, ``"single"`` or ``"trial"``.
        method: a key of `ADAPTERS`.
        data: a task, or the mix.
        learning_rate: its peak.
        seed: of initial weights and order.
        steps: of eight rows.
        variant: a key of `VARIANTS`, for a trial.
    """

    part: str
    method: str
    data: str
    learning_rate: float
    seed: int
    steps: int
    variant: str = ""

    @property
    def name(self) -> str:
        """Its file's."""
        return f"{self.part}-{self._what}-seed{self.seed}"

    @property
    def _what(self) -> str:
        variant = f"-{self.variant}" if self.variant else ""
        return f"{self.method}{variant}-{self.data}-lr{self.learning_rate:g}"

    @property
    def dtype(self) -> str:
        """In which it is trained and measured."""
        return SINGLE_DTYPES[self.method] if self.part == "single" else DTYPE

    @property
    def adapter(self) -> str:
        """The folder of what it trains: a run at full length is the first seed's, if its learning rate is chosen."""
        dtype = f"-{self.dtype}" if self.dtype != DTYPE else ""
        return f"{self._what}-seed{self.seed}-steps{self.steps}{dtype}"

    def settings(self) -> dict[str, Any]:
        """What `train` is called with, but for the data."""
        return {
            "method": self.method,
            "base": "embedded",
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "max_steps": self.steps,
            "save_every": self.steps // 4 if self.steps == STEPS else self.steps // 2,
            **TRAINING,
            "dtype": self.dtype,
            **ADAPTERS[self.method],
            **(VARIANTS[self.variant] if self.variant else {}),
        }

    def about(self) -> dict[str, Any]:
        """What its card says of the data, with the commands that train it again."""
        text = (
            f"{TRAIN_ITEMS:,} items of each of four tasks (dates, numbers, inflection, records), made from the data of "
            f"babel, num2words, lemminflect and Faker. The commands, in one folder: "
            f"{'; '.join(DATA_COMMANDS)}; {self.command()}"
        )
        return {"license": "apache-2.0", "language": ["en", "de", "fr", "es", "it", "pt", "nl"], "about_data": text}

    def command(self) -> str:
        """The same as a command line, run in the folder that `minilora tasks` wrote to."""
        flags = {"method", "base", "learning_rate", "seed", "max_steps", "save_every", "batch_size"}
        words = [f"--data {self.data}.train.jsonl --validation-data {self.data}.validation.jsonl"]
        for name, value in self.settings().items():
            flag = f"--{name.replace('_', '-')} {value}" if name in flags else f"--set {name}={value}"
            words.append("--rank " + str(value) if name == "r" else flag)
        return f"minilora train {' '.join(words)} --out DIR"

    def to_dict(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


def sweep_runs() -> list[Run]:
    """The sweeps, a learning rate of all methods at a time, from the middle of the grid outwards."""
    order = sorted(LEARNING_RATES, key=lambda rate: (abs(LEARNING_RATES.index(rate) - 1), rate))
    return [Run("sweep", method, MIX, rate, 0, SWEEP_STEPS) for rate in order for method in METHODS]


def full_runs(best: dict[str, tuple[float, ...]]) -> list[Run]:
    """The sweeps at full length, of the methods whose best learning rates of the short ones are known."""
    return [Run("full", method, MIX, rate, 0, STEPS) for method in METHODS for rate in best.get(method, ())]


def final_runs(rates: dict[str, float]) -> list[Run]:
    """The runs at the chosen learning rates; the methods that have none yet are left out."""
    seeds = [
        Run("seeds", method, MIX, rates[method], seed, STEPS) for seed in SEEDS for method in METHODS if method in rates
    ]
    single = {
        method: [Run("single", method, task, rates[method], 0, SINGLE_STEPS) for task in TASKS] for method in rates
    }
    trials = [Run("trial", "mixlora", MIX, rates["mixlora"], 0, STEPS, name) for name in VARIANTS if "mixlora" in rates]
    first, last = (
        [run for method in methods for run in single.get(method, [])]
        for methods in (("mixlora", "lora"), ("mixdora", "dora"))
    )
    return seeds + first + trials + last
