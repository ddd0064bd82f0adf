"""Quickstart: a real model, real rated sentences, a LoRA, and what it was good for, in minutes on a laptop.

SmolLM2-135M-Instruct and the sentences come from pinned packages of a Python package index; nothing else is needed.
The task: is a snippet of a film review positive or negative, as twenty raters saw it?
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from deltaw.core.files import write_text
from deltaw.core.generators import derived_seed
from deltaw.data.example_data import vader_rows
from deltaw.models.embedded import smollm2_folder
from deltaw.models.packages import cache_folder
from deltaw.studies.job import run_job
from deltaw.train import RunFolder
from deltaw.train.config import make_config

MODEL = "smollm2-135m"
TRAIN_ROWS = 800
TEST_ROWS = 300
LABEL_PROMPT = "Review: {text}\nSentiment:"


def quickstart(
    *,
    output: str | None = None,
    seed: int = 0,
    steps: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Trains a LoRA on 800 rated sentences and measures it on 300 others, beside two simple baselines.

    Args:
        output: the run folder; None means `runs/quickstart`, or the next free name after it.
        seed: of the choice of rows and of training; the same seed gives the same result on the same machine.
        steps: optimizer steps, for a shorter look; None means the whole.
        cache: where downloads are kept; None means the user's cache.
        say: takes lines of progress.

    Returns:
        The run folder.

    Raises:
        RunError: the packages cannot be fetched; the line says what is missing and what to run instead.
    """
    folder = next_free("runs/quickstart") if output is None else Path(output)
    smollm2_folder(cache=cache, progress=_progress(say))
    train, test = write_rows(cache_folder() if cache is None else Path(cache), seed)
    config = make_config(
        {
            "model": MODEL,
            "data": str(train),
            "test_data": str(test),
            "output": str(folder),
            "label_prompt": LABEL_PROMPT,
            "method": "lora",
            "r": 8,
            "alpha": 16,
            "target_modules": "all-linear",
            "learning_rate": 1e-3,
            "epochs": 1,
            "max_steps": steps,
            "batch_size": 16,
            # Four at a time of like length: on a CPU every padded position costs.
            "micro_batch_size": 4,
            "eval_batch_size": 32,
            "seed": seed,
        }
    )
    run: RunFolder = run_job(config, command=f"deltaw quickstart --seed {seed}", say=say)
    return run.path


def write_rows(cache: Path, seed: int) -> tuple[Path, Path]:
    """Draws the rows of a seed and writes them into the cache: (training file, test file)."""
    rows = vader_rows("movies", classes=2, cache=cache)
    order = sorted(range(len(rows)), key=lambda index: derived_seed(seed, "quickstart", rows[index]["text"]))
    files = []
    for name, chosen in (
        ("train", order[:TRAIN_ROWS]),
        ("test", order[TRAIN_ROWS : TRAIN_ROWS + TEST_ROWS]),
    ):
        file = cache / "quickstart" / f"film-reviews-{name}-{seed}.jsonl"
        lines = [
            json.dumps({"text": rows[index]["text"], "label": rows[index]["label"]}, ensure_ascii=False)
            for index in chosen
        ]
        write_text(file, "\n".join(lines) + "\n")
        files.append(file)
    return files[0], files[1]


def next_free(name: str) -> Path:
    """`name`, or the first of `name-2`, `name-3`, ... that does not exist."""
    count = 1
    while (path := Path(name if count == 1 else f"{name}-{count}")).exists():
        count += 1
    return path


def _progress(say: Callable[[str], None]) -> Callable[[str, int, int], None]:
    """Says how far downloads and conversions are, at every tenth."""
    last: dict[str, int] = {}

    def report(what: str, done: int, total: int) -> None:
        tenth = 10 * done // total if total else 0
        if tenth != last.get(what):
            last[what] = tenth
            say(f"{what}: {10 * tenth} %")

    return report
