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
parts from itself with micro-batches of half the rows (`-float32-rounding`).

`gradients`: fused layers and the general path in float32, and the general path in float64, at the same weights again
and again along a run of the general path in float32. So what differs has had no steps to grow in.

`fp8`: held-out loss after 500 steps over that of the general path in bfloat16, seed by seed.

`--model tiny` is a random model that reads bytes, for trying the command on a CPU (with `--steps 3 --length 32`).
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

STEPS = {"curves": 200, "gradients": 200, "fp8": 500}
METHODS = {"curves": ["lora", "qlora", "dora"], "gradients": ["lora", "qlora", "dora"], "fp8": ["qlora"]}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FP8 = ("none", "backward", "most", "all")
#: How far runs that differ in rounding alone drift apart is chance, so another one may go somewhat further. A gradient
#: that is wrong in one projection goes many times as far.
TOLERANCE = 2.0
#: Two curves have parted where a step's losses differ by more, in nats. In float32 what rounding makes of the first
#: steps has to grow to that, a wrong gradient is there at once; fused layers get half of the steps that rounding takes.
PARTED = 1e-3
#: Steps of a run at which gradients are compared.
COMPARED = 25
#: Of held-out loss with fp8 over bfloat16's.
FP8_LIMIT = 1.005
FILES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
#: The tiny model's tokens are bytes, and this one for a document's end.
END = 256

# Text.


def library_texts() -> list[str]:
    """Docstrings of the standard library, which every machine has."""
    found = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(file.read_bytes())
        nodes = (n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef)))
        found += [text for node in nodes if (text := ast.get_docstring(node)) and len(text) > 100]
    return found


def texts_of(row: Any) -> str:
    """A row of any layout as plain text."""
    if hasattr(row, "completion"):
        return f"{row.prompt.rstrip()} {row.completion}"
    if hasattr(row, "messages"):
        return "\n".join(message["content"] for message in row.messages)
    return row.text if hasattr(row, "text") else " ".join(row.tokens)


def read_texts(source: str | None) -> list[str]:
    """The documents of a file, or of all files below a folder; each once."""
    from deltaw.core.errors import InputError
    from deltaw.data import read_rows

    if source is None:
        return list(dict.fromkeys(library_texts()))
    place = Path(source)
    files = sorted(file for file in place.rglob("*") if file.suffix in FILES) if place.is_dir() else [place]
    found: list[str] = []
    for file in files:
        if file.suffix == ".txt":
            if not file.is_file():
                raise InputError(f"no such file: {file}")
            found += [part.strip() for part in file.read_text(encoding="utf-8").split("\n\n") if part.strip()]
        else:
            found += [texts_of(row) for row in read_rows(file).rows]
    if not found:
        raise InputError(f"{source} holds no text: expected files that end in {', '.join(FILES)}")
    return list(dict.fromkeys(found))


def token_rows(texts: list[str], args: argparse.Namespace) -> tuple[list[list[int]], list[list[int]]]:
    """Shuffled documents end to end, cut into rows: those to train on, and others held out."""
    import torch

    from deltaw.core.errors import InputError
    from deltaw.core.generators import generator

    order = torch.randperm(len(texts), generator=generator(0, "documents")).tolist()
    shuffled = [texts[i] for i in order]
    if args.model == "tiny":
        end, found = END, [[*text.encode()] for text in shuffled]
    else:
        from deltaw import load_tokenizer

        tokenizer = load_tokenizer(args.model)
        # Only rows are as long as the model takes, not documents.
        tokenizer.model_max_length = sys.maxsize
        end, found = tokenizer.eos_token_id, tokenizer(shuffled, add_special_tokens=False)["input_ids"]
    stream = [token for document in found for token in (*document, end)]
    rows = [stream[i : i + args.length] for i in range(0, len(stream) - args.length + 1, args.length)]
    if len(rows) < args.held + args.batch:
        raise InputError(
            f"the text has {len(rows)} rows of {args.length} tokens: expected {args.held} to hold out and at least "
            f"{args.batch} to train on; give more --data, or a smaller --length or --held"
        )
    return rows[: -args.held], rows[-args.held :]


