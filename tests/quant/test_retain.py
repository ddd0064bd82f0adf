"""Retaining merges against float64 references, brute force and plain requantisation."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.core.errors import InputError, RunError
from deltaw.core.generators import generator
from deltaw.core.protocols import LowRank
from deltaw.kernels.nf4 import NestedScales
from deltaw.quant import retain as room
from deltaw.quant.codebooks import dynamic_code, nf4_code
from deltaw.quant.retain import SecondMoment, output_error, retain
from deltaw.quant.weight import NF4Weight


def moment(columns: int, seed: int = 0, power: float = 1.0) -> torch.Tensor:
    """Of inputs whose spectrum falls with a power of the rank."""
    g = generator(seed, "moment")
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=g, dtype=torch.float64)).Q
    return ((basis * torch.arange(1, columns + 1).double() ** -power) @ basis.T).float()


def case(out, columns, *, seed=0, size=0.02, rank=2, double_quant=True, dtype=torch.float32):
    """A base, an update and the wanted sum."""
    g = generator(seed, "case")
    W = torch.randn(out, columns, generator=g)
    base = NF4Weight.quantize(W, double_quant=double_quant, dtype=dtype)
    A, B = torch.randn(rank, columns, generator=g), torch.randn(out, rank, generator=g)
    update = LowRank(A, B, size / rank**0.5)
    return base, update, base.dequantize().float() + update.scale * B @ A


def objective(weight: NF4Weight | torch.Tensor, target: torch.Tensor, M: torch.Tensor) -> float:
    W = weight.dequantize().float() if isinstance(weight, NF4Weight) else weight
    E, M = W.double() - target.double(), M.double()
    return float(((E @ M) * E).sum())


def metric(H, columns, update=None, *, damp=1e-3):
    """The documented M, in float64."""
    emphasis = room.BLIND_EMPHASIS if H is None else room.EMPHASIS
    H = torch.eye(columns).double() if H is None else H.double()
    M = H.clone()
    if update is not None:
        A = update.A.double()
        M += emphasis * H @ A.T @ torch.linalg.pinv(A @ H @ A.T, rtol=1e-10, hermitian=True) @ A @ H
    return M + damp * H.diagonal().mean() * torch.eye(columns).double()


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(1, 20),
    columns=st.sampled_from([1, 7, 48, 63, 64, 65, 96, 128, 200]),
    seed=st.integers(0, 10**6),
    size=st.sampled_from([0.0, 0.002, 0.02, 0.3, 3.0]),
    double_quant=st.booleans(),
    with_base=st.booleans(),
    with_data=st.booleans(),
    with_update=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_never_worse_than_requantising(
    out, columns, seed, size, double_quant, with_base, with_data, with_update, dtype
):
    base, update, target = case(out, columns, seed=seed, size=size, double_quant=double_quant, dtype=dtype)
    H = moment(columns, seed) if with_data else None
    given_update = update if with_update else None
    found = retain(
        target,
        H=H,
        base=base if with_base else None,
        low_rank=given_update,
        double_quant=double_quant,
        dtype=dtype,
        sweeps=2,
    )
    plain = NF4Weight.quantize(target, double_quant=double_quant, dtype=dtype)
    M = metric(H, columns, given_update)
    assert objective(found, target, M) <= objective(plain, target, M) * (1 + 1e-4) + 1e-9
    # The format is the plain one, to the storage of every tensor.
    assert found.shape == plain.shape and found.dtype == plain.dtype and found.block_size == 64
    for name, tensor in plain.tensors().items():
        mine = found.tensors()[name]
        assert (mine.shape, mine.dtype) == (tensor.shape, tensor.dtype)
    if double_quant:
        assert isinstance(found.scales, NestedScales) and torch.equal(found.scales.code, dynamic_code(True))


@pytest.mark.parametrize("repeated", [False, True])
def test_objective_is_the_documented_one(repeated):
    _, update, target = case(5, 40)
    if repeated:
        update = LowRank(torch.cat([update.A, update.A]), torch.cat([update.B, update.B], 1), 1.0)
    for H, emphasis in ((None, room.BLIND_EMPHASIS), (moment(40), room.EMPHASIS)):
        want = metric(H, 40, update)
        torch.testing.assert_close(room._metric(H, target, update, emphasis, 1e-3).double(), want, rtol=1e-5, atol=1e-6)


def test_factor_is_the_cholesky_factor_in_the_greedy_order():
    columns = 150
    M = metric(moment(columns, 3), columns)
    order, L = room._factor(M.float())
    assert sorted(order.tolist()) == list(range(columns))
    exact = torch.linalg.cholesky(M.float().double()[order][:, order])
    torch.testing.assert_close(L.double(), exact / exact.diagonal(), rtol=1e-5, atol=1e-6)
    taken: list[int] = []
    for step in (0, 1, 2, 63, 64, 65, 100):
        taken = order[:step].tolist()
        rest = [j for j in range(columns) if j not in taken]
        given_taken = M[rest][:, rest].diagonal()
        if taken:
            across = M[taken][:, rest]
            given_taken = given_taken - (across * torch.linalg.solve(M[taken][:, taken], across)).sum(0)
        assert rest[int(given_taken.argmin())] == int(order[step])


@pytest.mark.parametrize(("out", "columns"), [(5, 130), (8, 64), (3, 200)])
def test_rounding_equals_optimal_brain_quantisation(out, columns):
    """The published form, one column at a time through the inverse of what is left, in float64."""
    base, _, target = case(out, columns, size=0.2)
    M = metric(moment(columns), columns).float()
    grid = room._Grid(base.scales, base.shape, 64, torch.float32)
    order, _ = room._factor(M)
    scale = base.absmax().double().repeat_interleave(64)[: out * columns].view(out, columns)
    code = nf4_code().double()
    W, inverse = target.double().clone(), torch.linalg.inv(M.double())
    want = torch.empty(out, columns, dtype=torch.uint8)
    left = list(range(columns))
    for column in reversed(order.tolist()):
        q = (W[:, column, None] - scale[:, column, None] * code).abs().argmin(1)
        want[:, column] = q
        error = (W[:, column] - scale[:, column] * code[q]) / inverse[column, column]
        W -= torch.outer(error, inverse[column])
        left.remove(column)
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column] = inverse[:, column] = 0
    assert torch.equal(room._round(target, M, grid).T, want.int())
    assert not torch.equal(want, base.indices())


@pytest.mark.parametrize("columns", [64, 80])
def test_sweeps_end_where_no_single_change_helps(columns):
    out = 4
    base, _, target = case(out, columns, size=0.1)
    H = moment(columns)
    M = metric(H, columns)
    found = retain(target, H=H, base=base, sweeps=60)
    least, q = objective(found, target, M), found.indices()
    moves = 0
    for row, column, other in itertools.product(range(out), range(0, columns, 3), range(16)):
        changed = q.clone()
        changed[row, column] = other
        worse = objective(NF4Weight.from_codes(changed, found.scales, dtype=torch.float32), target, M)
        assert worse >= least * (1 - 1e-5)
        moves += worse > least
    assert moves > 100
    scales = found.scales
    assert isinstance(scales, NestedScales)
    for block, other in itertools.product(range(len(scales.q)), range(256)):
        if block * 64 // columns != (block * 64 + 63) // columns:
            continue
        q8 = scales.q.clone()
        q8[block] = other
        nested = NestedScales(q8, scales.code, scales.absmax, scales.offset)
        assert objective(NF4Weight.from_codes(q, nested, dtype=torch.float32), target, M) >= least * (1 - 1e-5)


@pytest.mark.parametrize("columns", [128, 96, 7])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_on_the_grid_stays(columns, double_quant, dtype):
    base, update, _ = case(33, columns, double_quant=double_quant, dtype=dtype)
    target = base.dequantize().float()
    for H in (None, moment(columns)):
        found = retain(target, H=H, base=base, low_rank=update)
        assert torch.equal(found.codes, base.codes)
        for name, tensor in base.tensors().items():
            assert torch.equal(found.tensors()[name], tensor)
    if not double_quant and dtype == torch.float32:
        assert torch.equal(retain(target, H=moment(columns), double_quant=False).dequantize(), target)


@pytest.mark.parametrize(("out", "columns"), [(96, 192), (96, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_what_requantising_loses(out, columns, dtype):
    base, update, target = case(out, columns, dtype=dtype)
    H, D = moment(columns, power=1.5), target - base.dequantize().float()
    plain = output_error(NF4Weight.quantize(target, dtype=dtype).dequantize(), target, H, update=D)
    assert plain.update > 0.9 and plain.kept < 0.3
    found = output_error(retain(target, H=H, base=base).dequantize(), target, H, update=D)
    stressed = retain(target, H=H, base=base, low_rank=update, emphasis=3.0)
    kept = output_error(stressed.dequantize(), target, H, update=D)
    assert found.update < 0.7 * plain.update and found.kept > 0.6
    assert abs(kept.kept - 1) < abs(found.kept - 1) and kept.kept > 0.9
    assert found.update <= kept.update


def test_keeps_the_update_from_the_weights_alone():
    base, update, target = case(96, 192)
    D = target - base.dequantize()
    for H in (None, moment(192)):
        plain = output_error(NF4Weight.quantize(target).dequantize(), target, H, update=D)
        found = output_error(retain(target, base=base, low_rank=update).dequantize(), target, H, update=D)
        assert plain.kept < 0.3 and 0.8 < found.kept < 1.2


def test_is_deterministic_and_takes_any_layout():
    base, update, target = case(10, 96)
    H = moment(96)
    first = retain(target, H=H, base=base, low_rank=update)
    again = retain(target.T.contiguous().T, H=H.double(), base=base, low_rank=update)
    assert torch.equal(first.codes, again.codes) and torch.equal(first.absmax(), again.absmax())
    assert torch.equal(H, moment(96))


def test_blocks_of_zeros_and_dead_inputs():
    W = torch.randn(8, 128, generator=generator(0))
    W[2] = 0
    W[3:5, :64] = 0
    base = NF4Weight.quantize(W, double_quant=False)
    update = LowRank(torch.randn(2, 128, generator=generator(1)), torch.randn(8, 2, generator=generator(2)), 0.05)
    target = base.dequantize() + update.scale * update.B @ update.A
    H = moment(128)
    H[:, 5] = H[5] = 0
    found = retain(target, H=H, base=base, low_rank=update).dequantize()
    error = output_error(found[2:3], target[2:3], H)
    assert torch.isfinite(found).all() and error.relative < 0.1
    dead = retain(target, H=torch.zeros(128, 128), base=base).dequantize()
    assert output_error(dead, target).relative <= output_error(NF4Weight.quantize(target).dequantize(), target).relative
    assert torch.equal(retain(torch.zeros(3, 70)).dequantize(), torch.zeros(3, 70))
    assert retain(torch.zeros(0, 70)).shape == (0, 70)


def test_scales_are_searched_where_there_is_no_base():
    target = torch.randn(64, 128, generator=generator(0))
    found = retain(target, double_quant=False, sweeps=0).dequantize()
    plain = NF4Weight.quantize(target, double_quant=False).dequantize()
    assert output_error(found, target).relative < 0.99 * output_error(plain, target).relative


def test_bad_input():
    base, update, target = case(4, 64)
    wrong = (
        ({"target": target[0]}, r"shape \(64,\).*expected \(out, in\)"),
        ({"target": target.int()}, "floating"),
        ({"H": moment(63)}, r"H of q_proj has shape \(63, 63\): expected \(64, 64\)"),
        ({"H": moment(64) * float("nan")}, "NaN or infinite"),
        ({"target": torch.full((4, 64), float("inf"))}, "cannot quantise q_proj: 256"),
        ({"base": case(5, 64)[0]}, r"base of q_proj has shape \(5, 64\)"),
        ({"low_rank": LowRank(torch.zeros(2, 63), update.B, 1.0)}, "lora_A of q_proj"),
        ({"sweeps": -1}, "sweeps is -1"),
        ({"damp": float("nan")}, "damp is nan"),
    )
    for change, message in wrong:
        keys = {"target": target, "H": moment(64), "base": base, "low_rank": update, "name": "q_proj", **change}
        with pytest.raises(InputError, match=message):
            retain(keys.pop("target"), **keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_moment(monkeypatch, dtype):
    monkeypatch.setattr(room, "TOKENS", 5)
    g = generator(0, "tokens")
    batches = [torch.randn(3, 7, 20, generator=g).to(dtype) for _ in range(3)]
    masks = [torch.rand(3, 7, generator=g) > 0.3, None, torch.ones(3, 7, dtype=torch.long)]
    batches[0][~masks[0]] = float("nan")
    seen = SecondMoment(20, dtype=torch.float64)
    for x, mask in zip(batches, masks, strict=True):
        seen.update(x, mask)
    tokens = torch.cat([batches[0][masks[0]], batches[1].flatten(0, 1), batches[2].flatten(0, 1)]).double()
    assert seen.tokens == len(tokens) and seen.H.dtype == torch.float64
    torch.testing.assert_close(seen.H, tokens.T @ tokens / len(tokens), rtol=1e-12, atol=1e-12)
    with pytest.raises(InputError, match="width 19: expected 20"):
        seen.update(torch.zeros(2, 19))
    with pytest.raises(InputError, match=r"mask of shape \(3,\)"):
        seen.update(torch.zeros(2, 20), torch.ones(3))
    with pytest.raises(InputError, match="no tokens"):
        _ = SecondMoment(4).H
    with pytest.raises(RunError, match="NaN or infinite"):
        seen.update(torch.full((1, 20), float("inf")))


def test_output_error_is_that_of_the_outputs():
    g = generator(0, "outputs")
    X = torch.randn(500, 12, generator=g, dtype=torch.float64)
    target, D, noise = (torch.randn(5, 12, generator=g, dtype=torch.float64) * size for size in (1, 0.1, 0.02))
    found = output_error(target + noise - 0.25 * D, target, X.T @ X / 500, update=D)
    error, whole, update = X @ (noise - 0.25 * D).T, X @ target.T, X @ D.T
    assert found.relative == pytest.approx(float(error.norm() / whole.norm()), rel=1e-4)
    assert found.update == pytest.approx(float(error.norm() / update.norm()), rel=1e-4)
    assert found.kept == pytest.approx(float(((error + update) * update).sum() / update.square().sum()), rel=1e-4)
    base = output_error(target - D, target, X.T @ X / 500, update=D)
    assert base.update == pytest.approx(1, rel=1e-4) and base.kept == pytest.approx(0, abs=1e-4)
    assert output_error(target, target).relative == 0 and output_error(target, target).update is None
    assert output_error(target, target, update=D * 0).kept is None
