"""The gated activation, its gradient and the low-rank sums against float64 autograd; Triton's form by its interpreter.

The interpreter is chosen by a variable that Triton reads when it is first imported, hence a process of its own.
"""

import importlib.util
import os

import pytest
import torch
import torch.nn.functional as F

from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.kernels import gated as module
from deltaw.kernels.gated import gated, gated_and_project, gated_backward, gated_backward_low_rank

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ACTIVATIONS = ["silu", "gelu_tanh", "gelu"]
# Of the largest entry. One rounding at the end, and for sums those of what they read.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
# The interpreter does not round to bfloat16 as a GPU does.
KERNEL_DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def kernels(function):
    marks = [
        needs_triton,
        pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device"),
        # exp in the interpreter is numpy's, which says where it overflows.
        pytest.mark.filterwarnings("ignore::RuntimeWarning"),
        *([] if INTERPRETED else [pytest.mark.gpu]),
    ]
    for mark in marks:
        function = mark(function)
    return function


DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_kernels_in_the_interpreter(passes_in_the_interpreter):
    passes_in_the_interpreter(__file__, "test_kernel_")


@pytest.fixture(autouse=True)
def poisoned():
    """NaN in whatever memory torch hands out unfilled; only on CPU, as the mode has demands on CUDA's products."""
    torch.use_deterministic_algorithms(DEVICE == "cpu")
    assert DEVICE != "cpu" or torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


class Case:
    """g, gate and up within a frame of 7s (gate and up side by side in one buffer), factors and the float64 truth."""

    def __init__(self, rows, columns, dtype, *, activation, factors, device="cpu", seed=0, rank=None):
        draw = generator(seed, "gated", rows, columns)

        def numbers(*shape, dtype=dtype):
            return torch.randn(shape, generator=draw).to(dtype).to(device)

        self.frames = [torch.full((rows + 2, columns + 5), 7.0, dtype=dtype, device=device)]
        self.frames.append(torch.full((rows + 2, 2 * columns + 6), 7.0, dtype=dtype, device=device))
        self.g = self.frames[0][1:-1, 2 : columns + 2]
        both = self.frames[1][1:-1]
        self.gate, self.up = both[:, 1 : columns + 1], both[:, columns + 3 : 2 * columns + 3]
        for t, scale in ((self.g, 1.0), (self.gate, 3.0), (self.up, 1.0)):
            t.copy_(numbers(rows, columns) * scale)
        # Far ends, where exponentials leave float32's range.
        self.gate[0, 0] = -150.0
        self.gate[-1, -1] = 150.0
        c = [1 + 0.2 * numbers(columns, dtype=torch.float32) for _ in range(2)]
        self.factors = (c[0], c[1].to(dtype)) if factors else None
        self.activation, self.rank = activation, rank
        if rank is not None:
            # Columns of wider tensors, each with a row stride of its own.
            lengths = {"B_gate": columns, "B_up": columns, "h_gate": rows, "h_up": rows, "k_down": rows}
            self.low_rank = {name: numbers(n, i, rank)[:, 1] for i, (name, n) in enumerate(lengths.items(), start=2)}
            self.A_down = numbers(rank, columns + 3)[:, 3:]
        self.truth()

    def truth(self, *, scales=(0.0, 0.0), down=False):
        """With gate and up lacking their low-rank parts, and g down's."""
        g, *leaves = [t.double().clone() for t in (self.g, self.gate, self.up)]
        if self.rank is not None:
            B_gate, B_up, h_gate, h_up, k_down = (t.double() for t in self.low_rank.values())
            leaves[0] += scales[0] * h_gate @ B_gate.t()
            leaves[1] += scales[1] * h_up @ B_up.t()
            g += down * k_down @ self.A_down.double()
        leaves = [t.requires_grad_() for t in leaves]
        c = [t.double().clone().requires_grad_() for t in self.factors or ()]
        x, u = [z * f for z, f in zip(leaves, c, strict=True)] if c else leaves
        own = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[self.activation]
        act = own(x) * u
        self.wanted = [act.detach(), *torch.autograd.grad(act, leaves + c, g)]

    def unframed(self):
        """Nothing outside the tensors was written."""
        parts = (self.g, self.gate, self.up)
        for t in parts:
            t.fill_(7.0)
        return all((frame == 7).all() for frame in self.frames)

    def low_rank_truth(self, act, dgate, dup):
        """From what was stored, as the separate functions would read it."""
        B_gate, B_up, h_gate, h_up, k_down = (t.double() for t in self.low_rank.values())
        dgate, dup, act = dgate.double(), dup.double(), act.double()
        return [
            0.5 * dgate @ B_gate,
            1.5 * dup @ B_up,
            0.5 * dgate.t() @ h_gate,
            1.5 * dup.t() @ h_up,
            k_down.t() @ act,
        ]


