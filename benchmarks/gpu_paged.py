"""Paged optimizers on one GPU: states that do not fit, one very long batch, and the cost in time.

    python benchmarks/gpu_paged.py [--hidden 4096] [--blocks 4] [--steps 6] [--json FILE]

The model is a stack of residual two-layer blocks of float32 parameters, run under bfloat16 autocast. What its
parameters, gradients and activations take is measured first; then the process' share of the card is capped.

1. Too little for the states: the cap leaves room for 40 % of AdamW's beside the rest. torch's AdamW runs out of memory;
   the paged ones take the same steps. `weights` is how far their weights end from those of the uncapped AdamW, relative
   to how far that one moved them.
2. A spike: short batches and one long one. The cap fits the states with a short batch, and the long batch without them.

Seconds are medians over the steps after the first two, which allocate. torch does not count bitsandbytes' managed
memory, so its peak bytes leave the states out wherever they are.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F

OPTIONS = dict(lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
TORCH = "torch AdamW (fused)"
#: Steps before the timed ones: the first allocates the states.
WARM = 2


class Block(torch.nn.Module):
    """x + W2 relu(W1 x), of 8 hidden^2 parameters."""

    def __init__(self, hidden: int, draw: torch.Generator) -> None:
        super().__init__()
        made = dict(device="cuda", generator=draw)
        self.up = torch.nn.Parameter(torch.randn(4 * hidden, hidden, **made) * hidden**-0.5)
        self.down = torch.nn.Parameter(torch.randn(hidden, 4 * hidden, **made) * (0.1 * hidden**-0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, hidden) to the same."""
        return x + F.linear(F.relu(F.linear(x, self.up)), self.down)


def make_optimizer(name: str, params: list[torch.nn.Parameter]) -> torch.optim.Optimizer | None:
    from deltaw.quant.paged import PagedAdamW, paged_optimizer

    if name == "none":
        return None
    if name == TORCH:
        return torch.optim.AdamW(params, **OPTIONS, fused=True)
    source, bits = name.rsplit(" ", 2)[0], int(name.split()[-2])
    if source == "own paged":
        return PagedAdamW(params, **OPTIONS, bits=bits)
    return paged_optimizer(
        "paged_adamw" if bits == 32 else "paged_adamw_8bit", params, **OPTIONS, backend="bitsandbytes"
    )[0]


def take_steps(name: str, args: argparse.Namespace, blocks: int, tokens: list[int], row: dict[str, Any]):
    """Takes a step for each number of tokens and fills `row` as it goes; the model's parameters, on the CPU."""
    draw = torch.Generator("cuda").manual_seed(0)
    model = torch.nn.Sequential(*[Block(args.hidden, draw) for _ in range(blocks)])
    optimizer = make_optimizer(name, list(model.parameters()))
    seconds: list[tuple[float, float]] = []
    for count in tokens:
        x = torch.randn(count, args.hidden, device="cuda", generator=draw)
        torch.cuda.synchronize()
        begun = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            loss = (model(x) - x.flip(1)).float().square().mean()
        loss.backward()
        torch.cuda.synchronize()
        between = time.perf_counter()
        if optimizer is not None:
            optimizer.step()
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - begun, time.perf_counter() - between))
        model.zero_grad()
        row["steps"] += 1
        row["first_step_s"] = seconds[0][0]
        if len(seconds) > WARM:
            row["step_s"], row["optimizer_s"] = (statistics.median(s) for s in zip(*seconds[WARM:], strict=True))
    return [p.detach().cpu() for p in model.parameters()]


def attempt(
    name: str, args: argparse.Namespace, blocks: int, tokens: list[int], cap: int | None = None
) -> tuple[dict[str, Any], list[torch.Tensor] | None]:
    """One run under a cap of the process' bytes: its row, and its weights if it came to its end."""
    release()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(cap / total, 1.0) if cap else 1.0)
    row: dict[str, Any] = {"optimizer": name, "cap_bytes": cap, "planned": len(tokens), "steps": 0}
    weights = None
    try:
        weights = take_steps(name, args, blocks, tokens, row)
        row["outcome"] = "completed"
    except torch.OutOfMemoryError:
        row["outcome"] = f"out of memory in step {row['steps'] + 1}"
    except Exception as error:  # a rival's failure is a result too
        row["outcome"] = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:60]}"
    row["peak_bytes"] = torch.cuda.max_memory_allocated()
    torch.cuda.set_per_process_memory_fraction(1.0)
    release()
    return row, weights


