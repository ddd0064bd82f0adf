"""Factors written by one launch against torch's copies, to the bit; Triton's form by its interpreter.

The interpreter is chosen by a variable that Triton reads when it is first imported, hence a process of its own.
"""

import importlib.util
import os

import pytest
import torch

from deltaw.core.generators import generator
from deltaw.kernels import factors
from deltaw.kernels.factors import Factor, Writer, write_factors

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
ON_CARD = [
    pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed"),
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]
FORMS = ["torch", pytest.param("triton", marks=ON_CARD)]
PAIRS = [(torch.float32, torch.float16), (torch.float32, torch.float32), (torch.float16, torch.float16)]
if not INTERPRETED:
    PAIRS += [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]


@pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="no Triton, or the interpreter's process")
def test_kernels_in_the_interpreter(passes_in_the_interpreter):
    passes_in_the_interpreter(__file__, "triton")


@pytest.fixture
def form(request, monkeypatch):
    """Writers in one form, and the device."""
    if request.param == "torch":
        return "cpu"
    from deltaw.kernels import factors_triton

    monkeypatch.setattr(factors, "triton_form", lambda like, module: factors_triton)
    return "cpu" if INTERPRETED else "cuda"


def drawn(name, *shape, dtype, device):
    return torch.randn(shape, generator=generator(0, name, *shape)).to(device, dtype)


def example(source, target, device, room=None):
    """Two linears with factors and one without, in a matrix that begins within another, and what it is to become."""
    ranks, widths, columns, P = (3, 5), (70, 9), 130, 16
    rows = sum(widths) + 11
    whole = torch.full((rows + P, columns + P + 4), float("nan"), dtype=target, device=device) if room is None else room
    A, B = whole[rows:, :columns], whole[:rows, columns : columns + P]
    wanted = whole.clone()
    wanted[rows:, :columns] = 0
    wanted[:rows, columns : columns + P] = 0
    made, at, row = [], 0, 0
    for index, (rank, width) in enumerate(zip(ranks, widths, strict=True)):
        a = drawn(f"A{index}", rank, columns, dtype=source, device=device)
        b, scale = drawn(f"B{index}", width, rank, dtype=source, device=device), 1.7 + index
        made += [Factor(a, A[at : at + rank]), Factor(b, B[row : row + width], at, scale)]
        wanted[rows + at : rows + at + rank, :columns] = a.to(target)
        wanted[row : row + width, columns + at : columns + at + rank] = (b.float() * scale).to(target)
        at, row = at + rank, row + width
    made += [Factor(None, B[row:]), Factor(None, A[at:])]
    return whole, wanted, made


@pytest.mark.parametrize("form", FORMS, indirect=True)
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_factors_and_zeros_stand_where_they_belong_and_nothing_else_is_touched(form, source, target):
    whole, wanted, made = example(source, target, form)
    Writer(made).write()
    assert torch.equal(whole.nan_to_num(9e3), wanted.nan_to_num(9e3))
    by_torch, _, same = example(source, target, form)
    write_factors(same)
    assert torch.equal(by_torch.nan_to_num(9e3), whole.nan_to_num(9e3))


@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_a_writer_follows_its_sources_and_its_base(form):
    whole, wanted, made = example(torch.float32, torch.float16, form)
    writer = Writer(made, base=whole)
    made[0].source.mul_(2)
    wanted[-16:-13, :130] *= 2
    other = torch.full_like(whole, float("nan"))
    writer.write(other)
    assert torch.equal(other.nan_to_num(9e3), wanted.nan_to_num(9e3))
    assert whole.isnan().all()


@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_factors_larger_than_a_program_writes(form):
    source = drawn("long", 7, 5000, dtype=torch.float32, device=form)
    target = torch.full((7, 6000), float("nan"), dtype=torch.float16, device=form)
    Writer([Factor(source, target, 900, 0.5)]).write()
    wanted = torch.nn.functional.pad((source * 0.5).half(), (900, 100))
    assert torch.equal(target, wanted)


def test_sources_of_two_dtypes_are_written_one_after_the_other(monkeypatch):
    def unwanted(*arguments):
        raise AssertionError

    monkeypatch.setattr(factors, "triton_form", unwanted)
    target = torch.zeros(2, 3, 4)
    sources = [torch.randn(3, 4), torch.randn(3, 4).double()]
    Writer([Factor(s, t) for s, t in zip(sources, target, strict=True)]).write()
    assert torch.equal(target, torch.stack([s.float() for s in sources]))