def assert_near(got, want, tolerance):
    assert got.shape == want.shape and torch.isfinite(got).all()
    torch.testing.assert_close(got.double(), want, rtol=0.0, atol=tolerance * max(float(want.abs().max()), 1e-30))


def check_both(case, forward, backward):
    tolerance = TOLERANCE[case.g.dtype]
    out = torch.full_like(case.frames[0], 7.0)
    inner = out[1:-1, 3:-2]
    options = {"activation": case.activation, "factors": case.factors}
    assert forward(case.gate, case.up, out=inner, **options) is inner
    assert_near(inner, case.wanted[0], tolerance)
    assert inner.fill_(7.0) is inner and (out == 7.0).all()
    sums = backward(case.g, case.gate, case.up, **options)
    for got, want in zip((case.g, case.gate, case.up), case.wanted[:3], strict=True):
        assert_near(got, want, tolerance)
    if case.factors is None:
        assert sums is None
    else:
        for got, want in zip(sums, case.wanted[3:], strict=True):
            assert got.dtype == torch.promote_types(case.g.dtype, torch.float32)
            assert_near(got, want, 4 * TOLERANCE[got.dtype])
    assert case.unframed()


def check_adding(case, function, *, slack=1, **options):
    case.truth(scales=(1.0, 1.0))
    before = case.gate.clone(), case.up.clone()
    B_gate, B_up, h_gate, h_up, _ = case.low_rank.values()
    out = torch.full_like(case.frames[0], 7.0)
    options |= {"activation": case.activation, "factors": case.factors, "low_rank": (h_gate, B_gate, h_up, B_up)}
    assert_near(
        function(case.gate, case.up, out=out[1:-1, 3:-2], **options), case.wanted[0], slack * TOLERANCE[out.dtype]
    )
    out[1:-1, 3:-2] = 7.0
    assert (out == 7.0).all() and torch.equal(case.gate, before[0]) and torch.equal(case.up, before[1])
    function(case.gate, case.up, out=case.gate, **options)
    assert_near(case.gate, case.wanted[0], slack * TOLERANCE[out.dtype])
    assert case.unframed()


def check_low_rank(case, function, *, write_act, adds=False, down=False, slack=1, **options):
    if adds or down:
        case.truth(scales=(0.5, 1.5) if adds else (0.0, 0.0), down=down)
        options |= {"adds": adds, "A_down": case.A_down if down else None}
    before = [t.clone() for t in (case.g, case.gate, case.up)]
    g = before[0]
    options |= {"activation": case.activation, "factors": case.factors, "write_act": write_act}
    options |= {"scale_gate": 0.5, "scale_up": 1.5, **case.low_rank}
    made = function(case.g, case.gate, case.up, **options)
    tolerance = slack * TOLERANCE[case.g.dtype]
    for got, want in zip((case.gate, case.up), case.wanted[1:3], strict=True):
        assert_near(got, want, tolerance)
    act = case.wanted[0].to(case.g.dtype)
    if write_act:
        assert_near(case.g, case.wanted[0], tolerance)
        act = case.g
    elif function is not gated_backward_low_rank:
        assert torch.equal(case.g, g)
    wide = torch.promote_types(case.g.dtype, torch.float32)
    # Into storage that is NaN all around, and with scales of their own for dB. Sums are compared with what each call
    # stored: where something is added by a product first, its rounding may depend on strides.
    ranks = [t.shape[1] for t in made[:2]]
    around = g.new_full((len(g) + 2, sum(ranks) + 3), torch.nan)
    places = around[1:-1, 2:-1].split(ranks, 1)
    g, gate, up = (t.clone() for t in before)
    again = function(g, gate, up, **options, room=around[1:-1, 2:-1], sum_scales=(-1.0, 6.0))
    for got, place in zip(again, places, strict=False):
        assert got.data_ptr() == place.data_ptr() and got.stride() == place.stride()
    stored = (case.gate, case.up), (gate, up)
    # act as rounded here and there differs in a last place now and then.
    nears = [TOLERANCE[g.dtype]] * 2 + [4 * TOLERANCE[wide]] * 2 + [4 * TOLERANCE[wide if write_act else g.dtype]]
    for results, of, acts, (of_gate, of_up) in zip(
        (made, again), stored, (act, g if write_act else act), ((1.0, 1.0), (-2.0, 4.0)), strict=True
    ):
        wanted = case.low_rank_truth(acts, *of)
        wanted[2:4] = of_gate * wanted[2], of_up * wanted[3]
        for got, want, near, dtype in zip(results, wanted, nears, [g.dtype] * 2 + [wide] * 3, strict=False):
            assert got.dtype == dtype and (got.is_contiguous() or dtype == g.dtype)
            assert_near(got, want, near)
        assert len(results) == (5 if case.factors is None else 7)
        for got, want in zip(results[5:], case.wanted[3:], strict=True):
            assert_near(got, want, 4 * TOLERANCE[wide if slack == 1 else g.dtype])
    around[1:-1, 2:-1] = torch.nan
    assert around.isnan().all() and case.unframed()


