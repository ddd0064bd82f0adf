"""What DoRA costs over LoRA on a CPU: step time and memory, in 16 bits and on a 4-bit base, PEFT's beside ours.

    python benchmarks/methods_cpu.py [--model smollm2-135m] [--rounds 9]

As `cpu_train.py`: one process a system, a step in turn. A ratio is the median over the rounds of a system's seconds
over those of its LoRA in the same round. Processor time is steadier than the
clock; with --threads 1 it holds no waiting.
`keep` is a DoRA that keeps all outputs for the magnitude's gradient instead of computing some again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics

import cpu_train

#: A system and the one it is measured against.
PAIRS = [
    ("deltaw-dora", "deltaw-lora"),
    ("deltaw-dora-keep", "deltaw-lora"),
    ("deltaw-qdora", "deltaw-qlora"),
    ("peft-dora", "peft-lora"),
    ("peft-qdora", "peft-qlora"),
]


def measure(args: argparse.Namespace) -> list[dict]:
    """Every pair of the chosen packages, with the systems of one base alive together."""
    results = []
    for four_bits in (False, True):
        pairs = [(name, over) for name, over in PAIRS if name in args.systems and over.endswith("qlora") == four_bits]
        if not pairs:
            continue
        names = list(dict.fromkeys(name for pair in pairs for name in reversed(pair)))
        rounds = cpu_train.rounds_of(names, args.case, args.dtype, args)
        for name, over in pairs:
            seconds = {key: [taken[key]["s"] for taken in rounds] for key in (name, over)}
            ratios = [a / b for a, b in zip(seconds[name], seconds[over], strict=True)]
            busy = [taken[name]["busy_s"] / taken[over]["busy_s"] for taken in rounds]
            peaks = {key: rounds[-1][key]["peak_mib"] for key in (name, over)}
            results.append(
                {
                    "system": name,
                    "over": over,
                    "seconds": statistics.median(seconds[name]),
                    "over_seconds": statistics.median(seconds[over]),
                    "ratio": statistics.median(ratios),
                    "ratio_spread": [min(ratios), max(ratios)],
                    "busy_ratio": statistics.median(busy),
                    "peak_mib": peaks[name],
                    "over_peak_mib": peaks[over],
                }
            )
    return results


def table(results: list[dict]) -> str:
    """A Markdown table."""
    lines = [
        "| system | over | s a step | ratio (least, most) | of processor time | peak MiB | over | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        ratio = f"{r['ratio']:.3f} ({r['ratio_spread'][0]:.3f}, {r['ratio_spread'][1]:.3f})"
        memory = f"{r['peak_mib']:.0f} | {r['over_peak_mib']:.0f} | {r['peak_mib'] / r['over_peak_mib']:.3f}"
        lines.append(
            f"| {r['system']} | {r['over']} | {r['seconds']:.2f} | {ratio} | {r['busy_ratio']:.3f} | {memory} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures, prints the table, writes JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--systems", nargs="*", default=[name for name, _ in PAIRS])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--case", default="all", help="all, or short: the last eight tokens of a row carry loss")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--out")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        cpu_train.worker(args)
        return
    results = measure(args)
    print(f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} threads, {args.batch} x {args.length} tokens")
    print(table(results))
    if args.out:
        with open(args.out, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
