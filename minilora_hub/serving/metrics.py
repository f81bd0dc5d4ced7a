"""Counters and histograms of the server, in Prometheus's text format."""

from __future__ import annotations

import bisect
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping

from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.serving.rows import Load

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
RATES = (1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0)


class Histogram:
    """Counts of observations by upper bound, for each model."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts: dict[str, list[int]] = defaultdict(lambda: [0] * (len(bounds) + 1))
        self._sums: dict[str, float] = defaultdict(float)

    def observe(self, model: str, value: float) -> None:
        """Count one observation."""
        self._counts[model][bisect.bisect_left(self._bounds, value)] += 1
        self._sums[model] += value

    def lines(self, name: str) -> Iterable[str]:
        """Return the lines of the text format."""
        for model, counts in sorted(self._counts.items()):
            total = 0
            for bound, count in zip((*map(str, self._bounds), "+Inf"), counts, strict=True):
                total += count
                yield sample(f"{name}_bucket", {"model": model, "le": bound}, total)
            yield sample(f"{name}_sum", {"model": model}, self._sums[model])
            yield sample(f"{name}_count", {"model": model}, total)


class Metrics:
    """What the server has measured so far. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: dict[tuple[str, str, int], int] = defaultdict(int)
        self._prompt_tokens: dict[str, int] = defaultdict(int)
        self._generated: dict[str, int] = defaultdict(int)
        self._cancelled: dict[str, int] = defaultdict(int)
        self._first_token, self._rate = Histogram(SECONDS), Histogram(RATES)

    def request(self, endpoint: str, model: str, status: int) -> None:
        """Count a request. `model` is empty where the request names none that exists."""
        with self._lock:
            self._requests[endpoint, model, status] += 1

    def prompt(self, model: str, tokens: int) -> None:
        """Count the tokens of a prompt."""
        with self._lock:
            self._prompt_tokens[model] += tokens

    def first_token(self, model: str, seconds: float) -> None:
        """Count the time from a row's submission to its first token."""
        with self._lock:
            self._first_token.observe(model, seconds)

    def token(self, model: str) -> None:
        """Count a generated token."""
        with self._lock:
            self._generated[model] += 1

    def rate(self, model: str, tokens_per_second: float) -> None:
        """Count the speed of an answer that has ended."""
        with self._lock:
            self._rate.observe(model, tokens_per_second)

    def cancelled(self, model: str, rows: int) -> None:
        """Count rows whose client has left."""
        with self._lock:
            self._cancelled[model] += rows

    def render(self, load: Load, bank: AdapterBank) -> str:
        """Return everything in the text format."""
        memory = bank.memory()
        loaded = {entry.name: entry.bytes for entry in bank.list() if entry.loaded}
        with self._lock:
            requests = [
                sample("minilora_requests_total", {"endpoint": endpoint, "model": model, "status": str(status)}, count)
                for (endpoint, model, status), count in sorted(self._requests.items())
            ]
            parts = [
                family("minilora_requests_total", "counter", "Requests that were answered", requests),
                by_model("minilora_prompt_tokens_total", "counter", "Tokens of prompts", self._prompt_tokens),
                by_model("minilora_generated_tokens_total", "counter", "Generated tokens", self._generated),
                by_model("minilora_cancelled_rows_total", "counter", "Rows whose client left", self._cancelled),
                family(
                    "minilora_time_to_first_token_seconds",
                    "histogram",
                    "Time from a row's submission to its first token",
                    self._first_token.lines("minilora_time_to_first_token_seconds"),
                ),
                family(
                    "minilora_tokens_per_second",
                    "histogram",
                    "Speed of an answer after its first token",
                    self._rate.lines("minilora_tokens_per_second"),
                ),
            ]
        single = {
            "minilora_rows_running": ("gauge", "Rows in a batch", load.running),
            "minilora_rows_waiting": ("gauge", "Rows that wait for a place in a batch", load.waiting),
            "minilora_steps_total": ("counter", "Forwards of the base", load.steps),
            "minilora_step_rows_total": ("counter", "Rows of all forwards that gave tokens", load.rows_computed),
            "minilora_cache_bytes": ("gauge", "Size of the key/value caches", load.cache_bytes),
            "minilora_base_bytes": ("gauge", "Size of the base's tensors", memory.base),
            "minilora_adapters_registered": ("gauge", "Adapters that can be asked for", len(bank.list())),
        }
        parts += [family(name, kind, help_, [sample(name, {}, value)]) for name, (kind, help_, value) in single.items()]
        parts.append(by_model("minilora_adapter_bytes", "gauge", "Size of a loaded adapter's tensors", loaded))
        return "".join(parts)


def family(name: str, kind: str, help_: str, samples: Iterable[str]) -> str:
    """Return the lines of one metric."""
    return "".join(f"{line}\n" for line in (f"# HELP {name} {help_}.", f"# TYPE {name} {kind}", *samples))


def by_model(name: str, kind: str, help_: str, values: Mapping[str, float]) -> str:
    """Return the lines of a metric with one value for each model."""
    return family(name, kind, help_, [sample(name, {"model": model}, value) for model, value in sorted(values.items())])


def sample(name: str, labels: Mapping[str, str], value: float) -> str:
    """Return one line: a name, its labels, and a value."""
    escaped = {
        label: text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for label, text in labels.items()
    }
    inside = ",".join(f'{label}="{text}"' for label, text in escaped.items())
    return f"{name}{{{inside}}} {value}" if inside else f"{name} {value}"
