"""Which method is better, at equal cost? The runs behind docs/evidence.md, and its table.

    python tests/evidence/compare_methods.py run       # makes what is missing; the same command goes on after a stop
    python tests/evidence/compare_methods.py status    # what is there, what is missing, how long it will take
    python tests/evidence/compare_methods.py report    # the pictures; tests/docs/generate.py writes the table
    python tests/evidence/compare_methods.py ship      # seed 0 of each method into model_cards/, as it is published
    python tests/evidence/compare_methods.py renew     # the same weights in model_cards/ with today's code and cards

Several processes may run at once, each with other runs. The results are small files in tests/evidence/results; adapters
and answers go into --work, into a folder of their own for each state of the code. The plan is in plan.py.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from evidence.plan import METHODS, SEEDS, SINGLE_DTYPES, Run, final_runs
from evidence.store import BASE, CODE, RESULTS, Store
from filelock import FileLock, Timeout

SHIPPED = Path(__file__).parents[2] / "model_cards"


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "status", "report", "ship", "renew"))
    parser.add_argument("--work", type=Path, default=Path("evidence-work"), help="folder for adapters and answers")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--method", action="append", choices=METHODS, help="only these; again for more")
    parser.add_argument(
        "--part", action="append", choices=(BASE, "sweep", "full", "seeds", "single", "trial"), help="only these"
    )
    parser.add_argument("--float32", action="store_true", help="single tasks in float32, into RESULTS/float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of this process")
    arguments = parser.parse_args()
    if arguments.what == "renew":
        renew_all()
        return
    arguments.work = arguments.work.resolve() / CODE[:12]
    store = Store(arguments.results)
    if arguments.float32:
        arguments.part = ["single"]
        SINGLE_DTYPES.update(dict.fromkeys(METHODS, "float32"))
    if others := store.of_other_code():
        say(f"other code has made {len(others)} of the results, e.g. {others[0]}: move them away to make them anew")
    if arguments.what == "run":
        from minilora_hub.errors import TrainingInterrupted

        try:
            run_all(store, arguments)
        except TrainingInterrupted as stopped:
            say(f"{' '.join(str(stopped).partition(':')[0].split())}: the same command goes on")
            sys.exit(stopped.exit_code)
    elif arguments.what == "status":
        status(store)
    elif arguments.what == "ship":
        ship_all(store, arguments)
    else:
        from evidence.pictures import draw_all

        for path in draw_all(store):
            print(path)
        print("python tests/docs/generate.py writes the tables into docs/evidence.md")


def wanted(store: Store, arguments: argparse.Namespace) -> list[Run]:
    """The runs to make, of those known so far."""
    return [
        run
        for run in store.runs()
        if (not arguments.method or run.method in arguments.method)
        and (not arguments.part or run.part in arguments.part)
        and not kept_in(store, arguments).has(run.name)
    ]


def kept_in(store: Store, arguments: argparse.Namespace) -> Store:
    """Where the results of these runs are."""
    return store.again_in_float32() if arguments.float32 else store


def run_all(store: Store, arguments: argparse.Namespace) -> None:
    """Make what is missing and what no other process is making."""
    import torch
    from evidence.measure import make, with_rows

    torch.set_num_threads(arguments.threads)
    work, kept = arguments.work, kept_in(store, arguments)
    locks = work / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / "data.lock"):
        with_rows(work)
    if not arguments.part or BASE in arguments.part:
        make_base(store, work)
    while True:
        made = False
        for run in wanted(store, arguments):
            try:
                with FileLock(locks / f"{run.name}.lock", timeout=0):
                    if kept.has(run.name):
                        continue
                    say(f"{run.name}: {run.steps} steps; {left(store)}")
                    started = time.perf_counter()
                    kept.write(run.name, make(run, work))
                    say(f"{run.name}: done in {(time.perf_counter() - started) / 60:.1f} minutes")
                    made = True
            except Timeout:
                continue
            break  # what comes next may depend on this
        if not made:
            break
    say(left(store))


def make_base(store: Store, work: Path) -> None:
    """Measure the base, unless another process does."""
    from evidence.measure import base_result

    try:
        with FileLock(work / "locks" / f"{BASE}.lock", timeout=0):
            if not store.has(BASE):
                say("the base, zero-shot and with examples")
                store.write(BASE, base_result(work))
                say("the base: done")
    except Timeout:
        pass


def renew_all() -> None:
    """Build the shipped folders anew from themselves, after a change of the published code or the cards."""
    from evidence.measure import build_shipped

    for folder in sorted(SHIPPED.iterdir()):
        build_shipped(folder, folder)
        say(f"wrote {folder}")


def ship_all(store: Store, arguments: argparse.Namespace) -> None:
    """Write the folders of the methods whose first seed is there."""
    from evidence.measure import ship

    for run in store.runs():
        chosen = not arguments.method or run.method in arguments.method
        if chosen and run.part == "seeds" and run.seed == SEEDS[0] and store.has(run.name):
            out = SHIPPED / f"smollm2-135m-{run.method}"
            ship(run, arguments.work, out)
            say(f"wrote {out}")


def left(store: Store) -> str:
    """How much there is still to do, at the speed of what is done."""
    runs = store.runs()
    unknown = dict.fromkeys(METHODS, 0.0)  # their learning rates are not chosen yet
    runs += [run for run in final_runs(unknown) if run.method not in store.rates()]
    finished = [run for run in runs if store.has(run.name)]
    steps = sum(run.steps for run in runs if not store.has(run.name))
    spent = [(run.steps, store.read(run.name).get("seconds") or 0.0) for run in finished]
    text = f"{len(finished)} of {len(runs)} runs done, {steps} steps to go"
    if spent:
        each = sum(seconds for _, seconds in spent) / sum(count for count, _ in spent)
        text += f", about {steps * each / 3600:.1f} hours of one process at {each:.1f} s a step"
    return text


def status(store: Store) -> None:
    """Print what is there and what is missing."""
    for run in store.runs():
        if store.has(run.name):
            result = store.read(run.name)
            print(f"{run.name}: validation loss {result['validation_loss']}, {result.get('seconds')} s")
        else:
            print(f"{run.name}: missing")
    print(f"{BASE}: {'there' if store.has(BASE) else 'missing'}")
    print(left(store))


def say(line: str) -> None:
    """Print at once, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


if __name__ == "__main__":
    main()
