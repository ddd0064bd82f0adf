"""Whether fused layers and products in 8-bit floats train a model as the general path does: losses side by side.

    python benchmarks/fast_quality.py curves [--data FILE_OR_FOLDER] [--jobs 6] [--out FILE]
    python benchmarks/fast_quality.py gradients [--data FILE_OR_FOLDER] [--jobs 6] [--out FILE]
    python benchmarks/fast_quality.py fp8 [--seeds 0 1 2] [--data FILE_OR_FOLDER] [--jobs 9] [--out FILE]
    python benchmarks/fast_quality.py --prepare ROWS.jsonl --data FOLDER

Causal language modelling of SmolLM2-135M-Instruct in bfloat16 on full rows of 512 tokens, 8 rows a step, LoRA, QLoRA
and DoRA of rank 16 on the seven projections of every layer. Each run is `deltaw train`'s own loop (`deltaw.train.fit`)
in a process of its own, several of them at a time. Held-out loss is a mean over tokens, in nats, always by the general
path in the base's dtype. Rows are of `--data` (JSON Lines, CSV, Parquet, .txt; a folder of such), by default the
docstrings of Python's standard library. `--prepare` writes what was read of it to one file, for another machine.

`curves`: losses by step with `fast` off and on, one seed, the same rows. The yardstick is what rounding does to the
general path: the larger of its distances from itself with micro-batches of half the rows (`-rounding`, other orders of
summation) and from itself in float32 (`-float32`, the same weights). Fused layers keep all for the backward pass, their
input (`-input`), half of what there is to keep (`-half`, by `memory_budget`) or nothing on the device (`-host`); the
last two are on a GPU only. `fused-float32` is beside the general path in float32, where rounding hides little, and
curves part late, if at all: they coincide if that is no sooner than in half of the steps in which the general path
parts from itself with micro-batches of half the rows (`-float32-rounding`), and they stay within the yardstick.

`gradients`: fused layers and the general path in float32, and the general path in float64, at the same weights again
and again along a run of the general path in float32. So what differs has had no steps to grow in. They are alike if
fused layers are about as far from float64 as the general path is, and next to nothing from the general path.

`fp8`: held-out loss after 500 steps over that of the general path in bfloat16, seed by seed.

`--model tiny` is a random model that reads bytes, for trying the command on a CPU (with `--steps 3 --length 32`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fast_runs import read_texts, token_rows, worker

STEPS = {"curves": 200, "gradients": 200, "fp8": 500}
METHODS = {"curves": ["lora", "qlora", "dora"], "gradients": ["lora", "qlora", "dora"], "fp8": ["qlora"]}
FP8 = ("none", "backward", "most", "all")
#: How far runs that differ in rounding alone drift apart is chance, so another one may go somewhat further. A gradient
#: that is wrong in one projection goes many times as far.
TOLERANCE = 2.0
#: Two curves have parted where a step's losses differ by more, in nats. In float32 what rounding makes of the first
#: steps has to grow to that, a wrong gradient is there at once; fused layers get half of the steps that rounding takes,
#: and may never go as far as rounding to bfloat16 goes.
PARTED = 1e-4
#: Of float32 gradients of fused layers from the general path's at the same weights, over their size: the most that the
#: median over steps may be. SmolLM2-135M's are 3e-6 on a CPU, 8e-6 on an H100.
APART = 2e-5
#: Of held-out loss with fp8 over bfloat16's.
FP8_LIMIT = 1.005

# What is run, and what comes of it.


def ask(cell: dict, args: argparse.Namespace) -> dict:
    """A run in a process of its own."""
    command = [sys.executable, __file__, *args.given, "--rows", args.rows, "--cell", json.dumps(cell)]
    threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.limit, env={**quiet, **os.environ})
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {args.limit:g} s"}
    found = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if found:
        return json.loads(found[-1])
    last = (done.stderr.strip().splitlines() or ["no word"])[-1]
    return {"error": f"ended with exit code {done.returncode}: {last[:200]}"}


def curve_cells(args: argparse.Namespace) -> list[dict]:
    """The general path, what rounding makes of it, and the fused ones; each names the run it is held against."""
    found: list[dict] = []
    for method in args.methods or METHODS["curves"]:
        shared = {"method": method, "seed": args.seeds[0]}
        general, fused = {**shared, "fast": "off"}, {**shared, "fast": "on"}
        name = f"{method}-general"
        found += [
            {"name": name, "keys": general},
            {"name": f"{name}-rounding", "keys": {**general, "micro_batch_size": args.batch // 2}, "against": name},
            {"name": f"{name}-float32", "keys": general, "float32": True, "against": name},
            {
                "name": f"{name}-float32-rounding",
                "keys": {**general, "micro_batch_size": args.batch // 2},
                "float32": True,
                "against": f"{name}-float32",
            },
            {"name": f"{method}-fused", "keys": fused, "against": name},
            {"name": f"{method}-fused-float32", "keys": fused, "float32": True, "against": f"{name}-float32"},
        ]
        if method == "lora":
            ways = {"input": {"gradient_checkpointing": True}}
            if args.device == "cuda":
                ways |= {"half": {"memory_budget": "half"}, "host": {"memory_budget": "1MB"}}
            found += [
                {"name": f"lora-fused-{way}", "keys": fused | more, "against": name} for way, more in ways.items()
            ]
    return [{"study": "curves", **cell} for cell in found]


def gradient_cells(args: argparse.Namespace) -> list[dict]:
    """A run of the general path in float32 for each method."""
    return [
        {
            "study": "gradients",
            "name": f"{method}-gradients",
            "keys": {"method": method, "seed": args.seeds[0]},
            "float32": True,
        }
        for method in args.methods or METHODS["gradients"]
    ]


def fp8_cells(args: argparse.Namespace) -> list[dict]:
    """Each kind of product with each seed; bfloat16's by the general path."""
    return [
        {
            "study": "fp8",
            "name": f"{method} fp8 {fp8} seed {seed}",
            "keys": {"method": method, "fp8": fp8, "seed": seed, "fast": "off" if fp8 == "none" else "on"},
        }
        for method in args.methods or METHODS["fp8"]
        for seed in args.seeds
        for fp8 in FP8
    ]


