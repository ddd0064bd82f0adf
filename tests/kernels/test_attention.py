"""The CPU's attention: torch's forward pass to the bit, gradients against float64, and what goes the usual way."""

import pytest
import torch
import torch.nn.functional as F

from deltaw.core.generators import generator
from deltaw.fuse.attention import FastCpuAttention
from deltaw.kernels import attention


def draw(shape, *, seed=0, dtype=torch.bfloat16, strided=False):
    values = torch.randn(shape, generator=generator(seed, "x"))
    if strided:
        # As transformers has it: (batch, T, heads, d) seen with heads first.
        values = values.transpose(1, 2).contiguous().transpose(1, 2)
    return values.to(dtype).requires_grad_()


def counted(monkeypatch):
    calls = []
    own = attention._Attention.apply
    monkeypatch.setattr(attention._Attention, "apply", lambda *args: calls.append(1) or own(*args))
    return calls


def padded(batch, length):
    """Causal, with some rows' last tokens hidden."""
    shown = torch.ones(batch, 1, length, length, dtype=torch.bool).tril_()
    shown[0, :, :, length - length // 3 :] = False
    return shown


def relative(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["causal", "whole", "padded", "flat mask"])
@pytest.mark.parametrize(("batch", "heads", "length", "width"), [(2, 3, 7, 8), (1, 2, 64, 16), (2, 2, 131, 64)])
def test_equals_torch_forwards_and_float64_backwards(monkeypatch, dtype, kind, batch, heads, length, width):
    options = {
        "causal": {"is_causal": True},
        "whole": {},
        "padded": {"attn_mask": padded(batch, length)},
        "flat mask": {"attn_mask": padded(1, length)[0, 0], "scale": 0.15},
    }[kind]
    given = [draw((batch, heads, length, width), seed=s, dtype=dtype, strided=s == 1) for s in range(3)]
    g = draw((batch, heads, length, width), seed=9, dtype=dtype).detach()
    calls = counted(monkeypatch)
    with FastCpuAttention():
        out = F.scaled_dot_product_attention(*given, **options)
    assert calls == [1]
    got = torch.autograd.grad(out, given, g)
    usual = F.scaled_dot_product_attention(*given, **options)
    assert torch.equal(out, usual)
    torchs = torch.autograd.grad(usual, given, g)
    exact = [t.detach().double().requires_grad_() for t in given]
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*exact, **options), exact, g.double())
    for ours, theirs, true in zip(got, torchs, expected, strict=True):
        assert ours.dtype == dtype and relative(ours, true) < 1e-2
        assert relative(ours, true) < 3 * relative(theirs, true) + 1e-3


def test_grouped_queries():
    q, k, v = draw((2, 4, 20, 8)), draw((2, 2, 20, 8), seed=1), draw((2, 2, 20, 8), seed=2)
    with FastCpuAttention():
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    got = torch.autograd.grad(out.float().square().sum(), [q, k, v])
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    true = F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True)
    for ours, expected in zip(got, torch.autograd.grad(true.square().sum(), exact), strict=True):
        assert ours.shape == expected.shape and relative(ours, expected) < 2e-2


def test_a_row_that_sees_nothing_gets_no_gradient():
    given = [draw((1, 2, 9, 8), seed=s) for s in range(3)]
    shown = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril_()
    shown[..., :3, :] = False
    with FastCpuAttention():
        out = F.scaled_dot_product_attention(*given, attn_mask=shown)
    grads = torch.autograd.grad(out[:, :, 3:].sum(), given)
    assert all(torch.isfinite(g).all() for g in grads)
    assert not grads[0][:, :, :3].any() and grads[0][:, :, 3:].any()


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.float32},
        {"dropout_p": 0.5},
        {"attn_mask": torch.zeros(9, 9, dtype=torch.bfloat16)},
        {"length": attention.LONGEST + 1},
        {"grad": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_calls_go_their_usual_way(monkeypatch, change):
    options = {key: value for key, value in change.items() if key in ("dropout_p", "attn_mask")}
    length = change.get("length", 9)
    given = [draw((1, 2, length, 8), seed=s, dtype=change.get("dtype", torch.bfloat16)) for s in range(3)]
    calls = counted(monkeypatch)
    with FastCpuAttention(), torch.set_grad_enabled(change.get("grad", True)):
        torch.random.default_generator.manual_seed(1)
        out = F.scaled_dot_product_attention(*given, **options)
    torch.random.default_generator.manual_seed(1)
    assert torch.equal(out, F.scaled_dot_product_attention(*given, **options)) and not calls