def check_projection(case, function, rank, *, in_place=False, A_dtype=None, **options):
    """In storage that is NaN all around."""
    (rows, columns), dtype, device = case.gate.shape, case.gate.dtype, case.gate.device
    both = torch.full_like(case.frames[1], torch.nan)
    gate, up = both[1:-1, 1 : columns + 1].copy_(case.gate), both[1:-1, columns + 3 : 2 * columns + 3].copy_(case.up)
    A = torch.randn(rank, columns + 2, generator=generator(1, "A", rank)).to(A_dtype or dtype).to(device)[:, 2:]
    wide = torch.full((rows + 2, columns + rank + 5), torch.nan, dtype=dtype, device=device)
    out, room = wide[1:-1, 3 : columns + 3], wide[1:-1, columns + 3 : -2]
    options |= {"activation": case.activation, "factors": case.factors}
    act, h = function(gate, up, A, out=gate if in_place else out, room=room, **options)
    assert act is (gate if in_place else out)
    assert_near(act, case.wanted[0], TOLERANCE[dtype])
    assert h.dtype == dtype and h.is_contiguous() and h.data_ptr() != room.data_ptr() and torch.equal(h, room)
    # Terms cancel, so beside the last rounding there are those of sums as large as their magnitudes' would be.
    terms = (act.double().abs() @ A.to(dtype).double().abs().t()).max()
    want = act.double() @ A.to(dtype).double().t()
    assert h.shape == want.shape and torch.isfinite(h).all()
    wide_tolerance = TOLERANCE[torch.promote_types(dtype, torch.float32)]
    near = float(TOLERANCE[dtype] * want.abs().max() + wide_tolerance * terms)
    torch.testing.assert_close(h.double(), want, rtol=0.0, atol=near)
    for t in (out, room, gate, up):
        t.fill_(torch.nan)
    assert wide.isnan().all() and both.isnan().all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("rank", [1, 48])
def test_projection_in_torch(dtype, activation, factors, rank):
    case = Case(17, 130, dtype, activation=activation, factors=factors)
    check_projection(case, gated_and_project, rank)
    check_projection(case, gated_and_project, rank, in_place=True, A_dtype=torch.float64)
    case = Case(17, 130, dtype, activation=activation, factors=factors, rank=4)
    case.truth(scales=(1.0, 1.0))
    B_gate, B_up, h_gate, h_up, _ = case.low_rank.values()
    check_projection(case, gated_and_project, rank, low_rank=(h_gate, B_gate, h_up, B_up))


def test_projection_makes_its_storage():
    case = Case(5, 37, torch.float32, activation="silu", factors=False)
    A = torch.eye(37)[:3]
    act, h = gated_and_project(case.gate, case.up, A, activation="silu")
    assert_near(act, case.wanted[0], 2e-6)
    assert act.is_contiguous() and torch.equal(h, act[:, :3])
    for rows, columns in ((0, 37), (3, 0)):
        x = torch.ones(rows, columns)
        act, h = gated_and_project(x, x, torch.ones(3, columns), activation="silu")
        assert act.shape == (rows, columns) and torch.equal(h, torch.zeros(rows, 3))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (5, 37), (64, 16)])
