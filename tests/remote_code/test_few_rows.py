"""Few rows are multiplied in the fastest way: which one is chosen, when, and that the results are those of F.linear."""

import copy
import pickle
import threading

import pytest
import torch
from tiny import CAUSAL_LM, fill_adapter, tiny_base, tiny_config, token_ids
from torch import nn
from torch.nn import functional as F

from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.publish.verify.isolated_process import _environment
from minilora_hub.recording.logits import record
from minilora_hub.remote_code import few_rows
from minilora_hub.remote_code.few_rows import few_rows_linear, plain_products
from minilora_hub.remote_code.linear_layers import FewRowsLinear, speed_up_linears

SHAPE = (320, 256)  # (out, in)
SINGLE = ("_vector", "_blocks")  # not in half precision
LARGE = {"hidden_size": 256, "intermediate_size": 320, "vocab_size": 512}
ONE = token_ids(1, 1)


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch):
    monkeypatch.setattr(few_rows, "_CHOSEN", {})
    monkeypatch.delenv(few_rows.SETTING, raising=False)


@pytest.fixture
def asked(monkeypatch):
    """Every weight for which a way is chosen: (rows, shape). The way that is chosen returns nothing but ones."""
    asked = []

    def choose(count, weight):
        asked.append((count, tuple(weight.shape)))
        return lambda x, weight: torch.ones(*x.shape[:-1], weight.shape[0], dtype=weight.dtype)

    monkeypatch.setattr(few_rows, "_fastest", choose)
    return asked


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the products ----


@pytest.mark.parametrize("way", ["_padded", "_vector", "_blocks", "_transposed", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(), (1,), (1, 1), (2,), (1, 3), (3, 1), (4, 4)])
@torch.no_grad()
def test_every_way_is_the_product(monkeypatch, way, dtype, bias, leading):
    one_row = torch.Size(leading).numel() == 1
    if way != "linear" and (one_row == (way == "_transposed") or (way in SINGLE and dtype == torch.bfloat16)):
        return  # not offered for this number of rows, or dtype
    monkeypatch.setattr(few_rows, "_fastest", lambda *_: getattr(F if way == "linear" else few_rows, way))
    monkeypatch.setattr(few_rows.torch, "get_num_threads", lambda: 2)
    x, weight, b = randn(*leading, 256).to(dtype), randn(*SHAPE, seed=1).to(dtype), randn(320, seed=2).to(dtype)
    exact = x.double() @ weight.double().T + (b.double() if bias else 0)
    out = few_rows_linear(x, weight, b if bias else None)
    assert out.dtype == dtype
    assert out.is_contiguous()
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(out.double(), exact, **tolerance)
    every_other = x.repeat_interleave(2, dim=-1)[..., ::2]
    torch.testing.assert_close(few_rows_linear(every_other, weight, b if bias else None), out, **tolerance)


