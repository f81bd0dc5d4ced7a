"""Personal adapters: votes as pairs, DPO against TRL's trainer, and what of the votes leaves the machine."""

from __future__ import annotations

import copy
import hashlib
import math
import random
from dataclasses import make_dataclass, replace

import pytest
import torch
from tiny_training import SHORT, preferring_long, randomized, train_until, write_votes
from transformers import AutoTokenizer

from minilora_hub import MixLoraConfig, MixLoraForCausalLM
from minilora_hub.errors import DataError, TrainingError, TrainingInterrupted
from minilora_hub.publish.push.build import build
from minilora_hub.training.lora_model import LoraConfig, LoraForCausalLM
from minilora_hub.training.loss_terms import Step, Term, recorded
from minilora_hub.training.preference import Dpo
from minilora_hub.training.run import train
from minilora_hub.training.settings import SETTINGS_FILE, make_settings
from minilora_hub.training.tokens import IGNORED, Encoder
from minilora_hub.training.votes import ALL_BAD, TIE, Answer, VotePairs

WEIGHTS = "adapter_model.safetensors"
RUN = {"method": "lora", **SHORT, "record": False, "progress": False}


@pytest.fixture(scope="module")
def tokenizer(base):
    return AutoTokenizer.from_pretrained(base)


def pairs_of(votes, tokenizer, tmp_path) -> VotePairs:
    """Read votes as a training does."""
    pairs = VotePairs(write_votes(tmp_path / "pairs.jsonl", votes), Encoder(tokenizer, max_length=64))
    for number, vote in enumerate(votes):
        pairs.encode(pairs.check(f"pairs.jsonl:{number + 1}", vote.to_dict()))
    return pairs


# ---- what is read ----


def test_votes_that_prefer_nothing_are_counted_and_equal_answers_are_one(tokenizer, tmp_path):
    first, *rest = preferring_long(5)
    other = Answer("no", True)
    votes = [
        replace(first, answers=(*first.answers, other, other)),  # two different answers beside the chosen one
        first,  # the same id: it was stored twice
        replace(rest[0], choice=TIE),
        replace(rest[1], choice=ALL_BAD),
        replace(rest[2], answers=(other, other)),
        rest[3],
    ]
    pairs = pairs_of(votes, tokenizer, tmp_path)
    assert pairs.described() == "2 votes with a choice, 3 pairs; skipped: 1 all bad, 1 equal answers, 1 tie"
    said = [[tokenizer.decode(one.input_ids) for one in pair.rejected] for pair in pairs.pairs.values()]
    prompt = "<|system|>Be frank.<|end|><|user|>Secret 0?<|end|><|assistant|>"
    assert said[0] == [f"{prompt}yes<|end|>", f"{prompt}no<|end|>"]
    (_, chosen) = [tokenizer.decode(pair.chosen.input_ids) for pair in pairs.pairs.values()]
    assert chosen == "<|user|>Secret 4?<|end|><|assistant|>yes!!<|end|>".replace(
        "<|user|>", "<|system|>Be frank.<|end|><|user|>"
    )


def test_the_same_vote_cast_twice_is_one_pair(tokenizer, tmp_path):
    vote = preferring_long(2)[1]
    pairs = pairs_of([vote, replace(vote, id="again")], tokenizer, tmp_path)
    assert pairs.described() == "2 votes with a choice, 1 pair"
    assert [len(pair.rejected) for pair in pairs.pairs.values()] == [1]


def test_an_answer_without_a_token_is_nothing_to_choose_or_to_compare(tokenizer, tmp_path):
    vote = preferring_long(2)[1]
    votes = [
        replace(vote, answers=(Answer("yes", True), Answer("", False))),
        replace(vote, id="other", answers=(Answer("", False), Answer("yes", True), Answer("no", True)), choice=2),
    ]
    pairs = pairs_of(votes, tokenizer, tmp_path)
    assert pairs.described() == "1 vote with a choice, 1 pair; skipped: 1 empty"


def test_a_system_prompt_is_written_as_the_page_does_where_there_is_no_template(tokenizer, tmp_path):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    (pair,) = pairs_of(preferring_long(1), plain, tmp_path).pairs.values()
    assert tokenizer.decode(pair.chosen.input_ids).startswith("Be frank.\n\nSecret 0?yes!!")


