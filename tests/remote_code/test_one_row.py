"""A single row, as in decoding, goes past module calls and through vector products: nothing else may differ."""

import pytest
import torch
from tiny import CAUSAL_LM, METHODS, fill_adapter, logits, mixtures, tiny_base, tiny_config, tiny_model, token_ids
from torch import nn

from minilora_hub.remote_code.adapted_linear import AdaptedLinear

ONE = token_ids(1, 1)


def first_linear(model):
    return next(module for module in model.modules() if isinstance(module, AdaptedLinear))


@torch.no_grad()
def row_of_many(layer, x):
    """What the layer gives for x, (1, 1, in), when it is one of several rows, which takes the general path."""
    return layer(torch.cat([x, torch.ones_like(x)], dim=1))[:, :1]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "phi"])  # with biases, and linears that are none
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_row_alone_equals_itself_among_others(family, method, dtype):
    model = tiny_model(family, method).to(dtype)
    seen = []
    for module in model.modules():
        if isinstance(module, AdaptedLinear) or type(module).__name__ == "MixtureOfLoraExperts":
            module.register_forward_hook(lambda layer, args, out: seen.append((layer, args[0], out)))
    logits(model, ONE)
    # (routers compute in float32 everywhere)
    calls, tolerance = list(seen), {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-5}[dtype]
    assert calls
    for layer, x, out in calls:
        among = row_of_many(layer, x.reshape(1, 1, -1))
        assert out.dtype == dtype
        assert (out.flatten() - among.flatten()).abs().max() <= tolerance * among.abs().max()


@pytest.mark.parametrize("shape", [(32,), (1, 32), (1, 1, 32), (1, 1, 1, 32)])
def test_shape_of_a_row(shape):
    layer = first_linear(tiny_model("llama", "dora"))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = layer(x)
        wide = layer(torch.stack([x.flatten()] * 3))[0]
    assert out.shape == (*shape[:-1], layer.out_features)
    torch.testing.assert_close(out.flatten(), wide)
    with torch.no_grad():  # every other value of a row twice as long
        torch.testing.assert_close(layer(x.repeat_interleave(2, dim=-1)[..., ::2]), out)


def listen_with_a_hook(layer, called):
    return layer.register_forward_hook(lambda *_: called.append("hook"))


def listen_before(layer, called):
    return layer.register_forward_pre_hook(lambda *_: called.append("pre-hook"))


def listen_to_all(layer, called):
    def note(module, *_):
        if module is layer:
            called.append("global hook")

    return nn.modules.module.register_module_forward_hook(note)


def replace_forward(layer, called):
    plain = layer.forward

    def forward(x):
        called.append("forward")
        return plain(x)

    layer.forward = forward


@pytest.mark.parametrize("listen", [listen_with_a_hook, listen_before, listen_to_all, replace_forward])
@pytest.mark.parametrize("method", METHODS)
def test_hooks_on_the_base_layer_are_called(listen, method):
    model = tiny_model("llama", method)
    mixture = next(iter(mixtures(model)), None)
    layer = first_linear(model).base_layer if mixture is None else mixture.base_block.up_proj
    expected, called = logits(model, ONE), []
    handle = listen(layer, called)
    assert torch.equal(logits(model, ONE), expected)
    if handle is not None:
        handle.remove()
    assert len(called) == 1


def test_a_subclass_of_linear_is_called():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    adapted = first_linear(tiny_model("llama", "dora"))
    plain = adapted.base_layer
    adapted.base_layer = Doubled(plain.in_features, plain.out_features, bias=False)
    adapted.base_layer.weight = plain.weight
    adapted.update.magnitude = None
    x = torch.randn(1, 1, plain.in_features)
    with torch.no_grad():
        torch.testing.assert_close(adapted(x), row_of_many(adapted, x))


@pytest.mark.parametrize("method", METHODS)
def test_every_change_of_a_weight_is_seen(method):
    """In place, replaced, by .data, by load_state_dict, and by a cast and back."""
    model = tiny_model("llama", method)
    other = CAUSAL_LM[method].from_base(tiny_base(), tiny_config(method))
    fill_adapter(other, seed=7)

    def fresh():
        """The logits of a model that never ran before."""
        twin = CAUSAL_LM[method].from_base(tiny_base(), tiny_config(method))
        twin.load_state_dict(model.state_dict())
        return logits(twin.eval(), ONE)

    def in_place():
        with torch.no_grad():
            for parameter in model.adapter_parameters().values():
                parameter.mul_(1.25)

    def by_data():
        for parameter in model.adapter_parameters().values():
            parameter.data = parameter.data * 0.5

    def replaced():
        for module in list(model.modules()):
            for name in ("lora_A", "lora_B"):
                if name in module._parameters:
                    setattr(module, name, nn.Parameter(getattr(module, name).detach() * -1.5))
                    module.lora_B = nn.Parameter(module.lora_B.detach() * 0.5)

    def base_weight():
        with torch.no_grad():
            first_linear(model).base_layer.weight.mul_(1.0)

    for change in (in_place, by_data, replaced, base_weight, lambda: model.load_state_dict(other.state_dict())):
        before = logits(model, ONE)
        change()
        after = logits(model, ONE)
        torch.testing.assert_close(after, fresh(), rtol=0, atol=1e-5)
        assert change is base_weight or (after - before).abs().max() > 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_inference_mode_and_no_grad_agree(method):
    model = tiny_model("llama", method)
    with torch.inference_mode():
        inside = model(ONE).logits.clone()
    assert torch.equal(inside, logits(model, ONE))
    with torch.enable_grad():
        torch.testing.assert_close(model(ONE).logits, inside, rtol=0, atol=1e-5)