def test_buffers_of_a_row_are_each_threads_own():
    """A result stays as it is when the next product is computed, here or in another thread."""
    weight, wrong = randn(*SHAPE), []

    def multiply(seed):
        kept = []
        with torch.inference_mode(seed % 2 == 0), torch.no_grad():
            for step in range(200):
                x = randn(1, 1, SHAPE[1], seed=seed + step)
                kept.append((few_rows._padded(x, weight), x))
        wrong.extend(seed for out, x in kept if (out - F.linear(x, weight)).abs().max() > 1e-3)

    threads = [threading.Thread(target=multiply, args=(1000 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---- the choice ----


@pytest.fixture
def clock(monkeypatch):
    """Seconds that each way takes, to be filled in; a list has those of each call in turn."""
    now, seconds = [0.0], {}

    def taking(name, way):
        def timed(*arguments):
            took = seconds[name]
            now[0] += took.pop(0) if isinstance(took, list) else took
            return way(*arguments)

        return timed

    for module, name in (
        (few_rows.F, "linear"),
        (few_rows, "_padded"),
        (few_rows, "_vector"),
        (few_rows, "_blocks"),
        (few_rows, "_transposed"),
    ):
        monkeypatch.setattr(module, name, taking(name, getattr(module, name)))
    monkeypatch.setattr(few_rows.time, "perf_counter", lambda: now[0])
    return seconds


@pytest.mark.parametrize(
    ("count", "seconds", "expected"),
    [
        (1, {"linear": 10, "_padded": 5, "_vector": 9}, "_padded"),
        (1, {"linear": 10, "_padded": 8, "_vector": 7}, "_vector"),
        (1, {"linear": 10, "_padded": 9.5, "_vector": 9.1}, "linear"),  # not clearly faster
        (1, {"linear": 10, "_padded": 30, "_vector": 20}, "linear"),
        (1, {"linear": 10, "_padded": 30, "_vector": 20, "_blocks": 6}, "_blocks"),
        (4, {"linear": 10, "_transposed": 8}, "_transposed"),
        (4, {"linear": 10, "_transposed": 12}, "linear"),
        # the first round warms up, and another process may interrupt a call
        (4, {"linear": 10, "_transposed": [99, 8, 99, 8]}, "_transposed"),
        (4, {"linear": [99, 10, 99, 10], "_transposed": 10}, "linear"),
    ],
)
@torch.no_grad()
def test_the_fastest_way_is_chosen(clock, monkeypatch, count, seconds, expected):
    monkeypatch.setattr(few_rows.torch, "get_num_threads", lambda: 2)
    clock |= {"_blocks": 10} | copy.deepcopy(seconds)
    chosen = few_rows._fastest(count, randn(*SHAPE))
    assert chosen is getattr(F if expected == "linear" else few_rows, expected)


@pytest.mark.parametrize(
    ("height", "threads", "expected"), [(320, 1, 1), (320, 2, 2), (321, 2, 3), (320, 3, 4), (320, 7, 8), (331, 4, 1)]
)
def test_weights_are_cut_into_equal_blocks(height, threads, expected):
    assert few_rows._count_blocks(height, threads) == expected


@torch.no_grad()
def test_blocks_are_not_offered_on_one_thread(clock, monkeypatch):
    """There F.linear reads the weight as fast."""
    monkeypatch.setattr(few_rows.torch, "get_num_threads", lambda: 1)
    clock |= {"linear": 10, "_padded": 10, "_vector": 10}  # no time for blocks: to take one fails
    assert few_rows._fastest(1, randn(*SHAPE)) is F.linear


@torch.no_grad()
def test_the_choice_is_made_once_for_each_kind_of_product(asked):
    weight, threads = randn(*SHAPE), torch.get_num_threads()
    for rows in (*range(1, few_rows.MOST_ROWS + 2), 1, 2, 3):
        few_rows_linear(randn(rows, 256), weight)
    assert [count for count, _ in asked] == [1, 2, 3, 4, 5, 6, 7, 8, 16]
    few_rows_linear(randn(1, 256), randn(*SHAPE, seed=3))  # another weight of the same shape
    assert len(asked) == 9
    few_rows_linear(randn(1, 320), randn(256, 320))
    few_rows_linear(randn(1, 256).double(), weight.double())
    try:
        torch.set_num_threads(threads + 1)
        few_rows_linear(randn(1, 256), weight)
    finally:
        torch.set_num_threads(threads)
    assert len(asked) == 12


@torch.no_grad()
def test_weights_are_timed_from_memory(monkeypatch):
    """One weight alone would lie in a cache."""
    layers, seen = nn.ModuleList(nn.Linear(256, 320) for _ in range(3)), []
    speed_up_linears(layers)
    padded = few_rows._padded
    monkeypatch.setattr(few_rows, "_padded", lambda row, weight: seen.append(id(weight)) or padded(row, weight))
    few_rows._fastest(1, layers[0].weight)
    assert len(set(seen)) >= 3
    held = len(few_rows._WEIGHTS)
    del layers
    assert len(few_rows._WEIGHTS) <= held - 3


@torch.no_grad()
def test_plain_products(asked, monkeypatch):
    x, weight = randn(1, 256), randn(*SHAPE)
    with plain_products():
        assert torch.equal(few_rows_linear(x, weight), F.linear(x, weight))
    monkeypatch.setenv(few_rows.SETTING, "plain")
    assert torch.equal(few_rows_linear(x, weight), F.linear(x, weight))
    monkeypatch.setenv(few_rows.SETTING, "fast")
    with pytest.raises(ValueError, match=r"MINILORA_PRODUCTS='fast': must be 'plain', or not set"):
        few_rows_linear(x, weight)
    assert asked == []
    monkeypatch.delenv(few_rows.SETTING)
    assert torch.equal(few_rows_linear(x, weight), torch.ones(1, 320))


# ---- where F.linear stays ----


class Holder(torch.Tensor):
    """A weight that holds its values in a form of its own, as a quantised one does."""


def with_a_hook(layer, x):
    layer.register_forward_hook(lambda *_: None)
    return layer(x)


def with_its_forward_replaced(layer, x):
    layer.forward = layer.forward
    return layer(x)


def under_autocast(layer, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return layer(x)


def compiled(layer, x):
    return torch.compile(layer, backend="eager", fullgraph=True)(x)


def with_gradients(layer, x):
    with torch.enable_grad():
        return layer(x).detach()


def another_weight(make):
    def call(layer, x):
        layer.weight = nn.Parameter(make(layer.weight.detach()), requires_grad=False)
        return layer(x)

    return call


CALLS = {
    "hook": with_a_hook,
    "replaced forward": with_its_forward_replaced,
    "training": lambda layer, x: layer.train()(x),
    "autocast": under_autocast,
    "torch.compile": compiled,
    "autograd": with_gradients,
    "transposed weight": another_weight(lambda w: w.T.contiguous().T),
    "another kind of weight": another_weight(lambda w: w.as_subclass(Holder)),
    "parametrised": lambda layer, x: torch.nn.utils.parametrizations.weight_norm(layer)(x),
    "many rows": lambda layer, x: layer(x.expand(few_rows.MOST_ROWS + 1, -1)),
    "no rows": lambda layer, x: layer(x[:0]),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@torch.no_grad()
def test_f_linear_stays(asked, call):
    layer = nn.Linear(256, 320).eval()
    model = nn.ModuleList([layer])
    speed_up_linears(model)
    assert type(layer) is FewRowsLinear
    expected = copy.deepcopy(layer)
    expected.__class__ = nn.Linear
    x = randn(1, 256)
    assert torch.equal(call(layer, x), call(expected, x))
    assert asked == []


def test_small_weights_keep_it(asked):
    with torch.no_grad():
        few_rows_linear(randn(1, 128), randn(511, 128))
    assert asked == []


# ---- a model with an adapter ----


def large_model(method, **changes):
    model = CAUSAL_LM[method].from_base(tiny_base(**LARGE), tiny_config(method, **changes))
    fill_adapter(model)
    return model.eval()


@pytest.mark.parametrize(
    ("method", "targets"),
    [("dora", ["q_proj"]), ("dora", "all-linear"), ("mixlora", ["up_proj"]), ("mixlora", "all-linear")],
)
def test_every_linear_of_the_base_is_reached(asked, method, targets):
    model = large_model(method, target_modules=targets)
    with torch.no_grad():
        model(ONE)
    assert set(asked) == {(1, (256, 256)), (1, (320, 256)), (1, (256, 320)), (1, (512, 256))}


@pytest.mark.parametrize("method", ["dora", "mixlora", "mixdora"])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_logits_are_those_of_plain_products(monkeypatch, method, rows):
    monkeypatch.setattr(few_rows, "_fastest", lambda n, _: few_rows._padded if n == 1 else few_rows._transposed)
    model, ids = large_model(method), token_ids(rows, 1)
    with torch.no_grad():
        ours = model(ids).logits
        with plain_products():
            plain = model(ids).logits
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-3 * plain.abs().max().item())


def test_unload_gives_back_the_base_as_it_was(tmp_path):
    base = tiny_base(**LARGE)
    classes = {name: type(module) for name, module in base.named_modules()}
    tensors = {name: tensor.data_ptr() for name, tensor in base.state_dict().items()}
    model = CAUSAL_LM["dora"].from_base(base, tiny_config("dora", target_modules=["q_proj"]))
    assert isinstance(base.lm_head, nn.Linear)
    inside = {name.replace(".base_layer", "") for name in base.state_dict()}
    assert tensors.keys() <= inside
    model.save_base(tmp_path)  # for which the adapter leaves the base and comes back
    assert type(base.lm_head) is type(base.model.layers[0].self_attn.q_proj.base_layer) is FewRowsLinear
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.base))):
        assert type(copied.get_output_embeddings()) is FewRowsLinear
    assert model.unload() is base
    assert {name: type(module) for name, module in base.named_modules()} == classes
    assert {name: tensor.data_ptr() for name, tensor in base.state_dict().items()} == tensors


def test_the_bank_uses_the_same_products(asked):
    bank = AdapterBank(tiny_base(**LARGE))
    with torch.inference_mode(), bank.rows([None]):
        bank.model(ONE)
    assert set(asked) == {(1, (256, 256)), (1, (320, 256)), (1, (256, 320)), (1, (512, 256))}


# ---- results that are equal in every process ----


def test_recorded_logits_have_plain_products(asked):
    model = large_model("mixlora")
    recorded = record(model, [[5, 6, 7]])
    with torch.no_grad(), plain_products():
        top = model(torch.tensor([[5, 6, 7]])).logits[0, -1].topk(32)
    assert recorded.top_tokens == (tuple(top.indices.tolist()),)
    assert asked == []


def test_so_has_the_process_that_verifies_them(tmp_path):
    assert _environment(tmp_path)[few_rows.SETTING] == "plain"