# One run, in its own process.


def base_model(args: argparse.Namespace, config: Any):
    import deltaw as dw

    if args.model != "tiny":
        return dw.load_model(args.model, dtype="bfloat16", device=args.device, quantize=config.quantization)
    model = tiny_model(args.length).to(args.device)
    return dw.quantize_model(model, config.quantization) if config.quantization else model


def tiny_model(length: int) -> Any:
    """Two layers with random weights, in bfloat16."""
    import torch
    import transformers

    from deltaw.core.generators import generator

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=END + 1, num_key_value_heads=2, max_position_embeddings=length, eos_token_id=END, **shape
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    draw = generator(0, "tiny model")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=config.hidden_size**-0.5, generator=draw)
    return model


def half_budget(model: Any, tokens: int) -> int:
    """A `memory_budget` under which layers can keep about half of what there is to keep."""
    import torch

    from deltaw.fuse.keep import BUDGET_SLACK, HEAD_BYTES, kept_bytes

    config = model.config
    sizes = {
        "width": config.hidden_size, "inner": config.intermediate_size, "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads, "itemsize": model.dtype.itemsize,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    }  # fmt: skip
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    # Beside gradients and two states of the optimizer, the loop keeps what was there at first.
    fixed = torch.cuda.memory_allocated() + 4 * trained + HEAD_BYTES
    kept = config.num_hidden_layers * sum(kept_bytes(keep, tokens, **sizes) for keep in ("all", "input")) / 2
    return int((fixed + kept) / (1 - BUDGET_SLACK))


def held_out_loss(model: Any, rows: list[list[int]], batch: int) -> float:
    """Mean over tokens in nats, by the model's own layers."""
    import torch

    from deltaw.data import Collator
    from deltaw.train.losses import SummedLoss

    loss, collate = SummedLoss(model, "causal-lm"), Collator("causal-lm", 0)
    model.eval()
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(rows), batch):
            inputs = collate([{"input_ids": row, "labels": row} for row in rows[start : start + batch]])
            given = {key: value.to(model.device) for key, value in inputs.items()}
            total += float(loss(model, given))
    return total / (len(rows) * (len(rows[0]) - 1))


def prepared(cell: dict, args: argparse.Namespace) -> tuple[Any, Any]:
    """The run's configuration, and the model with its adapter."""
    import deltaw as dw
    from deltaw.train.config import make_config

    steps = cell["steps"]
    keys = {
        "r": 16, "alpha": 32, "target_modules": TARGETS, "learning_rate": args.learning_rate,
        "max_length": args.length, "batch_size": args.batch, "micro_batch_size": args.batch, "max_steps": steps,
        "log_every": 1, "save_every": steps, **cell["keys"],
    }  # fmt: skip
    half = keys.get("memory_budget") == "half"
    config = make_config({**keys, "memory_budget": None} if half else keys)
    model = base_model(args, config)
    if cell.get("float32"):
        model.float()
    dw.adapt(model, config.method_config, name="default", seed=config.seed)
    if half:
        config = make_config({**keys, "memory_budget": half_budget(model, args.batch * args.length)})
    return config, model


def run_cell(cell: dict, args: argparse.Namespace) -> dict:
    """Trains once: losses by step, and held out before and after."""
    import torch

    from deltaw.data import Collator
    from deltaw.train import RunFolder, fit

    rows = torch.load(args.rows, weights_only=True)
    held = rows["held"].tolist()
    config, model = prepared(cell, args)
    before = held_out_loss(model, held, args.batch)
    examples = [{"input_ids": row, "labels": row} for row in rows["train"].tolist()]
    said: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder), {})
        fitted = fit(model, "default", examples, Collator("causal-lm", 0), config, run, say=said.append)
        lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": [line["loss"] for line in lines if "loss" in line],
        "before": before,
        "after": held_out_loss(model, held, args.batch),
        "said": [line for line in said if not line.startswith("step ")],
        "memory_budget": config.memory_budget,
        "train_s": fitted.seconds,
        "tokens_per_s": fitted.tokens / fitted.seconds,
        "peak_memory_bytes": fitted.peak_memory_bytes,
    }


