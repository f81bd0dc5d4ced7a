"""Our models under other people's trainers: configuration, arguments, checkpoints and losses of a plain model."""

import copy
import inspect
import json
import math
import pickle

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import load_file
from tiny import CAUSAL_LM, HEADLESS, METHODS, fill_adapter, logits, tiny_base, tiny_config, tiny_model, token_ids
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import minilora_hub
from minilora_hub import DoraConfig, DoraForCausalLM, MixLoraPeftConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),  # TRL 1.16 with transformers 5.23
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),  # torch.compile's own imports
]

IDS = [[5, 6, 7, 8], [9, 10, 11], [20, 21, 22, 23, 24, 25]]
ROWS = Dataset.from_dict({"input_ids": token_ids(8, 6).tolist(), "labels": token_ids(8, 6).tolist()})


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_base().save_pretrained(folder)
    return str(folder)


def fresh(method, base=None, **changes):
    return CAUSAL_LM[method].from_base(base or tiny_base(), tiny_config(method, **changes))


def arguments(folder, kind=TrainingArguments, **changes):
    settings = {
        "max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 0.0, "save_strategy": "no",
        "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 0,
    }  # fmt: skip
    return kind(str(folder), **settings | changes)


def run(trainer, **resume):
    """{what is logged: its first value} of a training."""
    trainer.log = lambda values, *args, **kwargs: trainer.state.log_history.append(values)
    trainer.train(**resume)
    return trainer.state.log_history[0]


# ---- configuration ----


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi3", "mamba"])
def test_every_field_of_the_base_is_read_through_the_configuration(family):
    base = tiny_base(family)
    theirs = base.config
    config = fresh("dora", base, **({"target_modules": ["in_proj"]} if family == "mamba" else {})).config
    names = {name for name in dir(theirs) if not name.startswith("_") and not callable(getattr(theirs, name, len))}
    names.remove("per_layer_config")  # another view each time
    adapters = DoraConfig._own_names
    assert {"use_cache", "vocab_size", "pad_token_id", "tie_word_embeddings"} <= names - adapters
    for name in {"hidden_size", "num_hidden_layers", *names} - adapters:
        assert getattr(config, name) == getattr(theirs, name), name
    assert config.get_text_config() is theirs
    assert not hasattr(config, "no_such_field")


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2 maps hidden_size to n_embd
def test_what_is_set_on_the_configuration_is_set_on_the_base(family):
    model = fresh("mixlora", tiny_base(family))
    model.config.use_cache = False
    model.config.output_hidden_states = True
    model.config.hidden_size, model.config.a_new_field = 7, "new"
    theirs = model.base.config
    assert (theirs.use_cache, theirs.hidden_size, theirs.a_new_field) == (False, 7, "new")
    model.config.update({"hidden_size": 32})
    assert theirs.hidden_size == 32
    outputs = model(token_ids())
    assert outputs.past_key_values is None
    assert len(outputs.hidden_states) == 3
    del model.config.a_new_field
    assert not hasattr(theirs, "a_new_field")
    model.config.num_experts_per_tok = 1  # the adapter's own
    assert not hasattr(theirs, "num_experts_per_tok")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_copies_of_a_configuration_are_copies_of_the_bases_too(copied):
    config = fresh("dora").config
    other = copied(config)
    assert other == config
    other.use_cache = False
    assert config.use_cache
    assert not other.text_config.use_cache


def test_the_file_holds_the_adapters_fields_and_the_bases_apart(tmp_path):
    model = fresh("dora")
    model.config.use_cache, model.config.pad_token_id = False, 3
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["text_config"]["pad_token_id"] == 3
    ours = written.keys() - DoraConfig._own_fields()
    assert ours == {"architectures", "auto_map", "dtype", "model_type", "transformers_version"}
    assert "use_cache" not in written["text_config"]
    assert "_set_on_base" not in model.config.to_dict()


@pytest.mark.parametrize("how", ["argument", "configuration", "new configuration"])
def test_what_is_set_before_loading_reaches_the_base(how, base_folder, tmp_path):
    minilora_hub.register()
    if how == "new configuration":
        config = DoraConfig(r=4, output_hidden_states=True)
        config.use_cache = False
        model = DoraForCausalLM.from_base(base_folder, config)
    else:
        DoraForCausalLM.from_base(base_folder, tiny_config("dora")).save_pretrained(tmp_path)
        settings = {"use_cache": False, "output_hidden_states": True, "rms_norm_eps": 0.1}
        if how == "configuration":
            config = AutoConfig.from_pretrained(tmp_path)
            config.update(settings)
            settings = {"config": config}
        model = AutoModelForCausalLM.from_pretrained(tmp_path, **settings)
        assert model.base.model.layers[0].input_layernorm.variance_epsilon == 0.1  # it counts while the base is made
    assert (model.base.config.use_cache, model.base.config.output_hidden_states) == (False, True)
    other = DoraForCausalLM.from_base(tiny_base(), model.config)
    assert other.base.config.use_cache or how == "new configuration"