def difference(run: dict, other: dict) -> dict[str, float]:
    """Between two curves, step by step, and between what they come to."""
    steps = [a - b for a, b in zip(run["losses"], other["losses"], strict=True)]
    sizes = [abs(step) for step in steps]
    found = {"mean": statistics.mean(sizes), "largest": max(sizes), "signed_mean": statistics.mean(steps)}
    return {**found, "held_out": run["after"] - other["after"]}


def parted(run: dict, other: dict) -> int:
    """The first step at which two curves have parted, counted from 1; one more than there are if none."""
    steps = enumerate(zip(run["losses"], other["losses"], strict=True), 1)
    return next((step for step, (a, b) in steps if abs(a - b) > PARTED), len(run["losses"]) + 1)


def of_curves(cells: list[dict]) -> list[dict]:
    """Each run beside the one it is held against; fused ones in units of what rounding does to the general path."""
    runs = {cell["name"]: cell for cell in cells if cell["study"] == "curves" and "error" not in cell}
    rows: list[dict] = []
    yardsticks: dict[str, list[dict]] = {}
    for name, run in runs.items():
        if run.get("against") in runs:
            rows.append({"name": name, "distance": difference(run, runs[run["against"]])})
            if run["against"].endswith("-float32"):
                rows[-1]["parted"] = parted(run, runs[run["against"]])
            elif run["keys"]["fast"] == "off":
                yardsticks.setdefault(run["keys"]["method"], []).append(rows[-1]["distance"])
    by_rounding = {row["name"]: row["parted"] for row in rows if row["name"].endswith("-float32-rounding")}
    for row in rows:
        keys = runs[row["name"]]["keys"]
        # Half a yardstick would be another one.
        if keys["fast"] == "on" and len(yardsticks.get(keys["method"], [])) == 2:
            times = {
                key: over(row["distance"][key], max(one[key] for one in yardsticks[keys["method"]]))
                for key in ("mean", "largest")
            }
            row |= {"of_yardstick": times, "coincides": max(times.values()) <= TOLERANCE}
            rounding = by_rounding.get(f"{keys['method']}-general-float32-rounding")
            if "parted" in row:
                early = rounding is None or 2 * row["parted"] < rounding
                row |= {"rounding_parted": rounding, "coincides": not early and max(times.values()) < 1}
    return rows


def over(part: float, whole: float) -> float:
    """A ratio; two runs without any rounding between them leave none to others."""
    return part / whole if whole else float(part != 0) * 1e9


def of_gradients(cells: list[dict]) -> list[dict]:
    """How far gradients lie from float64's and from each other, over the steps compared."""
    rows = []
    for cell in cells:
        if cell["study"] == "gradients" and "error" not in cell:
            far: dict[str, Any] = {}
            for name in ("general", "fused", "apart"):
                found = [one[name]["gradient"] for one in cell["compared"]]
                far[name] = {"median": statistics.median(found), "largest": max(found)}
            losses = max(abs(one["apart"]["loss"]) for one in cell["compared"])
            alike = far["apart"]["median"] <= APART and far["fused"]["median"] <= TOLERANCE * far["general"]["median"]
            rows.append({"name": cell["name"], **far, "losses_apart": losses, "alike": alike})
    return rows