def test_an_answer_that_was_cut_off_is_not_learned_to_end_there(tokenizer, tmp_path):
    cut, whole = (
        pairs_of(
            [replace(preferring_long(2)[1], answers=(Answer("yes", True), Answer("no", ended)))], tokenizer, tmp_path
        )
        for ended in (False, True)
    )
    (cut,), (whole,) = cut.pairs.values(), whole.pairs.values()
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert whole.chosen.input_ids == [*cut.chosen.input_ids, end]
    assert whole.chosen.labels == [*cut.chosen.labels, end]
    assert cut.rejected == whole.rejected
    assert [label for label in cut.chosen.labels if label != IGNORED] == tokenizer("no", add_special_tokens=False)[
        "input_ids"
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"schema_version": 1, "candidates": []}', r"votes\.jsonl:1: is a vote without texts"),
        ('{"schema_version": 1, "id": "a"}', r"votes\.jsonl:1: vote: .* is missing"),
        ('{"schema_version": 1, "id": "a", "ti', r"votes\.jsonl:1: is not JSON"),
    ],
)
def test_a_line_that_is_no_vote_is_named(line, message, base, tmp_path):
    write_votes(tmp_path / "votes.jsonl", preferring_long(12))
    rest = (tmp_path / "votes.jsonl").read_text()
    (tmp_path / "votes.jsonl").write_text(line + "\n" + rest)
    said = RUN | {"base": base, "from_votes": str(tmp_path / "votes.jsonl")}
    with pytest.raises(DataError, match=message):
        train(tmp_path / "out", **said)
    plan = train(tmp_path / "out", dry_run=True, skip_bad_rows=True, **said).plan
    assert plan.votes == "12 votes with a choice, 12 pairs"
    assert dict(plan.lines())["votes"] == plan.votes
    assert not (tmp_path / "out").exists()


def test_too_few_votes_say_how_many_are_needed(base, tmp_path):
    votes = write_votes(tmp_path / "votes.jsonl", [*preferring_long(9), replace(preferring_long(10)[9], choice=TIE)])
    with pytest.raises(
        DataError, match="9 votes with a choice, 9 pairs; skipped: 1 tie; at least 10 votes with a choice are needed"
    ):
        train(tmp_path / "out", base=base, from_votes=votes, **RUN)
    with pytest.raises(DataError, match="no such file; minilora demo --allow-training writes one"):
        train(tmp_path / "out", base=base, from_votes=str(tmp_path / "none"), **RUN)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"data": "rows.jsonl"}, "goes without data"),
        ({"method": "rslora"}, "from_votes='v.jsonl': needs one of the methods lora, dora"),
        ({"batching": "packed"}, "batching='packed': with --from-votes"),
        ({"loss_on": "all"}, "loss_on='all': with --from-votes"),
        ({"task": "text-classification"}, "goes without --from-votes"),
        ({"from_votes": None, "data": "rows.jsonl", "objective": ["dpo"]}, "dpo needs --from-votes"),
    ],
)
def test_settings_that_cannot_be(said, message):
    with pytest.raises(TrainingError, match=message):
        make_settings({"method": "lora", "base": "embedded", "from_votes": "v.jsonl"} | said)


def test_dpo_is_added_unless_it_is_given():
    settings = [
        make_settings({"method": "lora", "base": "b", "from_votes": "v", "objective": o}) for o in ([], ["dpo:beta=1"])
    ]
    assert [one.objective for one in settings] == [("dpo",), ("dpo:beta=1",)]


def test_held_out_votes_have_prompts_of_their_own(base, tmp_path):
    """The same prompt is asked again and again: it is either trained on or held out."""
    votes = [replace(vote, id=f"{vote.id}-{copy}") for vote in preferring_long(6) for copy in range(3)]
    random.Random(0).shuffle(votes)
    said = RUN | {"base": base, "from_votes": write_votes(tmp_path / "votes.jsonl", votes)}
    plan = train(tmp_path / "out", dry_run=True, validation=0.3, **said).plan
    assert (plan.rows, plan.validation_rows) == (12, 6)
    same = [replace(vote, prompt="Why?", system="") for vote in votes]
    write_votes(tmp_path / "votes.jsonl", same)
    with pytest.raises(DataError, match=r"holds out all 18 rows \(of 1 different prompts\)"):
        train(tmp_path / "out", dry_run=True, validation=0.3, **said)


# ---- DPO ----


