"""Directions of inputs, and what they make up for of a weight's rounding."""

import pytest
import torch
from torch import nn

from deltaw.core.generators import generator
from deltaw.core.protocols import LowRank
from deltaw.fuse import group as group_module
from deltaw.fuse.directions import DIRECTIONS, SHARE, directions
from deltaw.fuse.group import Group
from deltaw.fuse.linears import Fused
from deltaw.fuse.narrow import narrowed
from deltaw.fuse.store import Store
from deltaw.kernels import fp8
from deltaw.models.sites import SiteWeight


def inputs(rows, columns, *, seed="x"):
    """Most of it in few directions, some columns large, as activations are."""
    draw = generator(0, seed)
    mixed = torch.randn(columns, columns, generator=generator(0, "mix")) * torch.logspace(0, -3, columns)[:, None]
    return torch.randn(rows, columns, generator=draw) @ mixed * (1 + 20 * (torch.arange(columns) % 50 == 3))


def product(x, W, along):
    """[x, c] [W8, V]^T in 8 bits, and with x as it is."""
    whole, scale, _, _ = narrowed([W], forward=True, along=along)
    q, _, _, _ = fp8.quantize_rows_and_columns(W)
    assert torch.equal(whole[:, : W.shape[1]].float(), q.float())
    V = (W - q.float() * scale[:, None]) @ along.R
    behind = whole[:, W.shape[1] :].float()
    made = behind[:, : V.shape[1]] * scale[:, None]
    torch.testing.assert_close(made, V, rtol=2**-4, atol=2**-9 * float(scale.max()))
    assert not behind[:, V.shape[1] :].any()
    rounded = fp8.quantize_rows(x, behind=x @ along.P)
    by_weights = x @ (q.float() * scale[:, None]).t() + (x @ along.P) @ V.t()
    return fp8.matmul_fp8(*rounded, whole, scale, out_dtype=torch.float32), by_weights


def test_what_rounding_the_weight_costs_is_gone_on_inputs_that_were_not_seen():
    W, x = torch.randn(300, 256, generator=generator(0, "W")), inputs(200, 256)
    along = directions(inputs(1000, 256, seed="before"), W)
    wanted = x @ W.t()
    q, scale, _, _ = fp8.quantize_rows_and_columns([W])
    W8 = q.float() * scale[:, None]
    rounded, by_weights = product(x, W, along)
    codes, factors = fp8.quantize_rows(x)
    x8 = codes.float() * factors[:, None]

    def error(y):
        return float((y - wanted).norm() / wanted.norm())

    assert error(x @ W8.t()) > 0.02 and error(by_weights) < 0.2 * error(x @ W8.t())
    # What is left is what rounding x costs.
    assert error(rounded) < 1.05 * error(x8 @ W.t()) < 0.8 * error(x8 @ W8.t())


def test_they_leave_the_scales_of_rows_alone():
    W, x = torch.randn(40, 96, generator=generator(0, "W")), inputs(500, 96)
    along = directions(x, W)
    assert along.P.shape == along.R.shape == (96, DIRECTIONS)
    assert ((x @ along.P).abs() <= 1.001 * SHARE * x.abs().amax(1, keepdim=True)).all()
    # Nor on rows that go where the others did not.
    alone = torch.zeros(300, 96)
    alone[:, :4] = torch.randn(300, 4, generator=generator(0, "alone"))
    narrow = directions(alone, W)
    other = torch.randn(100, 96, generator=generator(0, "other"))
    assert ((other @ narrow.P).abs() <= 8 * other.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_few_rows_zeros_and_infinities(rows):
    W = torch.randn(20, 32, generator=generator(0, "W"))
    W[:, 3] = 0
    x = torch.cat([inputs(rows, 32), torch.zeros(2, 32), torch.full((1, 32), torch.inf)])
    along = directions(x, W, 16)
    assert along.P.shape == (32, 16) and along.P.isfinite().all() and along.R.isfinite().all()
    assert not along.P[:, rows:].any() and not along.R[:, rows:].any()
    if rows:
        _, by_weights = product(x[:rows], W, along)
        assert (by_weights - x[:rows] @ W.t()).norm() < 1e-4 * (x[:rows] @ W.t()).norm()


def test_they_are_the_same_every_time_and_leave_random_numbers_alone():
    W, x = torch.randn(20, 96, generator=generator(0, "W")), inputs(300, 96)
    state = torch.get_rng_state()
    one, other = directions(x, W), directions(x.bfloat16().float(), W)
    assert torch.equal(torch.get_rng_state(), state) and one.P.dtype == torch.float32
    again = directions(x, W)
    assert torch.equal(one.P, again.P) and torch.equal(one.R, again.R) and not torch.equal(one.P, other.P)
    assert directions(x.bfloat16(), W).P.dtype == torch.bfloat16 == directions(x.bfloat16(), W).R.dtype


@pytest.mark.parametrize("ranks", [(16,), (3, 5)])
def test_one_reading_for_them_and_for_the_adapters(ranks, monkeypatch):
    draw = generator(0, "one reading")
    modules = [nn.Linear(96, 40, bias=False).requires_grad_(False) for _ in ranks]
    for module in modules:
        module.weight.copy_(torch.randn(40, 96, generator=draw))
    lows = [LowRank(torch.randn(r, 96, generator=draw), torch.randn(40, r, generator=draw), 0.5) for r in ranks]
    linears = [Fused(SiteWeight(m, "linear"), None, low) for m, low in zip(modules, lows, strict=True)]
    x, W = inputs(50, 96), torch.cat([module.weight for module in modules])
    along = directions(inputs(500, 96, seed="before"), W)
    group = Group(linears, x.dtype, fp8_forward=True, store=Store(directions={(0, "o"): along}), name=(0, "o"))
    seen = []
    monkeypatch.setattr(
        group_module, "quantize_rows", lambda x, behind: seen.append(behind) or fp8.quantize_rows(x, behind=behind)
    )
    h = group.project(x)
    z = group.outputs(x, h)
    for found, true in ((h[:, : sum(ranks)], x @ torch.cat([low.A for low in lows]).t()), (seen[0], x @ along.P)):
        assert (found - true).norm() < 1e-6 * true.norm()
    wanted = torch.cat(
        [x @ m.weight.t() + 0.5 * x @ low.A.t() @ low.B.t() for m, low in zip(modules, lows, strict=True)], 1
    )
    # Low-rank parts are much larger than the frozen one here, of which eight bits lose hundredths.
    assert (z - wanted).norm() < 0.012 * wanted.norm()
    # Nothing is left of it for another x.
    group.outputs(2 * x, 2 * h)
    assert (seen[1] - 2 * x @ along.P).norm() < 1e-6 * seen[1].norm()
