"""What an engine answered, and what generate() answers, to be compared."""

import tiny_stand_ins as tiny
import torch
from peft import PeftModel

from minilora_hub import DoraForCausalLM, MixLoraForCausalLM

PROMPT = "Why is the sky blue?"


def alone(folder):
    """An adapter folder as its own model, by transformers and PEFT."""
    if (folder / "adapter_config.json").is_file():
        return PeftModel.from_pretrained(tiny.tiny_llama(), folder).eval()
    if "auto_map" not in (folder / "config.json").read_text():
        return tiny.tiny_llama()
    kinds = {"mix": MixLoraForCausalLM, "dora": DoraForCausalLM}
    return kinds[folder.name].from_pretrained(folder, base_model=tiny.tiny_llama()).eval()


def answers(engine, sampling, prompt=PROMPT):
    """Run to the end: the updates of each row."""
    updates = list(engine.stream(prompt, sampling))
    return [[u for u in updates if u.row == index] for index in range(len(engine.columns))]


def tokens(updates):
    """The token ids in a column's updates."""
    return [u.token_id for u in updates if u.token_id is not None]


def generated(engine, model, **settings):
    """The same answer by `generate`, and its scores."""
    ids = torch.tensor([engine.prompt_ids(PROMPT)])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, output_logits=True, **settings
    )
    return out.sequences[0, ids.shape[1] :].tolist(), out.logits


def same_up_to_a_tie(ours, theirs, logits, margin=1e-4):
    """Whether the tokens agree up to the first step whose two best logits are closer than `margin`."""
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if mine != other:
            best = logits[step][0].topk(2).values
            return (best[0] - best[1]).item() < margin
    return True
