"""Exported adapters in vLLM as it is, without the plugin."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; .ci/vllm makes an environment that has it")

from engines.vllm.answers_here import NEW_TOKENS, answers, base_folder, folder_of, prompts
from engines.vllm.vllm_processes import answers_of_model

from minilora_hub.formats.exporting import export_adapter
from minilora_hub.formats.importing import import_adapter

WITHOUT_PLUGIN = {"VLLM_PLUGINS": ""}
ADAPTERS = {"enable_lora": True, "max_lora_rank": 16}


@pytest.mark.parametrize(("method", "to"), [("dora", "dense"), ("mixlora", "mixtral"), ("mixdora", "mixtral")])
def test_an_export_answers_as_the_adapter_does_here(tmp_path, method, to):
    export_adapter(folder_of(method), tmp_path / "export", to, base="embedded", dtype="float32")
    found = answers_of_model(tmp_path / "export", prompts(), NEW_TOKENS, tmp_path, environment=WITHOUT_PLUGIN)
    assert found == answers(method), found


def in_base(tmp_path, adapter):
    folders = [adapter] * len(prompts())
    return answers_of_model(
        base_folder(), prompts(), NEW_TOKENS, tmp_path, folders, environment=WITHOUT_PLUGIN, **ADAPTERS
    )


def test_an_imported_lora_answers_as_in_peft(tmp_path):
    import_adapter(folder_of("lora"), tmp_path / "lora", base="embedded")
    found = in_base(tmp_path, tmp_path / "lora")
    assert found == answers("lora"), found


def test_a_dora_in_peft_format_is_refused_without_the_plugin(tmp_path):
    assert "vLLM does not yet support DoRA" in in_base(tmp_path, folder_of("dora") / "peft")