def release() -> None:
    """Gives all cached memory back, so that a run meets nothing of the one before."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def contenders() -> list[str]:
    """The optimizers that page; bitsandbytes' where it loads."""
    made = ["own paged 32 bits", "own paged 8 bits"]
    try:
        import bitsandbytes.cextension

        if bitsandbytes.cextension.lib.compiled_with_cuda:
            made += ["bitsandbytes paged 32 bits", "bitsandbytes paged 8 bits"]
    except Exception as error:  # a broken installation fails in any way
        print(f"without bitsandbytes ({type(error).__name__}: {error})", file=sys.stderr)
    return made


def too_large(args: argparse.Namespace) -> list[dict[str, Any]]:
    """States that do not fit: the rows of part 1, with the reference that runs without a cap first."""
    states = 8 * args.blocks * 8 * args.hidden**2
    tokens = [args.tokens] * (WARM + args.steps)
    _, start = attempt("none", args, args.blocks, [])
    bare, _ = attempt("none", args, args.blocks, tokens[:2])
    reference, wanted = attempt(TORCH, args, args.blocks, tokens)
    rows = [reference]
    cap = bare["peak_bytes"] + int(0.4 * states)
    for name in (TORCH, *contenders()):
        row, weights = attempt(name, args, args.blocks, tokens, cap)
        if weights and wanted and start:
            row["times_torch"] = row["step_s"] / reference["step_s"]
            triples = zip(weights, wanted, start, strict=True)
            gaps = [((got - want).norm() / (want - begun).norm()).item() for got, want, begun in triples]
            row["weights_relative_difference"] = max(gaps)
        rows.append(row)
    for row in rows:
        row.update(part="states", states_bytes=states, without_states_bytes=bare["peak_bytes"])
    return rows


def spike(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Short batches and a long one: the rows of part 2."""
    blocks = max(args.blocks // 2, 1)
    states = 8 * blocks * 8 * args.hidden**2
    short, long = ([count] * 2 for count in (args.tokens // 8, 4 * args.tokens))
    (low, _), (high, _) = (attempt("none", args, blocks, tokens) for tokens in (short, long))
    enough = max(low["peak_bytes"] + states, high["peak_bytes"])
    missing = high["peak_bytes"] + states
    cap = (enough + missing) // 2
    tokens = short + short[:1] + long[:1] + short
    rows = [attempt(name, args, blocks, tokens, cap)[0] for name in (TORCH, *contenders())]
    for row in rows:
        row.update(part="spike", states_bytes=states, short_bytes=low["peak_bytes"], long_bytes=high["peak_bytes"])
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """A table; a dash where nothing was measured."""

    def number(row: dict[str, Any], key: str, form: str, scale: float = 1.0) -> str:
        return format(row[key] * scale, form) if row.get(key) is not None else "-"

    print(f"\n{title}")
    head = ("optimizer", "cap GB", "peak GB", "steps", "first s", "step s", "opt. s", "x torch", "weights", "outcome")
    table = [head] + [
        (
            row["optimizer"],
            number(row, "cap_bytes", ".2f", 1e-9),
            number(row, "peak_bytes", ".2f", 1e-9),
            f"{row['steps']}/{row['planned']}",
            number(row, "first_step_s", ".3f"),
            number(row, "step_s", ".4f"),
            number(row, "optimizer_s", ".4f"),
            number(row, "times_torch", ".2f"),
            number(row, "weights_relative_difference", ".1e"),
            row["outcome"],
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096, help="width; a block has 8 hidden^2 parameters")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument(
        "--tokens", type=int, default=4096, help="rows of a batch; an eighth and four times it in part 2"
    )
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a run")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "gpu_paged.py needs a CUDA device, and torch sees none: run it on a machine that has one", file=sys.stderr
        )
        return 2
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}; AdamW's float32 states: 8 bytes a parameter")
    states, long_batch = too_large(args), spike(args)
    first, second = states[0], long_batch[0]
    show(
        f"1. {first['states_bytes'] / 8e9:.2f}e9 parameters: {first['without_states_bytes'] / 1e9:.2f} GB without "
        f"states, states {first['states_bytes'] / 1e9:.2f} GB",
        states,
    )
    show(
        f"2. {second['states_bytes'] / 8e9:.2f}e9 parameters: {second['short_bytes'] / 1e9:.2f} GB without states in a "
        f"short batch, {second['long_bytes'] / 1e9:.2f} GB in the long, states {second['states_bytes'] / 1e9:.2f} GB",
        long_batch,
    )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            rows = states + long_batch
            json.dump(
                {"device": name, "torch": torch.__version__, "arguments": vars(args), "rows": rows}, file, indent=1
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