def test_torch_is_float64s_rounded_once(monkeypatch, dtype, activation, factors, shape):
    monkeypatch.setattr(module, "_ELEMENTS", 100)
    case = Case(*shape, dtype, activation=activation, factors=factors)
    made = gated(case.gate, case.up, activation=activation, factors=case.factors)
    assert made.is_contiguous()
    assert_near(made, case.wanted[0], TOLERANCE[dtype])
    check_both(case, gated, gated_backward)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_storage_may_be_an_inputs(activation):
    for which in (0, 1):
        case = Case(6, 9, torch.float32, activation=activation, factors=False)
        gated(case.gate, case.up, activation=activation, out=(case.gate, case.up)[which])
        assert_near((case.gate, case.up)[which], case.wanted[0], 2e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("rank", [1, 8, 70])
@pytest.mark.parametrize(("adds", "down"), [(False, False), (True, False), (False, True), (True, True)])
def test_low_rank_sums_in_torch(monkeypatch, dtype, factors, rank, adds, down):
    monkeypatch.setattr(module, "_ELEMENTS", 100)
    case = Case(13, 37, dtype, activation="silu", factors=factors, rank=rank)
    check_low_rank(case, gated_backward_low_rank, write_act=True, adds=adds, down=down)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("rank", [1, 8, 70])
def test_low_rank_part_is_added_in_torch(monkeypatch, dtype, factors, rank):
    monkeypatch.setattr(module, "_ELEMENTS", 100)
    case = Case(13, 37, dtype, activation="silu", factors=factors, rank=rank)
    different_ranks(case, max(1, rank - 3))
    check_adding(case, gated)


def different_ranks(case, rank):
    case.low_rank["B_up"], case.low_rank["h_up"] = case.low_rank["B_up"][:, :rank], case.low_rank["h_up"][:, :rank]


def test_ranks_may_differ():
    case = Case(13, 37, torch.float64, activation="silu", factors=False, rank=4)
    different_ranks(case, 3)
    made = gated_backward_low_rank(
        case.g, case.gate, case.up, **case.low_rank, scale_gate=0.5, scale_up=1.5, activation="silu"
    )
    for got, want in zip(made, case.low_rank_truth(*case.wanted[:3]), strict=True):
        assert_near(got, want, 1e-13)


def test_no_tokens():
    empty = torch.zeros(0, 5)
    assert gated(empty, empty, activation="silu").shape == (0, 5)
    sums = gated_backward(empty, empty, empty, activation="silu", factors=(torch.ones(5), torch.ones(5)))
    assert all(torch.equal(t, torch.zeros(5)) for t in sums)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "'relu': expected one of silu"),
        ({"gate": torch.zeros(3, 4, dtype=torch.int64)}, "first tensor is torch.int64"),
        ({"gate": torch.zeros(3)}, "of shape \\(3,\\)"),
        ({"up": torch.zeros(3, 5)}, "up is .*\\(3, 5\\)"),
        ({"up": torch.zeros(3, 4, dtype=torch.bfloat16)}, "up is torch.bfloat16"),
        ({"up": torch.zeros(4, 3).t()}, "up has strides \\(1, 3\\)"),
        ({"out": torch.zeros(4).expand(3, 4)}, "out has strides \\(0, 1\\)"),
        ({"factors": (torch.ones(4), torch.ones(3))}, "factor has shape \\(3,\\)"),
    ],
)
def test_wrong_input_is_one_clear_line(change, message):
    given = {"gate": torch.zeros(3, 4), "up": torch.zeros(3, 4), "activation": "silu"} | change
    with pytest.raises(InputError, match=message):
        gated(given.pop("gate"), given.pop("up"), **given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": torch.zeros(4, 2)}, "A is torch.float32 of shape \\(4, 2\\).*\\(R, 4\\)"),
        ({"A": torch.zeros(4)}, "A is .*\\(4,\\)"),
        ({"A": torch.zeros(2, 4, dtype=torch.int64)}, "A is torch.int64"),
        ({"room": torch.zeros(3, 3)}, "room is .*\\(3, 3\\).*expected .*\\(3, 2\\)"),
        ({"room": torch.zeros(3, 2, dtype=torch.float64)}, "room is torch.float64"),
        ({"room": torch.zeros(2, 3).t()}, "room has a stride of 3"),
        ({"room": torch.zeros(2).expand(3, 2)}, "room has strides \\(0, 1\\)"),
        ({"up": torch.zeros(3, 5)}, "up is .*\\(3, 5\\)"),
        ({"activation": "relu"}, "'relu': expected one of silu"),
        ({"low_rank": (torch.zeros(3, 2), torch.zeros(4, 2), torch.zeros(2, 2), torch.zeros(4, 2))}, "h_up \\(2, 2\\)"),
    ],
)
def test_wrong_projection_is_one_clear_line(change, message):
    given = {"up": torch.zeros(3, 4), "A": torch.zeros(2, 4), "activation": "silu"} | change
    with pytest.raises(InputError, match=message):
        gated_and_project(torch.zeros(3, 4), given.pop("up"), given.pop("A"), **given)


