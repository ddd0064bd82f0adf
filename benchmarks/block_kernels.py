"""Time and memory rate of every kernel of a fused decoder layer on one CUDA device, with their tile sizes tried.

    python benchmarks/block_kernels.py [--tokens 8192] [--only low-rank,norm] [--variants] [--out FILE]

Shapes are Llama-3.1-8B's. Rates count what a kernel has to read and write once, partial sums and caches left out, and
stand beside what a copy reaches in the same run. Every timing is the median of runs over rotating inputs larger than
the cache. One that fails is a line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from deltaw.fuse.directions import DIRECTIONS
from deltaw.kernels import (
    fp8,
    gated_project_triton,
    gated_triton,
    low_rank,
    low_rank_triton,
    nf4_triton,
    norm_triton,
    rotary_triton,
    scaled,
    scaled_triton,
)
from deltaw.kernels.cross_entropy_triton import loss_and_gradient
from deltaw.kernels.low_rank_triton import Tiles
from deltaw.quant.codebooks import nf4_code
from deltaw.quant.weight import NF4Weight

WIDTH, INNER, HEADS, KV_HEADS, HEAD, VOCAB, RANK = 4096, 14336, 32, 8, 128, 128256, 16
EPS = 1e-5
#: Of the device's clock, about 20 ms: longer than the host takes for the launches of all runs of a kernel.
WAIT_CYCLES = 30_000_000


@dataclass(frozen=True)
class Case:
    """One timing: a function of freshly made inputs, and the bytes it has to move or the FLOPs it has to make."""

    name: str
    make: Callable[[], Any]
    run: Callable[[Any], object]
    moved_bytes: float = 0.0
    flops: float = 0.0


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def draws(*shapes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(draw(*shape) for shape in shapes)


def cases(tokens: int, variants: bool) -> Iterator[Case]:
    """Everything that is timed."""
    M, d, n, r = tokens, WIDTH, INNER, RANK
    row, wide = 2 * M * d, 2 * M * n
    yield Case("copy", lambda: draw(1 << 28), lambda x: x.clone(), 2 * 2 * (1 << 28))
    for N, K in ((d, d), (KV_HEADS * HEAD, d), (n, d), (d, n), (2 * n, d), (6144, d)):
        make = partial(draws, (M, K), (N, K), (M, N))
        yield Case(f"gemm {N}x{K}", make, lambda t: torch.mm(t[0], t[1].t()), flops=2.0 * M * N * K)
        yield Case(f"gemm+= {N}x{K}", make, lambda t: t[2].addmm_(t[0], t[1].t()), flops=2.0 * M * N * K)
        yield Case(f"gemm dx+= {N}x{K}", make, lambda t: t[0].addmm_(t[2], t[1]), flops=2.0 * M * N * K)
    for N, K, P in ((2 * n, d, 2 * r), (6144, d, 3 * r), (d, n, r), (d, d, r)):
        make = partial(draws, (M, K + P), (N + P, K + P), (M, N + P))
        front = partial(lambda t, N: torch.mm(t[0], t[1][:N].t(), out=t[2][:, :N]), N=N)
        yield Case(f"gemm [x, h] {N}x{K}", make, front, flops=2.0 * M * N * K)
        back = partial(lambda t, K: torch.mm(t[2], t[1][:, :K]), K=K)
        yield Case(f"gemm [g, k] {N}x{K}", make, back, flops=2.0 * M * N * K)
    yield from _norms(M, d, row)
    yield from _rotary(M)
    yield from _scaled(M, row, variants)
    yield from _gated(M, n, r, wide, variants)
    yield from _gated_and_project(M, n, r, wide, variants)
    yield from _low_rank(M, r, variants)
    yield from _add_product(M, row, variants)
    yield from _nf4(variants)
    yield from _cross_entropy(variants)
    yield from _fp8(M)
    yield from _attention(M)


def _norms(M: int, d: int, row: int) -> Iterator[Case]:
    weight = draw(d)
    yield Case(
        "norm forward", lambda: draw(M, d), lambda x: norm_triton.rms_norm(x, weight, eps=EPS, style="llama"), 2 * row
    )
    yield Case(
        "norm backward+",
        lambda: (draw(M, d), draw(M, d), draw(M, d), torch.rand(M, device="cuda")),
        lambda t: norm_triton.rms_norm_backward(t[0], t[1], weight, t[3], style="llama", add=t[2], out=t[0]),
        4 * row,
    )


def _rotary(M: int) -> Iterator[Case]:
    seq = 2048
    cos, sin = draw(1, seq, HEAD), draw(1, seq, HEAD)
    for heads in (HEADS, KV_HEADS):
        shape, size = (M // seq, seq, heads, HEAD), 2 * 2 * M * heads * HEAD
        name, make = f"rotary {heads} heads", partial(draws, shape, shape)
        yield Case(name, make, lambda t: rotary_triton.rotate(t[0], cos, sin), size)
        yield Case(f"{name} elsewhere", make, lambda t: rotary_triton.rotate(t[0], cos, sin, out=t[1]), size)
        c = torch.rand(heads * HEAD, device="cuda")
        yield Case(
            f"{name} back, with factors", partial(draws, shape, shape, shape),
            lambda t, c=c: rotary_triton.rotate_back_scaled(t[0], t[1], c, cos, sin, out=t[2]), size * 3 // 2,
        )  # fmt: skip


def _gated(M: int, n: int, r: int, wide: int, variants: bool) -> Iterator[Case]:
    make = partial(draws, (M, n), (M, n), (M, n))
    yield Case("gated forward", make, lambda t: gated_triton.gated(t[1], t[2], activation="silu", out=t[0]), 3 * wide)
    yield Case(
        "gated backward", make, lambda t: gated_triton.gated_backward(t[0], t[1], t[2], activation="silu"), 6 * wide
    )
    B, h, k = draw(n, r), draw(M, r), draw(M, r)
    c = torch.rand(n, device="cuda")
    tiles: dict[Any, list[Any]] = {
        None: [(16, 128, 4, 3), (16, 128, 4, 4), (16, 64, 4, 4), (16, 64, 2, 4), (16, 128, 8, 3), (32, 64, 2, 3)],
        (c, c): [(16, 128, 4, 2), (16, 128, 4, 3), (32, 128, 4, 2), (16, 64, 4, 3), (32, 64, 4, 2)],
    }
    for factors, tile in ((key, tile) for key, others in tiles.items() for tile in [None, *others * variants]):
        yield Case(
            f"gated backward low-rank {'factors ' if factors else ''}{tile or ''}",
            make,
            lambda t, tile=tile, factors=factors: gated_triton.gated_backward_low_rank(
                *t, B_gate=B, B_up=B, h_gate=h, h_up=h, k_down=k, scale_gate=2.0, scale_up=2.0, activation="silu",
                factors=factors, tile=tile,
            ),
            5 * wide,
        )  # fmt: skip


def _gated_and_project(M: int, n: int, r: int, wide: int, variants: bool) -> Iterator[Case]:
    A = draw(r, n)

    def make() -> Any:
        both = draw(M, n + r)
        return draw(M, n), draw(M, n), {"out": both[:, :n], "room": both[:, n:]}

    def separate(gate: torch.Tensor, up: torch.Tensor, to: dict[str, torch.Tensor], copies: bool) -> None:
        h = low_rank.project(gated_triton.gated(gate, up, activation="silu", out=to["out"]), A)
        if copies:
            to["room"].copy_(h)

    for copies in (False, True):
        name = f"gated then project{' and copy' * copies}"
        yield Case(name, make, lambda t, copies=copies: separate(*t, copies), 3 * wide)
    tiles = [(16, 128, 4, 3), (16, 128, 4, 4), (16, 256, 4, 3), (32, 128, 4, 3), (16, 256, 8, 3), (32, 64, 4, 4)]
    tiles += [(64, 64, 4, 3), (16, 512, 8, 2), (16, 128, 4, 2), (16, 64, 4, 3), (32, 64, 4, 3), (32, 128, 8, 2)]
    tiles += [(64, 64, 8, 3), (64, 128, 16, 3)]
    for tile in [None, *tiles * variants]:
        yield Case(
            f"gated and project {tile or ''}",
            make,
            lambda t, tile=tile: gated_project_triton.gated_and_project(
                t[0], t[1], A, activation="silu", tile=tile, **t[2]
            ),
            3 * wide,
        )


def _low_rank(M: int, r: int, variants: bool) -> Iterator[Case]:
    h, k = draw(M, r), draw(M, 3 * r)
    tiles = [None, *[Tiles(64, 256, 8, 3, 132), Tiles(64, 512, 8, 3, 132), Tiles(64, 256, 8, 4, 132)] * variants]
    for K in (WIDTH, INNER):
        A, B = draw(3 * r, K), draw(K, r)
        size = 2 * M * K
        make = partial(draw, M, K)
        yield Case(f"low-rank project {K}", make, lambda x, A=A: low_rank.project(x, A), size)
        yield Case(f"low-rank outer-sum {K}", make, lambda x: low_rank.outer_sum(k, x), size)
        for tile in tiles:
            yield Case(
                f"low-rank project-and-sum {K} {tile or ''}", make,
                lambda g, B=B, tile=tile: low_rank_triton.project_and_sum(g, B, h, scale=2.0, tiles=tile), size,
            )  # fmt: skip
        yield Case(
            f"low-rank project-and-sum {K} torch", make,
            lambda g, B=B: low_rank.project_and_sum_torch(g, B, h, scale=2.0), size,
        )  # fmt: skip
        yield Case(f"low-rank h B^T {K}", make, lambda x, B=B: torch.mm(h, B.t(), out=x), size)
    widths = (WIDTH, WIDTH // 4, WIDTH // 4)
    hs, Bs, out = draw(M, 3 * r), draw(sum(widths), 3 * r), draw(M, 3 * r)
    make, size = partial(draw, M, sum(widths)), 2 * M * sum(widths)
    for tile in tiles:
        yield Case(
            f"low-rank project-and-sum blocks {widths} {tile or ''}", make,
            lambda g, tile=tile: low_rank_triton.project_and_sum(
                g, Bs, hs, scale=1.0, sum_scale=2.0, out=out, widths=widths, tiles=tile
            ),
            size,
        )  # fmt: skip
    yield Case(
        f"low-rank two products {sum(widths)}", make,
        lambda g: (torch.mm(g, Bs, out=out), low_rank.outer_sum(g, hs)), size,
    )  # fmt: skip


def _add_product(M: int, row: int, variants: bool) -> Iterator[Case]:
    h, B = draw(M, RANK), draw(WIDTH, RANK)
    make = partial(draws, (M, WIDTH), (M, WIDTH), (M, WIDTH))
    others = [(32, 128, 4), (64, 128, 8), (128, 64, 8), (64, 128, 4), (32, 256, 8), (16, 256, 4)]
    for more, tile in itertools.product((False, True), [low_rank_triton.ADD_PRODUCT, *others * variants]):
        yield Case(
            f"add product {'and z ' if more else ''}{tile}", make,
            lambda t, more=more, tile=tile: low_rank_triton.add_product(
                t[0], h, B, z=t[1] if more else None, out=t[1 if more else 2], tile=tile
            ),
            (3 if more else 2) * row,
        )  # fmt: skip
    yield Case("add product torch", make, lambda t: torch.addmm(t[0], h, B.t(), out=t[2]), 2 * row)
    yield Case("add product and z torch", make, lambda t: t[1].addmm_(h, B.t()).add_(t[0]), 3 * row)


def _nf4(variants: bool) -> Iterator[Case]:
    weight = NF4Weight.quantize(draw(INNER, WIDTH))
    count = INNER * WIDTH
    wide = torch.empty(INNER, WIDTH + 2 * RANK, device="cuda", dtype=torch.bfloat16)

    def run(out: torch.Tensor, tile: int) -> None:
        before, nf4_triton.WORD_TILE = nf4_triton.WORD_TILE, tile
        weight.dequantize(out=out)
        nf4_triton.WORD_TILE = before

    for tile in (256, 512, 1024) if variants else (nf4_triton.WORD_TILE,):
        for place, out in (("", wide.view(-1)[:count].view(INNER, WIDTH)), (" into wider rows", wide[:, :WIDTH])):
            yield Case(
                f"nf4 read{place} {tile}", lambda: None, lambda _, out=out, tile=tile: run(out, tile), count * 2.516
            )


def _scaled(M: int, row: int, variants: bool) -> Iterator[Case]:
    c = torch.rand(WIDTH, device="cuda")
    make = partial(draws, (M, WIDTH), (M, WIDTH))
    default, strip = scaled_triton.SUMMED_TILE, scaled_triton.SUMMED_ROWS
    tiles = [(4, 512, 4), (2, 512, 4), (4, 512, 8), (8, 256, 4), (2, 1024, 8), (4, 512, 2), (4, 1024, 4)]
    others = [*((tile, strip) for tile in tiles), (default, strip // 2), (default, 2 * strip)]
    for tile, rows in [(default, strip), *others * variants]:
        yield Case(
            f"scale and sum {tile} {rows}", make,
            lambda t, tile=tile, rows=rows: scaled_triton.scale_and_sum(
                t[0], t[1], c, out=t[0], tile=tile, strip=rows
            ),
            3 * row,
        )  # fmt: skip
    yield Case(
        "scale and sum, its second sum", partial(draw, M // strip, WIDTH, dtype=torch.float32), lambda x: x.sum(0)
    )
    yield Case("scaled add", make, lambda t: scaled.scaled_add(t[0], t[1], c), 3 * row)


def _cross_entropy(variants: bool) -> Iterator[Case]:
    rows = 2048
    target = torch.randint(0, VOCAB, (rows, 1), device="cuda")
    for tile in [(8192, 16), (8192, 32), (4096, 8), (16384, 32)] if variants else [(8192, 16)]:
        yield Case(
            f"cross-entropy {tile}", lambda: draw(rows, VOCAB),
            lambda x, tile=tile: loss_and_gradient(x, target, None, None, 1.0, True, tile=tile), 3 * 2 * rows * VOCAB,
        )  # fmt: skip


def _fp8(M: int) -> Iterator[Case]:
    weight = NF4Weight.quantize(draw(INNER, WIDTH))
    yield Case(
        "fp8 weight from nf4", lambda: None, lambda _: fp8.quantize_nf4(weight, nf4_code(weight.device)),
        INNER * WIDTH * 2.516,
    )  # fmt: skip
    W = draw(INNER, WIDTH)
    yield Case("fp8 weight", lambda: None, lambda _: fp8.quantize_rows_and_columns(W), INNER * WIDTH * 4)
    made = fp8.quantize_rows_and_columns(W)
    lost = torch.empty(INNER, WIDTH, dtype=torch.bfloat16, device="cuda")
    yield Case(
        "fp8 weight from nf4, and what rounding takes", lambda: None,
        lambda _: fp8.quantize_nf4(weight, nf4_code(weight.device), lost=lost), INNER * WIDTH * 4.516,
    )  # fmt: skip
    A, (_, _, qT, scale) = draw(RANK, WIDTH), fp8.quantize_rows_and_columns(W, room=(0, RANK))
    behind = qT.as_strided((WIDTH, RANK), qT.stride(), INNER)
    yield Case("fp8 columns of A", lambda: None, lambda _: fp8.write_columns(A, behind, scale), RANK * WIDTH * 3)
    for K in (WIDTH, INNER, 2 * INNER):
        yield Case(f"fp8 rows {K}", lambda K=K: draw(M, K), fp8.quantize_rows, 3 * M * K)
    yield Case(
        f"fp8 rows {WIDTH} with directions", lambda: (draw(M, WIDTH), draw(M, DIRECTIONS)),
        lambda t: fp8.quantize_rows(t[0], behind=t[1]), 3 * M * (WIDTH + DIRECTIONS),
    )  # fmt: skip
    for fast in (False, True):
        yield Case(
            f"fp8 gemm {INNER}x{WIDTH} fast accumulation {fast}",
            lambda: fp8.quantize_rows(draw(M, WIDTH)),
            lambda t, fast=fast: fp8.matmul_fp8(*t, made[0], made[1], fast_accumulation=fast),
            flops=2.0 * M * INNER * WIDTH,
        )


def _attention(M: int) -> Iterator[Case]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    seq = 2048
    flops = 4.0 * M * seq * HEADS * HEAD / 2

    def make() -> Any:
        return [
            draw(M // seq, seq, heads, HEAD).transpose(1, 2).requires_grad_() for heads in (HEADS, KV_HEADS, KV_HEADS)
        ]

    def forward(t: Any, backend: Any) -> Any:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(*t, is_causal=True, enable_gqa=True)

    def both(t: Any, backend: Any) -> None:
        out = forward(t, backend)
        torch.autograd.grad(out, t, out.detach())

    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
        backend = getattr(SDPBackend, name)
        yield Case(f"attention forward {name}", make, lambda t, b=backend: forward(t, b), flops=flops)
        yield Case(f"attention both {name}", make, lambda t, b=backend: both(t, b), flops=3.5 * flops)


def timed_ms(case: Case, *, runs: int, sets: int) -> tuple[float, float]:
    """Median and least of the runs, after as many warm ones as there are sets of inputs."""
    inputs = [case.make() for _ in range(sets)]
    for turn in range(sets + 2):
        case.run(inputs[turn % sets])
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    torch.cuda.synchronize()
    # All launches are queued behind a wait, so that the host's part in them is not timed.
    torch.cuda._sleep(WAIT_CYCLES)
    marks[0].record()
    for turn, mark in enumerate(marks[1:]):
        case.run(inputs[turn % sets])
        mark.record()
    torch.cuda.synchronize()
    spent = [first.elapsed_time(last) for first, last in itertools.pairwise(marks)]
    return statistics.median(spent), min(spent)


def main() -> None:
    """Times everything and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--only", default="", help="beginnings of names, with commas")
    parser.add_argument("--variants", action="store_true", help="other tile sizes too")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--out", help="a JSON file")
    args = parser.parse_args()
    wanted = tuple(filter(None, args.only.split(",")))
    print(f"{torch.cuda.get_device_name()}, {args.tokens} tokens, bfloat16\n")
    print("| kernel | ms (median, least) | TB/s | TFLOP/s |\n|---|---|---|---|")
    found = []
    for case in cases(args.tokens, args.variants):
        if wanted and not case.name.startswith(wanted):
            continue
        try:
            median, least = timed_ms(case, runs=args.runs, sets=2)
        except Exception as error:
            print(f"| {case.name} | {type(error).__name__}: {' '.join(str(error).split())[:120]} | | |", flush=True)
            torch.cuda.empty_cache()
            continue
        rate = f"{case.moved_bytes / median / 1e9:.2f}" if case.moved_bytes else ""
        speed = f"{case.flops / median / 1e9:.0f}" if case.flops else ""
        print(f"| {case.name} | {median:.3f}, {least:.3f} | {rate} | {speed} |", flush=True)
        found.append({"name": case.name, "median_ms": median, "least_ms": least, "TB_s": rate, "TFLOP_s": speed})
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump({"device": torch.cuda.get_device_name(), "tokens": args.tokens, "kernels": found}, file, indent=1)


if __name__ == "__main__":
    main()
