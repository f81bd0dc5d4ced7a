"""The Flower app: a simulation run as docs/federated.md says, and what server and client make of messages."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs the extra flower: .ci/flower")

from flwr.app import Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from safetensors.torch import load_file
from tiny_training import colour_rows, write_base, write_rows

from minilora_hub import MixLoraForCausalLM
from minilora_hub.adapter_folder.results import Results
from minilora_hub.errors import DataError, TrainingError
from minilora_hub.integrations.flower.client_app import rows_of
from minilora_hub.integrations.flower.messages import METRICS, answer_record
from minilora_hub.integrations.flower.server_app import MeanOfUpdates
from minilora_hub.training.federated import FederatedServer, train_client

PAGE = Path(__file__).parents[2] / "docs" / "federated.md"
BIN = Path(sys.executable).parent
SHORT = {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-2, "r": 4}


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture
def environment(tmp_path):
    """Variables for Flower's commands, with a SuperLink of their own that ends with the test."""
    home = tmp_path / "flower-home"
    home.mkdir()
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_HOME": str(home)}
    quiet |= {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    quiet |= {"RAY_raylet_start_wait_time_s": "300"}  # on a machine that does much else
    variables = os.environ | quiet | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    port, control = free_ports(2)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "own"\n[superlink.own]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    command = f"flower-superlink --insecure --simulation --control-api-address 127.0.0.1:{control} --host 127.0.0.1"
    with (tmp_path / "superlink.log").open("w") as log:
        process = subprocess.Popen(
            [*shlex.split(command), "--port", str(port)],
            env=variables, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                    break
                except OSError:
                    assert time.monotonic() < deadline, (tmp_path / "superlink.log").read_text()
                    time.sleep(0.2)
            yield variables
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)


@pytest.mark.slow
def test_the_simulation_of_the_page(environment, tmp_path):
    """Two clients and two rounds by `flwr run`: the folder is the same as of the same rounds without Flower."""
    base, folder = write_base(tmp_path / "base"), tmp_path / "federated"
    folder.mkdir()
    write_rows(folder / "rows.jsonl")
    (folder / "recipe.yaml").write_text(
        "".join(f"{name}: {value}\n" for name, value in SHORT.items()) + "num_experts: 2\n"
    )
    block = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)[1]
    script = block.replace("/tmp/federated", str(folder)).replace('base="embedded"', f'base="{base}"')
    assert str(base) in script
    done = subprocess.run(
        ["bash", "-ec", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "round 2: 2 of 2 clients, 24 rows" in done.stdout
    results = Results.load(folder / "out")
    assert results.training.hyperparameters["clients in each round"] == "2 of 2, 2 of 2"
    assert (folder / "out" / "recording.json").is_file()
    assert MixLoraForCausalLM.from_pretrained(folder / "out").config.num_experts == 2
    rows = colour_rows()
    shards = [str(write_rows(tmp_path / f"{client}.jsonl", rows[client::2])) for client in range(2)]
    with FederatedServer(tmp_path / "again", folder / "recipe.yaml", method="mixlora", base=str(base)) as server:
        for number in (1, 2):
            tensors = server.tensors()
            server.add_round([train_client(tensors, server.sent, shard, number) for shard in shards], 2)
    ours, theirs = (load_file(out / "adapter_model.safetensors") for out in (tmp_path / "again", folder / "out"))
    for name, tensor in ours.items():
        if "lora_A" in name:  # the order of the clients may differ, and with it the signs of A's rows and B's columns
            other = name.replace("lora_A", "lora_B")
            assert (ours[other] @ tensor - theirs[other] @ theirs[name]).abs().max() < 1e-5
        elif "lora_B" not in name:
            assert (tensor - theirs[name]).abs().max() < 1e-6


def asked() -> Message:
    """A server's message, as of a run that Flower has begun."""
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    return Message(RecordDict(), dst_node_id=1, message_type="train")


@pytest.fixture
def server(tmp_path):
    base = write_base(tmp_path / "base")
    with FederatedServer(tmp_path / "out", method="lora", base=str(base), **SHORT) as server:
        yield server


@pytest.mark.slow
def test_a_client_that_fails_is_named_and_not_in_the_mean(server, tmp_path, caplog):
    rows = str(write_rows(tmp_path / "rows.jsonl"))
    answer = train_client(server.tensors(), server.sent, rows, 1)
    strategy, message = MeanOfUpdates(server, 2), asked()
    good = Message(answer_record(answer), reply_to=message)
    bad = Message(Error(1, "Traceback\n  File x\nDataError: client-0.jsonl:1: has no completion"), reply_to=message)
    with pytest.raises(TrainingError, match=r"round 1: no client answered; DataError: client-0\.jsonl:1: has no"):
        strategy.aggregate_train(1, [bad])
    arrays, metrics = strategy.aggregate_train(1, [good, bad])
    assert set(arrays) == set(answer.tensors)
    assert metrics["residual"] == 0
    results = Results.load(tmp_path / "out")
    assert results.training.hyperparameters["clients in each round"] == "1 of 2"
    content = answer_record(answer)
    content[METRICS] = MetricRecord({"num-examples": 0, "steps": 1, "train-loss": 1.0})
    with pytest.raises(Exception, match=r"zero|above 0"):
        strategy.aggregate_train(2, [Message(content, reply_to=message)])


class TestRows:
    def test_a_client_names_its_own(self, tmp_path):
        assert rows_of({"data": "/mine.jsonl", "partition-id": 0}, {"data": "/theirs.jsonl"}, tmp_path) == "/mine.jsonl"
        with pytest.raises(DataError, match="start it with --node-config"):
            rows_of({}, {"data": "/theirs.jsonl"}, tmp_path)

    def test_a_file_for_each_or_one_dealt_out(self, tmp_path):
        node = {"partition-id": 1, "num-partitions": 3}
        assert rows_of(node, {"data": "/rows-{client}.csv"}, tmp_path) == "/rows-1.csv"
        (tmp_path / "all.jsonl").write_text("".join(f'{{"text": "{row}"}}\n\n' for row in range(7)))
        parts = [
            rows_of(node | {"partition-id": one}, {"data": str(tmp_path / "all.jsonl")}, tmp_path) for one in range(3)
        ]
        assert [re.findall(r"\d", Path(part).read_text()) for part in parts] == [
            ["0", "3", "6"],
            ["1", "4"],
            ["2", "5"],
        ]

    @pytest.mark.parametrize(("name", "message"), [("x.csv", "only a .jsonl file"), ("none.jsonl", "cannot be read")])
    def test_what_cannot_be_dealt_out_is_named(self, name, message, tmp_path):
        with pytest.raises(DataError, match=message):
            rows_of({"partition-id": 0, "num-partitions": 2}, {"data": str(tmp_path / name)}, tmp_path)
