"""Settings for the whole test run."""

import gc
import os
import signal

import pytest

# Before any library reads its settings: no test may reach a real Hub, and none reports home. Port 9 refuses at once.
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Two processes run the tests, each with one thread: threads that spin while they wait slow each other down tenfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A run in the background may ignore Ctrl-C, which children would inherit; some tests send it to theirs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A tiny base and an adapter of each kind, as folders, which no test changes."""
    from tiny_stand_ins import save_base_and_adapters

    return save_base_and_adapters(tmp_path_factory.mktemp("saved"))


def pytest_collection_finish() -> None:
    """Keep what was imported out of garbage collections: a Trainer makes some, half of a tiny run's time."""
    gc.collect()
    gc.freeze()