def test_attention_weights_can_be_asked_for_where_the_model_is_loaded(base_folder, tmp_path):
    minilora_hub.register()
    DoraForCausalLM.from_base(base_folder, tiny_config("dora")).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, output_attentions=True, attn_implementation="eager")
    assert len(model(token_ids()).attentions) == 2


def test_setting_the_attention_of_a_wrapper_sets_the_bases():
    model = fresh("dora")
    model.set_attn_implementation("eager")
    assert model.base.config._attn_implementation == "eager"


# ---- arguments ----


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_forward_shows_the_arguments_of_the_bases(family, method):
    for classes, head in ((CAUSAL_LM, True), (HEADLESS, False)):
        base = tiny_base(family, head=head)
        theirs = list(inspect.signature(base.forward).parameters.values())
        model = classes[method].from_base(base, tiny_config(method))
        shown = inspect.signature(model.forward).parameters
        assert [shown[parameter.name] for parameter in theirs] == theirs
        assert shown.keys() - {p.name for p in theirs} <= {"output_router_logits", "output_routing", "labels"}
        assert inspect.signature(copy.deepcopy(model).forward).parameters == shown


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_positional_arguments_come_in_the_bases_order(family, method):
    model, ids = tiny_model(family, method), token_ids()
    named = {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(9).flip(0)[None]}
    order = list(inspect.signature(model.base.forward).parameters)
    positional = [named.get(name) for name in order[1:5]]
    assert torch.equal(model(ids, *positional).logits, model(ids, **named).logits)
    with pytest.raises(TypeError, match="position_ids both by position and by name"):
        model(ids, *positional, position_ids=named["position_ids"])


@pytest.mark.parametrize("method", METHODS)
def test_rows_laid_end_to_end_do_not_see_each_other(method, tmp_path):
    base = tiny_base()
    with torch.no_grad():
        losses = [base(torch.tensor([row]), labels=torch.tensor([row])).loss * (len(row) - 1) for row in IDS]
    alone = sum(losses) / sum(len(row) - 1 for row in IDS)
    model = fresh(method, base, **({"router_aux_loss_coef": 0.0} if method != "dora" else {}))
    rows = Dataset.from_dict({"input_ids": IDS, "labels": IDS})
    collator = DataCollatorWithFlattening(return_tensors="pt")
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows, data_collator=collator)
    assert run(trainer)["loss"] == pytest.approx(alone.item(), abs=1e-4)


def test_a_column_that_the_base_takes_reaches_it(tmp_path):
    model = fresh("dora")
    row, positions = [i for ids in IDS for i in ids], [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4, 5]
    rows = Dataset.from_dict({"input_ids": [row], "labels": [row], "position_ids": [positions], "unknown": [[1]]})
    seen = []
    model.base.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    run(Trainer(model, arguments(tmp_path), train_dataset=rows, data_collator=default_data_collator))
    assert seen[0]["position_ids"].tolist() == [positions]
    assert "unknown" not in seen[0]


# ---- checkpoints ----


def trainer_of(kind, model, folder, **changes):
    settings = {"max_steps": 6, "learning_rate": 2e-2, "save_strategy": "steps", "save_steps": 2, **changes}
    if kind is Trainer:
        given = {"args": arguments(folder, **settings), "data_collator": default_data_collator}
    else:
        settings |= {"bf16": False, "max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
        tokenizer = word_tokenizer()
        given = {"args": arguments(folder, SFTConfig, **settings), "processing_class": tokenizer}
    return kind(model=model, train_dataset=ROWS, eval_dataset=ROWS, **given)


def word_tokenizer():
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(128)}, unk_token="t3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t2")


