"""Every benchmark in one command: the numbers as one JSON file, and the picture in docs/performance.md.

    python tests/bench/bench_all.py [--only methods bank] [--rounds 5]

Writes tests/bench/costs.json (parts that are not run keep what they had) and tests/bench/costs.png;
tests/docs/generate.py writes the tables. Takes about a quarter of an hour on two cores; nothing else should run
meanwhile.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
PARTS = ("bounds", "methods", "memory", "bank", "pool", "growth")
RESULTS, PICTURE = HERE / "costs.json", HERE / "costs.png"
COLOURS = {
    "LoRA": "#3a7d44",
    "DoRA": "#2d5fa6",
    "MixLoRA": "#8a3fa0",
    "PEFT LoRA": "#a9c9ae",
    "PEFT DoRA": "#a9bfdd",
    "mixlora": "#d3b3dc",
}


def run(part: str, rounds: int | None) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-W", "ignore", str(HERE / f"bench_{part}.py"), "--json", str(out)]
        if rounds and part != "memory":
            command += ["--rounds", str(rounds)]
        subprocess.run(command, check=True)
        return json.loads(out.read_text(encoding="utf-8"))


def draw(results: dict) -> None:
    """Prefill, decode and a training step of each method, rows of a batch; below, how the cost of decoding grows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(13, 6.4), constrained_layout=True)
    draw_methods(axes[0], results["methods"])
    draw_batch(axes[0, 3], results["bank"])
    draw_growth(axes[1, :3], results["growth"])
    axes[1, 3].set_visible(False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.savefig(PICTURE, dpi=110, metadata={"Software": None})


def draw_methods(axes, methods: dict) -> None:
    titles = {
        "prefill": "prefill, 512 tokens\n(bare base = 1)",
        "decode": "decoding one token\n(bare base = 1)",
        "training": "training step\n(PEFT's LoRA = 1)",
    }
    for axis, (key, title) in zip(axes, titles.items(), strict=False):
        rows = {name: row for name, row in methods[key].items() if name in COLOURS}
        ratios = [row["ratio"] for row in rows.values()]
        spread = [
            [row["ratio"] - row["low"] for row in rows.values()],
            [row["high"] - row["ratio"] for row in rows.values()],
        ]
        bars = axis.barh(list(rows), ratios, color=[COLOURS[name] for name in rows], xerr=spread, ecolor="#555")
        axis.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=4, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.set_xlim(0, max(ratios) * 1.25)
        axis.axvline(1, color="#888", linewidth=0.8)
        axis.invert_yaxis()


def draw_batch(axis, bank: dict) -> None:
    shown = {
        "1 bare row": "transformers, 1 row",
        "4 bare rows": "transformers, 4 rows",
        "bank: 4 bare": "bank, 4 rows",
        "bank: 4 kinds": "bank, base + LoRA +\nDoRA + MixLoRA",
    }
    times = [bank[name]["milliseconds"] for name in shown]
    bars = axis.barh(list(shown.values()), times, color=["#bbb", "#bbb", "#777", "#8a3fa0"])
    axis.bar_label(bars, [f"{value:.0f} ms" for value in times], padding=4, fontsize=8)
    axis.set_title("one decode step of a batch", fontsize=10)
    axis.set_xlim(0, max(times) * 1.25)
    axis.invert_yaxis()


def draw_growth(axes, growth: dict) -> None:
    titles = {
        "rank": "decoding, by rank",
        "experts": "decoding, by experts (2 active)",
        "context": "decoding, by context",
    }
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        points = list(growth[key])
        for name in growth[key][points[0]]:
            if name.endswith("prefill"):
                continue
            colour = COLOURS[name.removesuffix(" decode")]
            values = [growth[key][point][name] for point in points]
            axis.plot(points, values, marker="o", markersize=4, color=colour, label=name.removesuffix(" decode"))
        axis.axhline(1, color="#888", linewidth=0.8)
        axis.set_ylim(bottom=0)
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=7, frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, help="how often each is measured; default: as each benchmark has it")
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for part in arguments.only:
        print(f"\n== {part}", flush=True)
        results[part] = run(part, arguments.rounds)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    draw(results)
    print("python tests/docs/generate.py writes them into the docs")


if __name__ == "__main__":
    main()
