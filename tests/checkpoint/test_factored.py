"""The factored identities against dense float64, on shapes of every kind."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.checkpoint import factored
from deltaw.core.generators import generator
from deltaw.core.protocols import LowRank

#: Float64 through two QRs and an SVD of small matrices.
NEAR = 1e-12


def low(out, in_, r, *names, scale=1.5, dtype=torch.float64):
    random = generator(0, "low", out, in_, r, *names)
    A, B = torch.randn(r, in_, generator=random), torch.randn(out, r, generator=random)
    return LowRank(A.to(dtype), B.to(dtype), scale)


def dense(low):
    return low.scale * low.B.double() @ low.A.double()


sizes = st.integers(1, 9)


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, sizes, sizes, st.sampled_from([0.25, 2.0, 3.7]))
def test_values_vectors_norms_and_distances(out, in_, r, other, scale):
    first, second = low(out, in_, r, scale=scale), low(out, in_, other, "second")
    X, Y = dense(first), dense(second)
    s = factored.singular_values(first)
    expected = torch.linalg.svdvals(X)
    assert len(s) == min(out, in_, r)
    torch.testing.assert_close(s, expected[: len(s)], atol=NEAR * scale * 100, rtol=0)
    assert expected[len(s) :].sum() < 1e-10
    U, s, V = factored.svd(first)
    torch.testing.assert_close(U @ torch.diag(s) @ V.T, X, atol=NEAR * 100, rtol=0)
    for vectors in (U, V):
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(len(s), dtype=torch.float64), atol=NEAR, rtol=0)
    assert factored.norm(first) == pytest.approx(float(X.norm()), rel=1e-12)
    assert factored.inner(first, second) == pytest.approx(float((X * Y).sum()), rel=1e-10, abs=1e-10)
    assert factored.distance(first, second) == pytest.approx(float((X - Y).norm()), rel=1e-11, abs=1e-11)
    total = factored.stacked([first, second], [0.5, -2.0])
    assert total.A.shape[0] == r + other
    torch.testing.assert_close(dense(total), 0.5 * X - 2.0 * Y, atol=NEAR * 100, rtol=0)


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, sizes, st.integers(1, 9), st.sampled_from([0.5, 4.0]))
def test_a_truncation_is_the_nearest_and_balanced(out, in_, r, wanted, scale):
    given_ = low(out, in_, r)
    X = dense(given_)
    U, s, Vh = torch.linalg.svd(X, full_matrices=False)
    kept = min(wanted, r, out, in_)
    best = U[:, :kept] @ torch.diag(s[:kept]) @ Vh[:kept]
    cut = factored.truncated(given_, wanted, scale=scale)
    assert (cut.A.shape, cut.B.shape, cut.scale) == ((kept, in_), (out, kept), scale)
    torch.testing.assert_close(dense(cut), best, atol=1e-9, rtol=0)
    root = torch.diag(s[:kept] / scale)
    torch.testing.assert_close(cut.A @ cut.A.T, root, atol=1e-10, rtol=0)
    torch.testing.assert_close(cut.B.T @ cut.B, root, atol=1e-10, rtol=0)
    assert factored.distance(cut, given_) == pytest.approx(math.sqrt(float(s[kept:].square().sum())), abs=1e-9)
    whole = factored.truncated_matrix(X, wanted)
    assert (whole.A.shape, whole.B.shape) == ((min(wanted, out, in_), in_), (out, min(wanted, out, in_)))
    torch.testing.assert_close(dense(whole), U[:, :wanted] @ torch.diag(s[:wanted]) @ Vh[:wanted], atol=1e-7, rtol=0)
    assert factored.distance(factored.of_matrix(X), whole) == pytest.approx(float(s[wanted:].norm()), abs=1e-7)


def test_a_small_distance_keeps_its_digits():
    first = low(40, 30, 4)
    moved = LowRank(first.A, first.B * (1 + 1e-9), first.scale)
    expected = float((dense(moved) - dense(first)).norm())
    assert factored.distance(moved, first) == pytest.approx(expected, rel=1e-4)
    assert expected < 1e-7


def test_shares_of_energy_and_effective_ranks():
    s = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    assert [factored.energy_kept(s, r) for r in (1, 2, 3, 4)] == pytest.approx([9 / 14, 13 / 14, 1, 1])
    assert [factored.rank_for_energy(s, share) for share in (0.5, 0.7, 0.93, 1.0)] == [1, 2, 3, 3]
    assert factored.rank_for_energy(s, 9 / 14) == 1
    assert factored.stable_rank(s) == pytest.approx(14 / 9)
    p = [9 / 14, 4 / 14, 1 / 14]
    assert factored.effective_rank(s) == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)))
    equal = torch.full((5,), 0.3, dtype=torch.float64)
    assert factored.effective_rank(equal) == pytest.approx(5) and factored.stable_rank(equal) == pytest.approx(5)
    assert factored.rank_for_energy(equal, 1.0) == 5


def test_an_update_of_nothing():
    zero = LowRank(torch.randn(3, 5, generator=generator(0)), torch.zeros(4, 3), 2.0)
    s = factored.singular_values(zero)
    assert (factored.norm(zero), factored.rank(zero), factored.effective_rank(s), factored.stable_rank(s)) == (0,) * 4
    assert factored.energy_kept(s, 1) == 1 and factored.rank_for_energy(s, 0.99) == 1
    for cut in (factored.truncated(zero, 1), factored.truncated_matrix(dense(zero), 1)):
        assert not dense(cut).any() and torch.isfinite(cut.A).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_factors_are_computed_with_in_float64(dtype):
    narrow = low(12, 7, 3, dtype=dtype)
    torch.testing.assert_close(
        factored.singular_values(narrow), torch.linalg.svdvals(dense(narrow))[:3], rtol=NEAR, atol=0
    )


def test_rank_counts_directions_that_are_there():
    assert factored.rank(low(9, 8, 3)) == 3
    doubled = factored.stacked([low(9, 8, 3), low(9, 8, 3)], [1.0, 0.5])
    assert doubled.A.shape[0] == 6 and factored.rank(doubled) == 3
