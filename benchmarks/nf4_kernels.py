"""Weights per second of reading and writing 4-bit weights, on CPU or on one CUDA device.

    python benchmarks/nf4_kernels.py [--device cuda] [--threads 2]

Each figure is the best of several runs that take turns. On CPU the matrices are SmolLM2-135M's, and bitsandbytes stands
beside where it is installed; on CUDA one LLaMA-sized matrix, and beside it what a copy of memory reaches. GB/s count
every byte read and written once.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from deltaw.core.generators import generator
from deltaw.kernels import nf4
from deltaw.quant.codebooks import dynamic_code, nf4_code

CPU_SHAPES = ((576, 576), (1536, 576), (576, 1536), (192, 576))
CUDA_SHAPES = ((8192, 28672),)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def best_s(runs: dict[str, Callable[[], object]], device: torch.device, *, repeats: int) -> dict[str, float]:
    """The shortest time of each function; they take turns, so that all meet the same machine."""
    best = dict.fromkeys(runs, math.inf)
    for turn in range(repeats + 2):
        for name, run in runs.items():
            if device.type == "cuda":
                first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                first.record()
                run()
                last.record()
                torch.cuda.synchronize()
                spent = first.elapsed_time(last) / 1000
            else:
                began = time.perf_counter()
                run()
                spent = time.perf_counter() - began
            if turn > 1:
                best[name] = min(best[name], spent)
    return best


def reading(packed: list[tuple[Tensor, object, int]], code: Tensor, dtype: torch.dtype, function) -> Callable[[], None]:
    outs = [torch.empty(count, dtype=dtype, device=code.device) for _, _, count in packed]

    def run() -> None:
        for (codes, scales, count), out in zip(packed, outs, strict=True):
            function(codes, code, scales, start=0, stop=count, out=out)

    return run


def peer_runs(weights: list[Tensor]) -> dict[str, Callable[[], object]]:
    if importlib.util.find_spec("bitsandbytes") is None:
        return {}
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    runs: dict[str, Callable[[], object]] = {}
    for nested in (False, True):
        held = [quantize_4bit(w, quant_type="nf4", compress_statistics=nested) for w in weights]
        label = "8-bit scales" if nested else "float32 scales"
        runs[f"dequantise, {label}, bitsandbytes"] = lambda held=held: [dequantize_4bit(*one) for one in held]
    runs["quantise, bitsandbytes"] = lambda: [quantize_4bit(w, quant_type="nf4") for w in weights]
    return runs


def runs_of(weights: list[Tensor], code: Tensor, map8: Tensor) -> dict[str, Callable[[], object]]:
    plain, nested = [], []
    for w in weights:
        codes, absmax = nf4.quantize_4bit(w, code)
        offset = absmax.mean()
        q, absmax2 = nf4.quantize_8bit(absmax - offset, map8)
        plain.append((codes, absmax, w.numel()))
        nested.append((codes, nf4.NestedScales(q, map8, absmax2, offset), w.numel()))
    engines = {"torch": (nf4.dequantize_4bit_torch, nf4.quantize_4bit_torch)}
    if kernels := nf4.triton_kernels(code):
        engines["Triton"] = (kernels.dequantize_4bit, kernels.quantize_4bit)
    runs: dict[str, Callable[[], object]] = {}
    for engine, (read, write) in engines.items():
        runs[f"dequantise, float32 scales, {engine}"] = reading(plain, code, weights[0].dtype, read)
        runs[f"dequantise, 8-bit scales, {engine}"] = reading(nested, code, weights[0].dtype, read)
        runs[f"quantise, {engine}"] = lambda write=write: [write(w, code) for w in weights]
    moved = torch.empty_like(weights[0])
    return runs | peer_runs(weights) | {"copy": lambda: moved.copy_(weights[0])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=8)
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    code, map8 = nf4_code(device), dynamic_code(device=device)
    shapes = CPU_SHAPES if device.type == "cpu" else CUDA_SHAPES
    name = f"{options.threads} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(f"{device.type}, {name}, torch {torch.__version__}; {', '.join(f'{a} x {b}' for a, b in shapes)}")
    for label, dtype in DTYPES.items():
        weights = [torch.randn(s, generator=generator(0, *s)).to(device, dtype) for s in shapes]
        count = sum(w.numel() for w in weights)
        times = best_s(runs_of(weights, code, map8), device, repeats=options.repeats)
        ceiling = 2 * weights[0].nbytes / times.pop("copy") / 1e9
        print(f"{label}: copying moves {ceiling:,.0f} GB/s")
        for what, spent in sorted(times.items()):
            nbytes = count * (dtype.itemsize + 0.5 + (1 / 64 if "8-bit" in what else 4 / 64))
            rate = nbytes / spent / 1e9
            print(f"  {what:42s} {count / spent:9.3g} weights/s {rate:8.1f} GB/s {rate / ceiling:6.0%} of copying")


if __name__ == "__main__":
    main()
