"""What a run of `fast_quality.py` does in its own process: reads its rows, trains its model, compares on the way."""

from __future__ import annotations

import argparse
import ast
import json
import sys
import sysconfig
import tempfile
import warnings
from pathlib import Path
from typing import Any

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
#: Steps of a run at which gradients are compared.
COMPARED = 25
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


# Runs.


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
        if compares := step % max(1, cell["steps"] // COMPARED) == 0:
            install_loss_head(model)
            fused_layers, all_layers, _ = install_blocks(model)
            layers = f"{fused_layers} of {all_layers}"
            fused = computed(batch)
            uninstall_blocks(model)
            uninstall_loss_head(model)
            model.double()
            exact = computed(batch)
            model.float()
        # Last, so that its gradients are those that are left to train with.
        general = computed(batch)
        if compares:
            pairs = {"general": (general, exact), "fused": (fused, exact), "apart": (fused, general)}
            far = {
                name: {"loss": a[0] - b[0], "gradient": float((a[1] - b[1]).norm() / b[1].norm())}
                for name, (a, b) in pairs.items()
            }
            compared.append({"step": step + 1, "loss": general[0], **far})
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return {"compared": compared, "said": [f"{layers} layers fused"]}


def worker(cell: dict, args: argparse.Namespace) -> dict:
    """What one process has to say; its last line of output."""
    try:
        return follow(cell, args) if cell["study"] == "gradients" else run_cell(cell, args)
    except Exception as error:
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
