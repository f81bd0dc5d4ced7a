"""ZeroGPU, with a stand-in for its package: each call is decorated, asks for a time that fits it, and is forked off.

What the stand-in does is what `spaces` 0.51 does there: it calls `duration` with the arguments, forks a process that
runs the generator, pickles what goes in and out, and ends the process when the generator is closed.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import subprocess
import sys
import threading
import types
from collections import defaultdict
from pathlib import Path

import pytest
import tiny_stand_ins
from demo.threads import run_async

from minilora_hub.compare.engine import CompareEngine, Row, Sampling
from minilora_hub.compare.prompt_index import AdapterIndex, embedding
from minilora_hub.demo.adapters.catalogue import Catalogue
from minilora_hub.demo.runs import zero_gpu
from minilora_hub.demo.runs.auto_column import COLUMN, AutoColumn
from minilora_hub.demo.runs.runner import Runner
from minilora_hub.errors import AdapterError

ROOT = Path(__file__).parents[2]


class StandIn(types.ModuleType):
    """The package `spaces`, as far as it is used: `GPU(duration=…)` on a generator function."""

    def __init__(self):
        super().__init__("spaces")
        self.asked, self.processes = [], []

    def GPU(self, *, duration):
        import multiprocessing

        context = multiprocessing.get_context("fork")

        def decorate(task):
            def call(*arguments):
                self.asked.append((duration(*arguments), arguments))
                ours, theirs = context.Pipe()
                process = context.Process(target=serve, args=(task, ours, theirs))
                process.start()
                self.processes.append(process)
                ours.send(arguments)  # pickled, as there
                try:
                    while (item := ours.recv()) is not None:
                        yield item
                        ours.send("on")
                finally:
                    ours.close()
                    process.join()

            return call

        return decorate


def serve(task, parents, pipe):
    """The forked process: one step each time that it is asked."""
    parents.close()  # its copy would keep the pipe open
    steps = task(*pipe.recv())
    try:
        for item in steps:
            pipe.send(item)
            if pipe.recv() != "on":
                break
        else:
            pipe.send(None)
    except (EOFError, OSError):
        steps.close()
    finally:
        os._exit(0)


@pytest.fixture
def spaces(monkeypatch):
    """The stand-in, where the page looks for the package."""
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "spaces", stand_in)
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    importlib.reload(zero_gpu)
    yield stand_in
    monkeypatch.undo()
    importlib.reload(zero_gpu)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    parrots = tiny_stand_ins.save_parrots(tmp_path_factory.mktemp("parrots"), {"dora": "dora", "mix": "mixlora"})
    base = tiny_stand_ins.ScriptedBase(delay=0.01)
    return CompareEngine(base, parrots, tokenizer=tiny_stand_ins.byte_tokenizer())


async def all_of(moments):
    return [moment async for moment in moments]


def test_a_comparison_is_one_call_with_a_time_that_fits_it(spaces, engine, monkeypatch):
    """The same answers as without ZeroGPU; computed elsewhere, so the engine in this process counts nothing."""
    before = engine.forwards
    asked = ("hello", Sampling(20), engine.columns)
    there = run_async(all_of(Runner(engine).answer(*asked)))
    assert engine.forwards == before
    ((seconds, (rows, among)),) = spaces.asked
    assert among is None
    assert [row.adapter for row in rows] == [None, "dora", "mix"]
    assert seconds == zero_gpu.gpu_seconds(rows)
    assert sum(moment.forwards for moment in there) == 20

    spaces.asked.clear()
    monkeypatch.setenv("SPACES_ZERO_GPU", "")
    here = run_async(all_of(Runner(engine).answer(*asked)))
    assert spaces.asked == []
    assert texts(there) == texts(here) == {1: "hello", 2: "hello"} | {0: texts(here)[0]}


def texts(moments):
    written = defaultdict(str)
    for moment in moments:
        for update in moment.updates:
            written[update.row] += update.text
    return written


def test_the_adapter_of_auto_is_chosen_within_the_call(spaces, saved, tmp_path):
    """By the index and the base that the forked process has; nothing is computed before."""
    base, adapters = saved
    engine = CompareEngine(base, adapters, device="cpu")
    prompts = {"lora": ("./lora", ["Hello there"]), "dora": ("./dora", ["12345"])}
    index = AdapterIndex.build(engine.bank.model, engine.tokenizer, "base", "unknown", prompts)
    index.save(tmp_path / "my.index")
    runner = Runner(engine, auto=AutoColumn(engine, tmp_path / "my.index", "unknown"))
    columns, sampling, before = (engine.columns[0], COLUMN), Sampling(6), engine.forwards
    there = run_async(all_of(runner.answer("Hello", sampling, columns, among=engine.columns)))
    assert engine.forwards == before
    ((_, (rows, among)),) = spaces.asked
    assert ([row.adapter for row in rows], sorted(among)) == ([None, "auto"], ["dora", "lora"])
    (choice,) = [moment.choice for moment in there if moment.choice]
    wanted = index.choose(embedding(engine.bank.model, engine.tokenizer, "Hello"))
    assert (choice.adapter, choice.runner_up[0]) == (wanted.adapter, wanted.runner_up[0])
    assert (choice.similarity, choice.runner_up[1]) == pytest.approx((wanted.similarity, wanted.runner_up[1]))
    here = engine.stream_rows([Row("Hello", wanted.adapter, sampling)])
    assert texts(there)[1] == "".join(update.text for update in here)
    with pytest.raises(ValueError, match="must hold at least one token"):
        runner.auto.check([Row("", "auto")], among)


@pytest.mark.parametrize(
    ("rows", "tokens", "seconds"), [(1, 1, 11), (4, 100, 16), (4, 200, 22), (8, 200, 26), (8, 5000, 120)]
)
def test_the_time_follows_the_request(rows, tokens, seconds):
    """More tokens and more answers ask for more, up to a bound."""
    assert zero_gpu.gpu_seconds([Row("x", None, Sampling(tokens))] * rows) == seconds
    mixed = [Row("x", None, Sampling(1)), *[Row("x", None, Sampling(tokens))] * (rows - 1)]
    assert zero_gpu.gpu_seconds(mixed) <= seconds


@pytest.mark.parametrize("way", ["stop", "close"])
def test_whoever_leaves_ends_the_call(spaces, engine, way):
    """The forked process is gone, the rows are told to have been stopped."""

    async def scene():
        stop = threading.Event()
        moments = Runner(engine).answer("a long text", Sampling(400), engine.columns, stop)
        while not (await anext(moments)).updates:
            pass
        if way == "stop":
            stop.set()
            rest = await all_of(moments)
            assert rest[-1].finished
            ended = {update.row: update for moment in rest for update in moment.updates if update.finished}
            assert {row: update.reason for row, update in ended.items()} == {0: "stopped", 1: "stopped", 2: "stopped"}
            assert ended[0].tokens > 0
        else:
            await moments.aclose()
            await asyncio.sleep(0.5)

    run_async(scene())
    assert [process.is_alive() for process in spaces.processes] == [False]


def test_links_are_not_followed_there(spaces, engine):
    """Nothing can be loaded once the page is served."""
    with pytest.raises(AdapterError, match="its own adapters only"):
        run_async(Runner(engine, Catalogue(engine, links=object())).fetch("ana/dora"))


def test_elsewhere_the_folder_spaces_is_no_package():
    """Without the package, the folder of that name is found, which has no `GPU`: the page computes here."""
    program = (
        "import sys\nsys.modules.pop('spaces', None)\n"
        "sys.path = ['.', *[p for p in sys.path if 'site-packages' not in p]]\n"
        "from minilora_hub.demo.runs import zero_gpu\nimport spaces\n"
        "print(zero_gpu.GPU, zero_gpu.is_zero_gpu(), spaces.__file__)"
    )
    environment = {**os.environ, "SPACES_ZERO_GPU": "true"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["None", "False", "None"], done.stderr


def test_it_is_imported_before_torch():
    """The package must come before torch touches CUDA."""
    program = "import sys\nfrom minilora_hub.demo.runs import zero_gpu\nprint('torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SPACES_")}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
    app = (ROOT / "app.py").read_text(encoding="utf-8")
    imports = [line.strip() for line in app.split("def main()")[1].splitlines() if "import" in line]
    assert imports[0].startswith("from minilora_hub.demo.runs import zero_gpu")
