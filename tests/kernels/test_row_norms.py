"""DoRA's factored norms in Triton against the norm of W + scale B A itself; without a GPU by Triton's interpreter.

The interpreter is chosen by a variable that Triton reads when it is first imported, hence a process of its own.
"""

import importlib.util
import os

import pytest
import torch

from deltaw.core.generators import generator
from deltaw.kernels import dora_linear

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
FORMS = [
    "torch",
    pytest.param(
        "triton",
        marks=[
            pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed"),
            pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device"),
            *([] if INTERPRETED else [pytest.mark.gpu]),
        ],
    ),
]


@pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="no Triton, or the interpreter's process")
def test_in_the_interpreter(passes_in_the_interpreter):
    passes_in_the_interpreter(__file__, "triton")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("out", "columns", "rank"), [(1, 3, 1), (70, 33, 4), (130, 65, 16), (65, 130, 40)])
def test_norms_are_those_of_the_whole_matrix(form, out, columns, rank, monkeypatch):
    device = "cuda" if form == "triton" and not INTERPRETED else "cpu"
    if form == "triton":
        from deltaw.kernels import row_norms_triton

        monkeypatch.setattr(dora_linear, "triton_form", lambda x, module: row_norms_triton)
        monkeypatch.setattr(dora_linear, "row_norms_torch", None)
    draw = generator(0, f"norms {out} {columns} {rank}")
    W, A, B = (torch.randn(*shape, generator=draw) for shape in ((out, columns), (rank, columns), (out, 2 * rank)))
    # A view with strides of its own, as one linear's columns of a wider matrix are.
    B = B[:, ::2] * 0.3
    wanted = (W.double() + 1.7 * B.double() @ A.double()).norm(dim=1)
    on = [t.to(device) for t in (W.square().sum(1), (A @ W.t()).t(), A, B)]
    found = dora_linear.row_norms(*on, 1.7)
    assert found.dtype == torch.float32 and found.shape == (out,)
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_an_update_that_cancels_the_weight_gives_no_nan(form, monkeypatch):
    device = "cuda" if form == "triton" and not INTERPRETED else "cpu"
    if form == "triton":
        from deltaw.kernels import row_norms_triton

        monkeypatch.setattr(dora_linear, "triton_form", lambda x, module: row_norms_triton)
    A = torch.randn(4, 9, generator=generator(0, "A")).to(device)
    B = torch.randn(5, 4, generator=generator(0, "B")).to(device)
    W = -(B @ A)
    found = dora_linear.row_norms(W.square().sum(1), W @ A.t(), A, B, 1.0)
    assert bool((found >= 0).all()) and bool((found < 1e-2).all())