def test_wrong_low_rank_input_is_one_clear_line():
    for name, shape, message in (
        ("B_up", (36, 4), "B_up is \\(36, 4\\)"), ("h_gate", (13, 3), "h_gate \\(13, 3\\)"),
        ("k_down", (12, 4), "k_down is \\(12, 4\\): expected \\(13, r\\)"),
    ):  # fmt: skip
        case = Case(13, 37, torch.float32, activation="silu", factors=False, rank=4)
        case.low_rank[name] = torch.zeros(shape)
        with pytest.raises(InputError, match=message):
            check_low_rank(case, gated_backward_low_rank, write_act=True)
    case = Case(13, 37, torch.float32, activation="silu", factors=False, rank=4)
    wrong = {"A_down": torch.zeros(37, 4), "scale_gate": 1.0, "scale_up": 1.0, "activation": "silu"}
    with pytest.raises(InputError, match="A_down is \\(37, 4\\): expected \\(4, 37\\)"):
        gated_backward_low_rank(case.g, case.gate, case.up, **case.low_rank, **wrong)
    h, B = case.low_rank["h_gate"], case.low_rank["B_gate"]
    with pytest.raises(InputError, match="h_up \\(12, 4\\)"):
        gated(case.gate, case.up, activation="silu", low_rank=(h, B, h[1:], B))


@kernels
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (69, 37)])
def test_kernel_is_float64s_rounded_once(dtype, activation, factors, shape):
    from deltaw.kernels import gated_triton

    case = Case(*shape, dtype, activation=activation, factors=factors, device=DEVICE)
    tile = (4, 32, 4)
    check_both(
        case,
        lambda *a, **o: gated_triton.gated(*a, tile=tile, **o),
        lambda *a, **o: gated_triton.gated_backward(*a, tile=tile, **o),
    )


@kernels
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("write_act", [False, True])
@pytest.mark.parametrize(("shape", "rank", "strips"), [((1, 1), 1, 1), ((53, 37), 8, 3), ((53, 37), 16, 1),
    ((40, 70), 20, None), ((33, 33), 64, 2)])  # fmt: skip
def test_kernel_of_the_low_rank_sums(dtype, factors, write_act, shape, rank, strips):
    from deltaw.kernels import gated_triton

    case = Case(*shape, dtype, activation="silu", factors=factors, device=DEVICE, rank=rank)
    check_low_rank(
        case, gated_triton.gated_backward_low_rank, write_act=write_act, tile=(16, 32, 4, 2, 255), strips=strips
    )


@kernels
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize(("shape", "rank", "adds", "down"), [((1, 1), 1, True, True), ((53, 37), 8, True, False),
    ((53, 37), 16, False, True), ((40, 70), 20, True, True), ((33, 33), 64, True, True)])  # fmt: skip
def test_kernel_of_the_low_rank_sums_adds_first(dtype, factors, shape, rank, adds, down):
    from deltaw.kernels import gated_triton

    case = Case(*shape, dtype, activation="silu", factors=factors, device=DEVICE, rank=rank)
    options = {"write_act": True, "tile": (16, 32, 4, 2), "strips": 2}
    check_low_rank(case, gated_triton.gated_backward_low_rank, adds=adds, down=down, **options)


@kernels
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("adding", [False, True])
def test_kernel_of_the_low_rank_sums_in_its_own_tiles(dtype, factors, adding):
    """More than one tile and strip of tokens and columns, and a rest of each."""
    from deltaw.kernels import gated_triton

    case = Case(150, 150, dtype, activation="silu", factors=factors, device=DEVICE, rank=16)
    options = {"write_act": True, "strips": 3, "adds": adding, "down": adding}
    check_low_rank(case, gated_triton.gated_backward_low_rank, **options)


@kernels
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize(("shape", "rank", "tile"), [((1, 1), 1, (16, 32, 4, 2)), ((69, 37), 8, (16, 32, 4, 1)),
    ((40, 33), 64, (16, 32, 4, 2)), ((300, 150), 16, None)])  # fmt: skip
