"""A norm of a single row in fewer operations: equal to the base's own, and only where that is the same computation."""

import copy

import pytest
import torch
from tiny import FAMILIES, tiny_base
from torch import nn

from minilora_hub.compare.one_row_norms import speed_up_norms


class Norm(nn.Module):
    """A norm of any form, written out."""

    def __init__(self, form, eps=1e-5):
        super().__init__()
        self.form, self.eps = form, eps
        self.weight = nn.Parameter(torch.linspace(0.5, 2, 24))

    def forward(self, x):
        return self.form(x, self.weight, self.eps)


def rms(x, w, eps):
    return w * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


FORMS = {
    "rms": (rms, True),
    "of 1 + w": (lambda x, w, eps: rms(x, 1 + w, eps), False),
    "less the mean": (lambda x, w, eps: rms(x - x.mean(-1, keepdim=True), w, eps), False),
    "other epsilon": (lambda x, w, eps: rms(x, w, 0.1), False),
    "in groups": (lambda x, w, eps: rms(x.unflatten(-1, (4, 6)), w.view(4, 6), eps).flatten(-2), False),
    "of two": (lambda x, w, eps: (x, w), False),
}


@pytest.mark.parametrize(("form", "is_rms"), FORMS.values(), ids=FORMS)
def test_what_is_an_rms_norm_is_found_by_calling_it(form, is_rms):
    norm = Norm(form)
    speed_up_norms(nn.ModuleList([norm, nn.LayerNorm(24), nn.Linear(24, 24, bias=False), nn.Embedding(5, 24)]))
    assert (type(norm) is not Norm) is is_rms
    assert type(norm).__name__ == "Norm"


def rows(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


CALLS = {
    "one row": (rows(1, 1, 24), True),
    "one row of two axes": (rows(1, 24), True),
    "every other value": (rows(1, 1, 48)[..., ::2], True),
    "zeros": (torch.zeros(1, 1, 24), True),
    "large": (1e30 * rows(1, 1, 24), True),
    "two rows": (rows(2, 1, 24), False),
    "no rows": (rows(0, 1, 24), False),
    "float64": (rows(1, 1, 24).double(), False),
    "bfloat16": (rows(1, 1, 24).bfloat16(), False),
}


@pytest.mark.parametrize(("x", "is_quick"), CALLS.values(), ids=CALLS)
def test_equals_the_norm_itself(monkeypatch, x, is_quick):
    called, plain = [], Norm(lambda *given: called.append(1) or rms(*given))
    expected = plain(x).detach()
    quick = copy.deepcopy(plain)
    speed_up_norms(quick)
    called.clear()
    with torch.no_grad():
        torch.testing.assert_close(quick(x), expected, rtol=1e-5, atol=1e-6)
    assert (not called) is is_quick
    called.clear()
    assert quick(x).requires_grad
    assert called == [1]


def test_a_weight_that_changes_is_seen_and_hooks_are_called():
    norm, seen = Norm(rms), []
    speed_up_norms(norm)
    norm.register_forward_hook(lambda *_: seen.append(1))
    x = rows(1, 1, 24)
    with torch.no_grad():
        before = norm(x)
        norm.weight.mul_(2)
        torch.testing.assert_close(norm(x), 2 * before)
        assert seen == [1, 1]
        norm.double()
        assert norm(x.double()).dtype == torch.float64


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_base(family):
    base = tiny_base(family).eval()
    quick = copy.deepcopy(base)
    speed_up_norms(quick)
    with torch.no_grad():
        ours, expected = (model(torch.tensor([[7]])).logits for model in (quick, base))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