@pytest.mark.parametrize("kind", [Trainer, SFTTrainer])
@pytest.mark.parametrize("method", ["dora", "mixlora"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(method, kind, tmp_path):
    whole = fresh(method)
    run(trainer_of(kind, whole, tmp_path))
    resumed = fresh(method)
    run(trainer_of(kind, resumed, tmp_path), resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for name, parameter in whole.adapter_parameters().items():
        assert torch.equal(resumed.adapter_parameters()[name], parameter), name


@pytest.mark.parametrize("kind", [Trainer, SFTTrainer])
@pytest.mark.parametrize("method", ["dora", "mixlora"])
def test_the_best_checkpoint_is_loaded_at_the_end(method, kind, tmp_path):
    model = fresh(method)
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    best |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}  # so that it is not the last
    trainer = trainer_of(kind, model, tmp_path, **best)
    run(trainer)
    checkpoint = trainer.state.best_model_checkpoint
    assert checkpoint.endswith("checkpoint-2")
    saved = load_file(f"{checkpoint}/adapter_model.safetensors")
    for name, parameter in model.adapter_parameters().items():
        assert torch.equal(saved[name], parameter), name
    loaded = CAUSAL_LM[method].from_pretrained(checkpoint, base_model=tiny_base())
    assert torch.equal(logits(loaded), logits(model.eval()))


def test_only_a_checkpoint_holds_the_adapter_twice(tmp_path):
    model = tiny_model("llama", "dora")
    model.save_pretrained(tmp_path / "checkpoint-3")
    weights = load_file(tmp_path / "checkpoint-3/model.safetensors")
    assert weights.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_bytes((tmp_path / "checkpoint-3/model.safetensors").read_bytes())
    model.save_pretrained(out)  # Trainer copies it there before it pushes
    assert [path.name for path in out.glob("*.safetensors")] == ["adapter_model.safetensors"]
    model.unload().save_pretrained(out)
    tiny_model("llama", "dora").save_pretrained(out)  # a base's weights are not the adapter's to remove
    assert (out / "model.safetensors").exists()


def test_weights_of_the_adapter_alone_are_loaded_without_a_word_about_the_base():
    model, other = tiny_model("llama", "mixlora"), fresh("mixlora")
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    state = {name: value for name, value in model.state_dict().items() if name in names}
    assert other.load_state_dict(state) == ([], [])
    assert torch.equal(logits(other), logits(model))
    del state[min(state)]
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(state)


@pytest.mark.parametrize("method", METHODS)
def test_the_state_dict_of_a_wrapped_model_is_saved(method, tmp_path):
    model = tiny_model("llama", method)
    compiled = torch.compile(model)
    layer = model.base.model.layers[1]
    model.base.model.layers[1] = torch.compile(layer)  # as accelerate compiles by regions
    model.save_pretrained(tmp_path / "regions", state_dict=compiled.state_dict())
    model.base.model.layers[1] = layer
    model.save_pretrained(tmp_path / "whole", state_dict=compiled.state_dict())
    model.save_pretrained(tmp_path / "ddp", state_dict={f"module.{k}": v for k, v in model.state_dict().items()})
    for folder in ("regions", "whole", "ddp"):
        saved = load_file(tmp_path / folder / "adapter_model.safetensors")
        assert saved.keys() == model.adapter_parameters().keys()
        assert all(torch.equal(saved[name], value) for name, value in model.adapter_parameters().items())
    with pytest.raises(ValueError, match=r"state_dict: base\.model\.layers\.0\.\S+ is missing \(\d+ of the adapter's"):
        model.save_pretrained(tmp_path / "none", state_dict={})
    model.save_pretrained(tmp_path / "rank1", is_main_process=False)
    assert not (tmp_path / "rank1").exists()


# ---- losses made outside of the model ----


@pytest.mark.parametrize("kind", ["dora", "mixlora", "peft"])
def test_label_smoothing_teaches_the_next_token(kind, tmp_path):
    base = tiny_base()
    smoothed = {"label_smoothing_factor": 0.1}

    def loss(model):
        collator = default_data_collator
        return run(Trainer(model, arguments(tmp_path, **smoothed), train_dataset=ROWS, data_collator=collator))["loss"]

    expected = loss(copy.deepcopy(base))
    if kind == "peft":
        minilora_hub.register()
        model = get_peft_model(base, MixLoraPeftConfig(r=4, num_experts=4, top_k=2, task_type="CAUSAL_LM"))
    else:
        model = fresh(kind, base)
    assert loss(model) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("method", ["dora", "mixlora"])
def test_preferences_are_learned_against_what_the_model_was_made_from(method, base_folder, tmp_path):
    """DPO without a reference model: a fresh adapter's is its base, a loaded one's what was loaded."""
    minilora_hub.register()
    pairs = [{"prompt": "t5 t6", "chosen": " t7 t8", "rejected": " t9"}] * 4
    config = tiny_config(method, **({"router_aux_loss_coef": 0.0} if method != "dora" else {}))

    def losses(model):
        settings = arguments(tmp_path, DPOConfig, max_steps=2, learning_rate=1e-2, bf16=False)
        trainer = DPOTrainer(
            model, args=settings, train_dataset=Dataset.from_list(pairs), processing_class=word_tokenizer()
        )
        run(trainer)
        return type(trainer.ref_model), [entry["loss"] for entry in trainer.state.log_history[:2]]

    model = CAUSAL_LM[method].from_base(base_folder, config)
    reference, (first, second) = losses(model)
    assert reference is type(tiny_base())
    assert first == pytest.approx(math.log(2), abs=1e-6)
    assert second < first - 1e-3
    fill_adapter(model)
    model.save_pretrained(tmp_path / "trained")
    reference, (first, second) = losses(AutoModelForCausalLM.from_pretrained(tmp_path / "trained"))
    assert reference is CAUSAL_LM[method]
    assert first == pytest.approx(math.log(2), abs=1e-6)
    assert second < first - 1e-3