def of_fp8(cells: list[dict]) -> list[dict]:
    """Held-out loss over that of bfloat16 with the same method and seed."""
    runs = [cell for cell in cells if cell["study"] == "fp8" and "error" not in cell]

    def cell_of(cell: dict) -> tuple[str, int]:
        return cell["keys"]["method"], cell["keys"]["seed"]

    base = {cell_of(cell): cell["after"] for cell in runs if cell["keys"]["fp8"] == "none"}
    return [
        {**cell["keys"], "before": cell["before"], "after": cell["after"], "ratio": cell["after"] / base[cell_of(cell)]}
        for cell in runs
        if cell_of(cell) in base
    ]


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    made = ["| " + " | ".join(line) + " |" for line in (head, *lines)]
    return "\n".join([made[0], "|---" * (made[0].count("|") - 1) + "|", *made[1:]])


def told_curves(cells: list[dict]) -> str:
    """Losses by step, a line for each twentieth of them, and how far runs lie apart."""
    runs = [cell for cell in cells if cell["study"] == "curves" and "error" not in cell]
    if not runs:
        return ""
    by_name = {run["name"]: run for run in runs}
    parts = []
    for method in dict.fromkeys(run["keys"]["method"] for run in runs):
        own = [run for run in runs if run["keys"]["method"] == method]
        count = len(own[0]["losses"])
        shown = sorted({*range(0, count, max(1, count // 20)), count - 1})
        steps = [[str(i + 1), *(f"{run['losses'][i]:.4f}" for run in own)] for i in shown]
        parts.append(table(["step", *(run["name"] for run in own)], steps))
    lines = []
    for row in of_curves(cells):
        run, far, times = by_name[row["name"]], row["distance"], row.get("of_yardstick")
        figures = [f"{far['mean']:.2e}", f"{far['largest']:.2e}", f"{far['signed_mean']:+.1e}"]
        beside = [] if times is None else [f"{times['mean']:.2f}, {times['largest']:.2f}"]
        if "parted" in row:
            beside.append(f"from step {row['parted']}" if row["parted"] <= len(run["losses"]) else "at no step")
        verdict = ["; ".join(beside), {True: "yes", False: "NO"}.get(row.get("coincides"), "")]
        ends = [f"{run['after']:.5f}", f"{far['held_out']:+.1e}"]
        lines.append([run["name"], run["against"], *figures, *verdict, *ends])
    head = ["run", "against", "mean distance", "largest", "signed mean"]
    head += [f"mean, largest of the yardstick; over {PARTED:g} apart"]
    head += ["coincides", "held-out loss", "its distance"]
    return "\n\n".join([*parts, table(head, lines)])


def told_gradients(cells: list[dict]) -> str:
    lines = [
        [
            row["name"],
            *(f"{row[key]['median']:.1e}, {row[key]['largest']:.1e}" for key in ("general", "fused", "apart")),
            f"{row['losses_apart']:.1e}",
            "yes" if row["alike"] else "NO",
        ]
        for row in of_gradients(cells)
    ]
    head = ["run", "general from float64: median, largest", "fused from float64", "fused from general"]
    return table([*head, "losses, largest", "alike"], lines) if lines else ""


def told_fp8(cells: list[dict]) -> str:
    rows = of_fp8(cells)
    if not rows:
        return ""
    lines = [
        [row["method"], str(row["seed"]), row["fp8"], *(f"{row[key]:.5f}" for key in ("before", "after", "ratio"))]
        for row in rows
    ]
    found = table(["method", "seed", "fp8", "held-out loss before", "after", "of bfloat16's"], lines)
    for method in dict.fromkeys(row["method"] for row in rows):
        for fp8 in FP8[1:]:
            ratios = [row["ratio"] for row in rows if (row["method"], row["fp8"]) == (method, fp8)]
            if ratios:
                mean, most = statistics.mean(ratios), max(ratios)
                verdict = "within" if most <= FP8_LIMIT else "NOT within"
                found += f"\n{method} fp8 {fp8}: mean {mean:.5f}, largest {most:.5f}, {verdict} {FP8_LIMIT - 1:.1%}"
    return found


def commit() -> str | None:
    """Of the tree that this file is in."""
    try:
        asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(asked, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def summary(found: dict) -> str:
    """What there is to say of a run at once."""
    if "compared" in found:
        return "; ".join([f"compared at {len(found['compared'])} steps", *found["said"]])
    losses = f"held-out loss {found['before']:.5f} to {found['after']:.5f}; {found['tokens_per_s']:,.0f} tokens/s, "
    return losses + "; ".join([f"{found['peak_memory_bytes'] / 1e9:.2f} GB", *found["said"]])


def measure(args: argparse.Namespace) -> list[dict]:
    """All runs of the studies asked for, several at a time, in the order of the list."""
    import torch

    from deltaw.train.run_folder import versions

    makers = {"curves": curve_cells, "gradients": gradient_cells, "fp8": fp8_cells}
    cells = [cell for study in args.studies for cell in makers[study](args)]
    cells = [cell | {"steps": args.steps or STEPS[cell["study"]]} for cell in cells]
    train, held = token_rows(read_texts(args.data), args)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    record: dict = {
        "device": device,
        "versions": versions(),
        "commit": commit(),
        **{key: getattr(args, key) for key in ("model", "length", "batch", "learning_rate", "jobs")},
        "train_rows": len(train),
        "held_out_rows": len(held),
        "cells": [],
    }
    print(f"{device}, {args.model}: {len(train):,} + {len(held):,} rows of {args.length} tokens\n", flush=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        args.rows = str(Path(folder) / "rows.pt")
        torch.save({"train": torch.tensor(train), "held": torch.tensor(held)}, args.rows)
        for cell, found in zip(cells, pool.map(lambda cell: ask(cell, args), cells), strict=True):
            record["cells"].append({**cell, **found})
            print(f"{cell['name']}: {found.get('error') or summary(found)}", flush=True)
            made = {"curves": of_curves, "gradients": of_gradients, "fp8": of_fp8}
            record |= {study: of(record["cells"]) for study, of in made.items()}
            if args.out:
                Path(args.out).write_text(json.dumps(record, indent=1) + "\n")
    return record["cells"]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="curves|gradients|fp8", help="all unless given")
    parser.add_argument("--prepare", metavar="FILE", help="write the text of --data to one JSON Lines file, and end")
    parser.add_argument("--data", help="a file or a folder of text; by default the standard library's docstrings")
    parser.add_argument("--model", default="smollm2-135m", help="as in `deltaw train`, or tiny")
    parser.add_argument("--methods", nargs="+", choices=METHODS["curves"], help=f"unless given: {METHODS}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="curves take the first")
    parser.add_argument("--steps", type=int, help=f"optimizer steps; unless given: {STEPS}")
    parser.add_argument("--length", type=int, default=512, help="tokens a row")
    parser.add_argument("--batch", type=int, default=8, help="rows a step, an even number")
    parser.add_argument("--held", type=int, default=128, help="rows held out")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--device", choices=["cuda", "cpu"], help="unless given: a GPU where there is one")
    parser.add_argument("--jobs", type=int, help="runs at a time; unless given: 6 on a GPU, 1 on a CPU")
    parser.add_argument("--limit", type=float, default=900, help="seconds a run")
    parser.add_argument("--out", help="JSON with every step's loss")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    return parser


def main(given: list[str] | None = None) -> None:
    """All runs, then the tables; ends with 1 where a run failed."""
    parser = arguments()
    args = parser.parse_args(given)
    args.given = sys.argv[1:] if given is None else given
    if unknown := sorted({*args.studies} - {*STEPS}):
        parser.error(f"unknown study {unknown[0]!r}: expected curves, gradients, fp8")
    if args.batch < 2 or args.batch % 2 or args.length < 2 or min(args.held, args.steps or 1, args.jobs or 1) < 1:
        parser.error("--batch is an even number, --length at least 2; --held, --steps and --jobs are at least 1")
    import torch

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.jobs = args.jobs or (6 if args.device == "cuda" else 1)
    args.studies = args.studies or list(STEPS)
    if args.cell:
        print("\nRESULT " + json.dumps(worker(json.loads(args.cell), args)), flush=True)
        return
    from deltaw import DeltawError

    try:
        if args.prepare:
            texts = read_texts(args.data)
            lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
            Path(args.prepare).write_text("".join(lines), encoding="utf-8")
            print(f"{len(texts):,} texts in {args.prepare}")
            return
        cells = measure(args)
    except DeltawError as error:
        sys.exit(f"error: {error}")
    for told in (told_curves(cells), told_gradients(cells), told_fp8(cells)):
        if told:
            print("\n" + told)
    if failed := [cell["name"] for cell in cells if "error" in cell]:
        sys.exit(f"{len(failed)} of {len(cells)} runs failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