def test_kernel_adds_the_low_rank_part(dtype, factors, shape, rank, tile):
    from deltaw.kernels import gated_triton

    case = Case(*shape, dtype, activation="silu", factors=factors, device=DEVICE, rank=rank)
    different_ranks(case, max(1, rank - 3))
    check_adding(case, gated_triton.gated, tile=tile)


@kernels
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize(("shape", "rank", "tile"), [((1, 24), 1, None), ((17, 130), 8, (16, 64, 4, 2)),
    ((100, 300), 16, None), ((17, 24), 48, (16, 32, 4, 1))])  # fmt: skip
def test_kernel_of_the_projection(dtype, activation, factors, shape, rank, tile):
    from deltaw.kernels import gated_project_triton

    case = Case(*shape, dtype, activation=activation, factors=factors, device=DEVICE)
    check_projection(case, gated_project_triton.gated_and_project, rank, tile=tile)


@kernels
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_kernel_of_the_projection_takes_other_storage_and_dtypes(dtype):
    from deltaw.kernels import gated_project_triton

    case = Case(33, 150, dtype, activation="silu", factors=True, device=DEVICE)
    check_projection(case, gated_project_triton.gated_and_project, 16, in_place=True, A_dtype=torch.float64)
    options = {"activation": "silu", "out": torch.empty_like(case.g)}
    A = torch.randn(150, 4, generator=generator(0)).to(dtype).to(DEVICE).t()
    act, h = gated_project_triton.gated_and_project(case.gate, case.up, A, **options)
    again = gated_project_triton.gated_and_project(case.gate, case.up, A.contiguous(), **options)
    assert torch.equal(act, again[0]) and torch.equal(h, again[1]) and torch.isfinite(h).all()
    for rows, columns in ((0, 150), (33, 0)):
        empty = case.gate[:rows, :columns]
        _, h = gated_project_triton.gated_and_project(empty, empty, A[:, :columns], activation="silu", out=empty)
        assert h.shape == (rows, 4) and not h.any()


@kernels
@pytest.mark.parametrize(
    ("rank", "adding", "processors"), [(16, False, 2), (70, False, 2), (16, True, 2), (16, False, 3)]
)
def test_kernel_of_the_projection_by_the_public_function(monkeypatch, rank, adding, processors):
    """Where the kernel serves, and above its rank, with a low-rank part and with too few tokens."""
    from deltaw.kernels import gated_project_triton, gated_triton

    calls = []
    own = gated_project_triton.gated_and_project
    monkeypatch.setattr(gated_project_triton, "gated_and_project", lambda *a, **o: calls.append(a) or own(*a, **o))
    monkeypatch.setattr(gated_project_triton, "_processors", lambda _: processors)
    forms = {"gated_project_triton": gated_project_triton, "gated_triton": gated_triton}
    monkeypatch.setattr(module, "triton_form", lambda _, name: forms[name])
    case = Case(33, 40, torch.float16, activation="silu", factors=True, device=DEVICE, rank=4)
    options = {}
    if adding:
        case.truth(scales=(1.0, 1.0))
        B_gate, B_up, h_gate, h_up, _ = case.low_rank.values()
        options["low_rank"] = h_gate, B_gate, h_up, B_up
    check_projection(case, gated_and_project, rank, **options)
    assert len(calls) == ((rank, adding, processors) == (16, False, 2))


@kernels
@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("rank", [16, 70])
def test_kernel_by_the_public_functions(monkeypatch, factors, rank):
    """A rank that the kernels take, and one whose part is added before."""
    from deltaw.kernels import gated_triton

    monkeypatch.setattr(module, "triton_form", lambda *_: gated_triton)
    slack = 1 if rank == 16 else 3
    for check, options in ((check_adding, {}), (check_low_rank, {"write_act": True, "adds": True, "down": True})):
        case = Case(33, 40, torch.float16, activation="silu", factors=factors, device=DEVICE, rank=rank)
        check(case, gated if check is check_adding else gated_backward_low_rank, slack=slack, **options)


