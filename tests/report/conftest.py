"""Run folders like those that a training writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_runs import CONFIG, HOSTILE, lines_of, made_examples, made_metrics, made_run, made_sites


@pytest.fixture
def run() -> dict[str, Any]:
    return made_run()


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run folder; a part that is None gets no file."""

    def make(
        run: dict[str, Any],
        *,
        config: str | None = CONFIG,
        metrics: list[dict[str, Any]] | None = None,
        examples: list[dict[str, Any]] | None = None,
        name: str = "run",
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
        if config is not None:
            (folder / "config.yaml").write_text(config, encoding="utf-8")
        if metrics is not None:
            (folder / "metrics.jsonl").write_text(lines_of(metrics), encoding="utf-8")
        if examples is not None:
            (folder / "examples.jsonl").write_text(lines_of(examples), encoding="utf-8")
        return folder

    return make


@pytest.fixture
def full_folder(run: dict[str, Any], make_folder: Callable[..., Path]) -> Path:
    """A finished run with every part."""
    return make_folder(run, metrics=made_metrics(), examples=made_examples())


@pytest.fixture
def hostile_folder(make_folder: Callable[..., Path]) -> Path:
    """A run whose every string is hostile."""
    turn = iter(range(10**6))

    def bad() -> str:
        return HOSTILE[next(turn) % len(HOSTILE)]

    def poison(value: Any) -> Any:
        if isinstance(value, str):
            return bad()
        if isinstance(value, list):
            return [poison(item) for item in value]
        if isinstance(value, dict):
            return {key: poison(item) for key, item in value.items()}
        return value

    found = poison(made_run() | {"error": "x"})
    found["metrics"]["labels"] = HOSTILE[:3]
    found["method"]["sites"] = [poison(site) for site in made_sites()[:20]]
    found["method"]["config"] |= {text: text for text in HOSTILE}
    found["versions"] |= {text: text for text in HOSTILE}
    found["model"] |= {text: text for text in HOSTILE}
    found["cost"] |= {text: 1.5 for text in HOSTILE}
    found["metrics"]["baselines"] |= {text: {"accuracy": 0.5, text: 0.5} for text in HOSTILE[:6]}
    found["data"] |= {text: found["data"]["train"] for text in HOSTILE}
    examples = [{"prompt": t, "reference": bad(), "before": bad(), "after": t} for t in HOSTILE]
    examples += [{"prompt": "long " * 3000, "reference": ["a", "<b>"], "before": None, "after": {"<i>": "<u>"}}]
    metrics = [{"step": i, "loss": 1.0, "eval_" + text: 0.5, "eval_loss": 1} for i, text in enumerate(HOSTILE)]
    return make_folder(found, config="\n".join(HOSTILE[:-1]), metrics=metrics, examples=examples)