def follow(cell: dict, args: argparse.Namespace) -> dict:
    """Trains by the general path, and compares losses and gradients on the way."""
    import torch

    from deltaw.data import Collator
    from deltaw.fuse.decoder import install_blocks, uninstall_blocks
    from deltaw.fuse.head import install_loss_head, uninstall_loss_head
    from deltaw.train.losses import SummedLoss

    rows = torch.load(args.rows, weights_only=True)["train"].tolist()
    config, model = prepared(cell, args)
    model.train().config.use_cache = False
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate)
    summed, collate = SummedLoss(model, "causal-lm"), Collator("causal-lm", 0)

    def computed(batch: list[list[int]]) -> tuple[float, Any]:
        """The mean loss and all gradients, in one tensor of float64."""
        optimizer.zero_grad()
        inputs = collate([{"input_ids": row, "labels": row} for row in batch])
        given = {key: value.to(model.device) for key, value in inputs.items()}
        loss = summed(model, given) / (len(batch) * (len(batch[0]) - 1))
        loss.backward()
        return float(loss.detach()), torch.cat([parameter.grad.double().flatten() for parameter in trained])

    compared, layers = [], "0 of 0"
    for step in range(cell["steps"]):
        batch = [rows[(step * args.batch + i) % len(rows)] for i in range(args.batch)]
        general = computed(batch)
        if step % max(1, cell["steps"] // COMPARED) == 0:
            install_loss_head(model)
            fused_layers, all_layers, _ = install_blocks(model)
            layers = f"{fused_layers} of {all_layers}"
            fused = computed(batch)
            uninstall_blocks(model)
            uninstall_loss_head(model)
            model.double()
            exact = computed(batch)
            model.float()
            pairs = {"general": (general, exact), "fused": (fused, exact), "apart": (fused, general)}
            far = {
                name: {"loss": a[0] - b[0], "gradient": float((a[1] - b[1]).norm() / b[1].norm())}
                for name, (a, b) in pairs.items()
            }
            compared.append({"step": step + 1, "loss": general[0], **far})
            # What the other two left in their place.
            general = computed(batch)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return {"compared": compared, "said": [f"{layers} layers fused"]}


def worker(cell: dict, args: argparse.Namespace) -> dict:
    """What one process has to say; its last line of output."""
    try:
        return follow(cell, args) if cell["study"] == "gradients" else run_cell(cell, args)
    except Exception as error:
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


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


# What is run, and what comes of it.


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
        if keys["fast"] == "on" and "parted" in row:
            rounding = by_rounding.get(f"{keys['method']}-general-float32-rounding")
            if rounding is not None:
                row |= {"rounding_parted": rounding, "coincides": 2 * row["parted"] >= rounding}
        # Half a yardstick would be another one.
        elif keys["fast"] == "on" and len(yardsticks.get(keys["method"], [])) == 2:
            times = {
                key: over(row["distance"][key], max(one[key] for one in yardsticks[keys["method"]]))
                for key in ("mean", "largest")
            }
            row |= {"of_yardstick": times, "coincides": max(times.values()) <= TOLERANCE}
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
            no_farther = far["fused"]["median"] <= TOLERANCE * far["general"]["median"]
            rows.append({"name": cell["name"], **far, "losses_apart": losses, "no_farther": no_farther})
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
        beside = ""
        if times is not None:
            beside = f"{times['mean']:.2f}, {times['largest']:.2f}"
        elif "parted" in row:
            beside = f"from step {row['parted']}" if row["parted"] <= len(run["losses"]) else "at no step"
        verdict = [beside, {True: "yes", False: "NO"}.get(row.get("coincides"), "")]
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
            "yes" if row["no_farther"] else "NO",
        ]
        for row in of_gradients(cells)
    ]
    head = ["run", "general from float64: median, largest", "fused from float64", "fused from general"]
    return table([*head, "losses, largest", f"fused no farther (median, {TOLERANCE:g} times)"], lines) if lines else ""


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


def done(found: dict) -> str:
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
            print(f"{cell['name']}: {found.get('error') or done(found)}", flush=True)
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