@kernels
def test_kernel_takes_low_rank_tensors_as_they_lie():
    from deltaw.kernels import gated_triton

    case = Case(20, 33, torch.float16, activation="gelu", factors=False, device=DEVICE, rank=4)
    for name in ("B_gate", "h_up", "k_down"):
        case.low_rank[name] = case.low_rank[name].t().contiguous().t()
    case.A_down = case.A_down.t().contiguous().t()
    check_adding(case, gated_triton.gated)
    case.gate.fill_(0.5), case.up.fill_(1.5), case.g.fill_(2.5)
    check_low_rank(case, gated_triton.gated_backward_low_rank, write_act=True, adds=True, down=True)


@kernels
def test_kernel_of_the_low_rank_sums_takes_other_dtypes_and_no_tokens():
    from deltaw.kernels import gated_triton

    case = Case(20, 33, torch.float16, activation="gelu", factors=False, device=DEVICE, rank=4)
    case.low_rank |= {name: case.low_rank[name].float() for name in ("B_gate", "h_up")}
    check_low_rank(case, gated_triton.gated_backward_low_rank, write_act=True)
    case = Case(20, 33, torch.float32, activation="gelu", factors=True, device=DEVICE, rank=4)
    low_rank = {name: t if name[0] == "B" else t[:0] for name, t in case.low_rank.items()}
    k_gate, _, dB_gate, _, dA_down, dc_gate, _ = gated_triton.gated_backward_low_rank(
        case.g[:0], case.gate[:0], case.up[:0], **low_rank, scale_gate=1.0, scale_up=1.0, activation="gelu",
        factors=case.factors,
    )  # fmt: skip
    assert k_gate.shape == (0, 4) and not dB_gate.any() and not dc_gate.any()
    assert dB_gate.shape == (33, 4) and dA_down.shape == (4, 33) and dc_gate.shape == (33,)


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_on_a_gpu_by_the_public_functions(dtype, factors, activation):
    shape = (2050, 3000)
    check_both(Case(*shape, dtype, activation=activation, factors=factors, device="cuda"), gated, gated_backward)
    for rank in (8, 16, 32, 64, 80):
        # What the kernels do not add is rounded once more.
        slack = 1 if rank <= module.LARGEST_RANK[dtype.itemsize] else 3
        for adding in (False, True):
            case = Case(*shape, dtype, activation=activation, factors=factors, device="cuda", rank=rank)
            check_low_rank(
                case, gated_backward_low_rank, write_act=True, adds=adding, down=adding, slack=slack if adding else 1
            )
        case = Case(*shape, dtype, activation=activation, factors=factors, device="cuda", rank=rank)
        check_adding(case, gated, slack=slack)
    # Enough rows for 156 processors.
    case = Case(5000, 3000, dtype, activation=activation, factors=factors, device="cuda")
    for rank in (1, 16, 48, 80):
        check_projection(case, gated_and_project, rank)
    A = torch.randn(16, 3000, generator=generator(0, "A")).to(dtype).cuda()
    twice = [gated_and_project(case.gate, case.up, A, activation=activation, factors=case.factors) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))
    made = []
    for _ in range(2):
        case = Case(*shape, dtype, activation=activation, factors=factors, device="cuda", rank=16)
        made.append(
            gated_backward_low_rank(
                case.g, case.gate, case.up, **case.low_rank, scale_gate=1.0, scale_up=1.0, activation=activation,
                factors=case.factors,
            )
        )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_beyond_two_to_the_31_values():
    """Halves of one buffer whose last rows lie past 2^31 values."""
    rows, columns = 150_000, 7_200
    both = torch.empty(rows, 2 * columns, dtype=torch.bfloat16, device="cuda")
    gate, up = both[:, :columns], both[:, columns:]
    for start in range(0, rows, 10_000):
        both[start : start + 10_000] = torch.randn(10_000, 1, generator=generator(start, "x")).to("cuda")
    last = slice(rows - 100, rows)
    A = torch.eye(16, columns, device="cuda")
    act, h = gated_and_project(gate, up, A, activation="silu")
    assert torch.equal(h, act[:, :16])
    want = module.gated_torch(gate[last].clone(), up[last].clone(), activation="silu")
    torch.testing.assert_close(act[last], want, rtol=8e-3, atol=1e-6)
    g = act.fill_(1.0)
    wanted = [t[last].clone() for t in (g, gate, up)]
    module.gated_backward_torch(*wanted, activation="silu")
    gated_backward(g, gate, up, activation="silu")
    for got, want in zip((g, gate, up), wanted, strict=True):
        torch.testing.assert_close(got[last].double(), want.double(), rtol=8e-3, atol=1e-6)