@pytest.mark.parametrize("kind", ["lora", "mixlora"])
def test_dpo_is_that_of_trls_trainer(kind, base, tokenizer, tmp_path):
    """Each pair's loss and all gradients, on a model that has moved away from its reference."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    made = {
        "lora": lambda: LoraForCausalLM.from_base(base, LoraConfig(r=2, lora_dropout=0.0)),
        "mixlora": lambda: MixLoraForCausalLM.from_base(base, MixLoraConfig(r=2, num_experts=3, lora_dropout=0.0)),
    }
    model = randomized(made[kind](), 1)
    votes = [replace(vote, answers=tuple(Answer(a.text, True) for a in vote.answers)) for vote in preferring_long(4)]
    rows = [
        {
            "prompt": [{"role": "system", "content": vote.system}] * bool(vote.system)
            + [{"role": "user", "content": vote.prompt}],
            "chosen": [{"role": "assistant", "content": vote.answers[1].text}],
            "rejected": [{"role": "assistant", "content": vote.answers[0].text}],
        }
        for vote in votes
    ]
    arguments = DPOConfig(
        str(tmp_path / "trl"),
        beta=0.3,
        precompute_ref_log_probs=True,
        router_aux_loss_coef=0.0,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        activation_checkpointing=False,
        bf16=False,  # otherwise the reference is computed in bfloat16
    )
    theirs = DPOTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    pairs = pairs_of(votes, tokenizer, tmp_path)
    values = {"beta": 0.3, "weight": 1.0, "labels": 0.0}
    dpo = Dpo(values, pairs, False, tokenizer.pad_token_id)
    dpo.start(model, shown=False)
    randomized(model, 2).train()

    def ours(chosen):
        batch = dpo._collate([{"input_ids": one.input_ids, "labels": one.labels} for one in chosen])
        with recorded(model) as forward:
            model(**batch, use_cache=False, fused_lm_head=True)
        return dpo(Step(model, batch, forward.hidden, (0, 0), forward.log_probs)).value

    chosen = [pair.chosen for pair in pairs.pairs.values()]
    features = [theirs.train_dataset[index] for index in range(len(rows))]
    for one, feature in zip(chosen, features, strict=True):
        assert one.input_ids == feature["prompt_ids"] + feature["chosen_ids"]
        expected = theirs._compute_loss(model, theirs.data_collator([feature]), False)
        torch.testing.assert_close(ours([one]), expected, rtol=1e-4, atol=1e-5)
        assert abs(float(expected.detach()) - 0.6931) > 1e-3
    gradients = []
    for loss in (ours(chosen), theirs._compute_loss(model, theirs.data_collator(features), False)):
        model.zero_grad()
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.adapter_parameters().items() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-5)


def test_several_answers_beside_the_chosen_one_count_as_their_mean(base, tokenizer, tmp_path):
    vote = preferring_long(2)[1]
    others = (Answer("yes", True), Answer("no", True), Answer("never", False))
    votes = [replace(vote, answers=(*others, Answer("of course", True)), choice=3)]
    alone = [replace(vote, answers=(other, Answer("of course", True)), choice=1) for other in others]
    model = LoraForCausalLM.from_base(base, LoraConfig(r=2, lora_dropout=0.0))
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model)
    found = []
    terms = [
        Dpo({"beta": 0.3, "weight": 1.0, "labels": 1.0}, pairs_of(some, tokenizer, tmp_path), False, 0)
        for some in (votes, *([one] for one in alone))
    ]
    for dpo in terms:
        dpo.start(model, shown=False)
    randomized(model, 3)
    for dpo in terms:
        ((_, pair),) = dpo._pairs.items()
        batch = dpo._collate([{"input_ids": pair.chosen.input_ids, "labels": pair.chosen.labels}])
        with recorded(model) as forward:
            model(**batch, use_cache=False, fused_lm_head=True)
        found.append(dpo(Step(model, batch, forward.hidden, (0, 0), forward.log_probs)).value)
    torch.testing.assert_close(found[0], torch.stack(found[1:]).mean(), rtol=1e-5, atol=1e-6)


# ---- runs ----


@pytest.mark.parametrize("method", ["lora", pytest.param("mixlora", marks=pytest.mark.slow)])
def test_a_preference_is_learned_and_nothing_of_it_is_published(method, base, tmp_path):
    votes = write_votes(tmp_path / "my-votes.jsonl", preferring_long(16))
    said = RUN | {"method": method, "base": base, "from_votes": votes, "max_steps": 16, "save_every": 8}
    said |= {"num_experts": 2} if method == "mixlora" else {}
    result = train(tmp_path / "out", validation=0.25, **said)
    assert (result.pairs.votes, result.pairs.pairs) == (4, 4)
    assert (result.pairs.before, result.pairs.after) == (0, 4)
    # The validation loss is that of the labels and of the pairs, so it ends below what it was.
    header, *lines = (tmp_path / "out" / "loss.csv").read_text().splitlines()
    table = [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]
    assert float(table[0]["dpo"]) == pytest.approx(0.6931, abs=1e-3)
    assert float(table[-1]["dpo"]) < 0.5
    validated = [float(row["validation_loss"]) for row in table if row["validation_loss"]]
    assert result.validation_loss == min(validated) == validated[-1]
    where = {"base_id": "org/base", "base_model": base}
    built = build(tmp_path / "out", tmp_path / "built", repo_id="me/out", **where).folder
    card = (built / "README.md").read_text(encoding="utf-8")
    assert "- **votes**: 12 items" in card
    assert "In 0 of 4 held-out pairs the chosen answer was the likelier one before the training, in 4 after it." in card
    published = b"".join(path.read_bytes() for path in built.rglob("*") if path.is_file())
    for private in (b"Secret", b"Be frank", b"yes!!", b"my-votes", str(tmp_path).encode()):
        assert private not in published


@pytest.mark.slow
def test_runs_from_votes_resume_to_the_same_bytes_from_the_same_votes_only(base, tmp_path, monkeypatch):
    votes = write_votes(tmp_path / "votes.jsonl", preferring_long(12))
    said = RUN | {"base": base, "from_votes": votes, "max_steps": 5, "micro_batch_size": 2, "lora_dropout": 0.1}
    train(tmp_path / "whole", **said)
    train_until(3, monkeypatch, tmp_path / "cut", **said)
    changed = [replace(vote, answers=(Answer("perhaps", True), vote.answers[1])) for vote in preferring_long(12)]
    write_votes(tmp_path / "votes.jsonl", changed)  # the chosen answers are the same
    with pytest.raises(TrainingError, match="the data has changed"):
        train(tmp_path / "cut", resume=True, record=False)
    write_votes(tmp_path / "votes.jsonl", preferring_long(12))
    train(tmp_path / "cut", resume=True, record=False)
    digests = {hashlib.sha256((tmp_path / name / WEIGHTS).read_bytes()).hexdigest() for name in ("whole", "cut")}
    assert len(digests) == 1


@pytest.mark.slow
def test_a_quantised_base_learns_a_preference(base, tmp_path):
    votes = write_votes(tmp_path / "votes.jsonl", preferring_long(16))
    said = RUN | {"base": base, "from_votes": votes, "quantize": "nf4", "max_steps": 16, "save_every": 8}
    pairs = train(tmp_path / "out", validation=0.25, **said).pairs
    assert (pairs.pairs, pairs.before, pairs.after) == (4, 0, 4)


def test_a_preference_that_is_not_finite_stops_the_run(base, tmp_path, monkeypatch):
    votes = write_votes(tmp_path / "votes.jsonl", preferring_long(10))
    monkeypatch.setattr(Dpo, "__call__", lambda self, step: Term(torch.tensor(math.nan)))
    # The plan measures a step, too: without one, it is the run that stops.
    unmeasured = make_dataclass("Unmeasured", ["ranks", "init"])(None, None)
    monkeypatch.setattr("minilora_hub.training.run.make_plan", lambda *args: unmeasured)
    with pytest.raises(TrainingError, match=r"the loss became nan in step 1 on votes\.jsonl"):
        train(tmp_path / "out", **RUN | {"base": base, "from_votes": votes})


def test_ctrl_c_before_the_first_step_can_be_resumed(base, tmp_path, monkeypatch):
    votes = write_votes(tmp_path / "votes.jsonl", preferring_long(10))
    said = RUN | {"base": base, "from_votes": votes, "max_steps": 2, "save_every": 2}
    train(tmp_path / "whole", **said)
    scored = Dpo._log_probs

    def interrupted(self, model, examples):
        if (tmp_path / "cut" / SETTINGS_FILE).is_file():  # after the plan
            raise KeyboardInterrupt
        return scored(self, model, examples)

    with monkeypatch.context() as once:
        once.setattr(Dpo, "_log_probs", interrupted)
        message = r"stopped before a step: minilora train --resume --out \S+cut continues"
        with pytest.raises(TrainingInterrupted, match=message) as stopped:
            train(tmp_path / "cut", **said)
    assert stopped.value.exit_code == 130
    train(tmp_path / "cut", resume=True, record=False)
    whole, cut = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("whole", "cut"))
    assert whole == cut


@pytest.mark.slow
def test_validation_rows_of_ones_own_are_validated_by_their_labels(base, tmp_path):
    votes = write_votes(tmp_path / "votes.jsonl", preferring_long(12))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Item?", "completion": "red"}\n')
    said = RUN | {"base": base, "from_votes": votes, "validation_data": str(tmp_path / "rows.jsonl"), "max_steps": 2}
    result = train(tmp_path / "out", **said)
    assert result.pairs is None
    assert result.validation_loss > 0
