"""The plugin's entry point: which versions of vLLM it is for, and when it leaves adapters to vLLM."""

from __future__ import annotations

import logging
from importlib.metadata import entry_points

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; .ci/vllm makes an environment that has it")

import vllm
from processes import run_python
from vllm.lora.peft_helper import PEFTHelper

from minilora_hub.integrations.vllm import plugin

INSTALLED = """
from minilora_hub.integrations.vllm import plugin
{}
plugin.register()
plugin.register()
import vllm.lora.utils as utils, vllm.v1.worker.lora_model_runner_mixin as runner
from vllm import ModelRegistry
print(runner.LRUCacheWorkerLoRAManager.__name__, "DoraForCausalLM" in ModelRegistry.get_supported_archs())
print(max(sum(base.__name__ == "DoraLayer" for base in kind.__mro__) for kind in utils._all_lora_classes))
"""
COMPILED = """
from types import SimpleNamespace
from minilora_hub.errors import AdapterError
from minilora_hub.integrations.vllm.adapter_manager import AdapterManager
manager = object.__new__(AdapterManager)
manager.compiled, manager.modules, manager.packed_modules = True, {}, {}
try:
    manager.refuse_unfit(SimpleNamespace(loras={}, magnitudes={}, mixtures={"model.layers.0.mlp": None}))
except AdapterError as error:
    print(error)
"""
TAKES_DORA = "plugin.takes_dora = lambda: True"


def lines(before: str = "") -> list[str]:
    done = run_python(INSTALLED.format(before))
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-2:]


def test_vllm_finds_it():
    found = [point for point in entry_points(group="vllm.general_plugins") if point.name == "minilora_hub"]
    assert [point.load() for point in found] == [plugin.register]


def test_registered_once_however_often_it_is_called():
    assert lines() == ["AdapterWorkerManager True", "1"]


def test_stands_aside_where_vllm_takes_dora(monkeypatch):
    assert not plugin.takes_dora()
    monkeypatch.setattr(PEFTHelper, "_validate_features", lambda self: [])
    assert plugin.takes_dora()
    assert lines(TAKES_DORA) == ["LRUCacheWorkerLoRAManager True", "0"]


@pytest.mark.parametrize("version", ["0.31.4", "0.33.0", "0.32.1.dev5+gabc"])
def test_untested_versions_are_declined_in_one_line(monkeypatch, caplog, version):
    monkeypatch.setattr(vllm, "__version__", version)
    monkeypatch.setattr(plugin, "register_models", lambda: pytest.fail("something was changed"))
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        plugin.register()
    assert [record.message for record in caplog.records if "minilora_hub" in record.name] == [
        f"minilora_hub: the plugin is off, since it was not tested with vLLM {version} (tested: 0.32.0)"
    ]


def test_a_compiled_model_takes_no_mixlora():
    """Without vLLM's model: on a CPU, vLLM compiles no model that takes adapters."""
    done = run_python(COMPILED)
    assert done.returncode == 0, done.stderr
    assert "needs a server that was started with --enforce-eager" in done.stdout
