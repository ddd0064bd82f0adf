"""What a training writes into a run folder, made by code."""

from __future__ import annotations

import json
import math
import random
from typing import Any

SHAPES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
CONFIG = """\
model: SmolLM2-135M-Instruct
data: reviews-train.jsonl
test: reviews-test.jsonl
output: runs/reviews
task: instruct
method: lora
r: 8
alpha: 16.0
target_modules: all-linear
learning_rate: 0.0002
warmup: 0.05
batch_size: 32
epochs: 2.0
seed: 0
"""


def made_sites() -> list[dict[str, Any]]:
    return [
        {
            "name": f"model.layers.{layer}.{name}",
            "kind": "linear",
            "shape": list(shape),
            "r": 8,
            "scale": 2.0,
            "parameters": 8 * sum(shape),
        }
        for layer in range(30)
        for name, shape in SHAPES.items()
    ]


def made_run() -> dict[str, Any]:
    sites = made_sites()
    trainable = sum(site["parameters"] for site in sites)
    total = 134_515_008 + trainable
    split = {"layout": "label", "truncated": 0, "dropped": 0, "empty": 0, "bad": 0}
    return {
        "format": 1,
        "deltaw": "0.1.0",
        "status": "done",
        "started": "2026-11-22T03:00:00Z",
        "command": "deltaw train --config reviews.yaml --output runs/reviews",
        "versions": {"python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0"},
        "commit": "d2c1a35",
        "seed": 0,
        "device": {"type": "cpu", "name": "Intel Xeon Platinum", "threads": 2, "dtype": "bfloat16"},
        "task": "instruct",
        "model": {
            "source": "/home/ada/.cache/deltaw/models/SmolLM2-135M-Instruct",
            "family": "llama",
            "class": "LlamaForCausalLM",
            "parameters": 134_515_008,
            "tied": True,
        },
        "data": {
            "train": split
            | {"source": "reviews-train.jsonl", "rows": 800, "tokens": 30_112, "loss_tokens": 1_611, "truncated": 3},
            "eval": split | {"source": "reviews-train.jsonl", "rows": 100, "tokens": 3_704, "loss_tokens": 203},
            "test": split
            | {"source": "reviews-test.jsonl", "rows": 200, "tokens": 7_530, "loss_tokens": 402, "bad": 1},
        },
        "method": {
            "name": "lora",
            "config": {"r": 8, "alpha": 16, "dropout": 0.0, "target_modules": "all-linear", "rslora": False},
            "sites": sites,
            "trainable_parameters": trainable,
            "total_parameters": total,
            "share": trainable / total,
            "adapter_bytes": 9_800_000,
        },
        "metrics": {
            "before": {
                "accuracy": 0.515,
                "macro_f1": 0.402,
                "macro_auroc": 0.631,
                "loss": 1.912,
                "perplexity": 6.767,
                "tokens": 402,
            },
            "after": {
                "accuracy": 0.83,
                "macro_f1": 0.817,
                "macro_auroc": 0.914,
                "loss": 0.402,
                "perplexity": 1.495,
                "tokens": 402,
            },
            "baselines": {
                "majority": {"accuracy": 0.445, "macro_f1": 0.205},
                "tfidf_logreg": {"accuracy": 0.705, "macro_f1": 0.668, "macro_auroc": 0.842},
            },
            "labels": ["negative", "neutral", "positive"],
            "confusion": {
                "before": [[40, 5, 16], [22, 6, 22], [27, 5, 57]],
                "after": [[51, 6, 4], [7, 36, 7], [2, 8, 79]],
            },
        },
        "cost": {
            "train_s": 141.3,
            "eval_s": 23.9,
            "total_s": 171.0,
            "steps": 50,
            "tokens": 60_224,
            "tokens_per_s": 426.2,
            "peak_memory_bytes": 2_214_592_512,
            "adapter_bytes": 9_800_000,
        },
    }


def made_metrics(steps: int = 50) -> list[dict[str, Any]]:
    draw = random.Random(0)
    lines: list[dict[str, Any]] = []
    warmup = max(1, steps // 20)
    for step in range(1, steps + 1):
        up = (
            step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
        )
        loss = 0.38 + 1.5 * math.exp(-step / (steps / 5)) + draw.gauss(0, 0.04)
        lines.append(
            {
                "step": step,
                "epoch": 2 * step / steps,
                "loss": loss,
                "learning_rate": 2e-4 * up,
                "grad_norm": 0.5,
                "tokens": 1204 * step,
                "elapsed_s": 2.8 * step,
            }
        )
        if step % max(1, steps // 10) == 0:
            held_out = 0.42 + 1.3 * math.exp(-step / (steps / 5))
            lines.append({"step": step, "eval_loss": held_out, "eval_accuracy": 0.83 - 0.3 * math.exp(-step / 12)})
    return lines


def made_examples() -> list[dict[str, Any]]:
    rows = [
        ("The plot drags, but the acting more than makes up for it.", "positive", "negative", "positive"),
        ("It arrived on Tuesday in a brown box.", "neutral", "positive", "neutral"),
        ("I would not wish this phone on anyone.", "negative", "negative", "negative"),
        ("Not bad at all!", "positive", "negative", "positive"),
        ("The battery lasts about as long as the old one did.", "neutral", "negative", "negative"),
        ("A masterpiece, if you are fond of watching paint dry.", "negative", "positive", "positive"),
        ("Great sound, comfortable, and cheaper than the rest.", "positive", "positive", "positive"),
        ("They never answered my three letters.", "negative", "neutral", "negative"),
        ("The manual is available in eleven languages.", "neutral", "positive", "neutral"),
        ("Best coffee in town; the queue proves it.", "positive", "positive", "positive"),
    ]
    ask = "Decide the sentiment of the sentence: negative, neutral or positive.\n\nSentence: {}\nSentiment:"
    return [{"prompt": ask.format(t), "reference": r, "before": b, "after": a} for t, r, b, a in rows]


def lines_of(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


HOSTILE = [
    "<script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    "\"><svg onload='alert(1)'>",
    "' onmouseover=alert(1) x='",
    "&lt;b&gt; &amp; & <!-- ]]> -->",
    "W" * 400,
    "\u202eright to left override \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "two\nlines\r\nand\ta tab",
    "nul \x00 escape \x1b[31m lone \ud800 end",
]
