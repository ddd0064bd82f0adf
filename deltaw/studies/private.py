"""A training's privacy: how much noise, said, recorded, and charged to the ledger before the first step."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from deltaw.data.encode import Encoded
from deltaw.studies.rows import RunRows
from deltaw.train import RunFolder, TrainConfig
from deltaw.train.loop import Fitted, optimizer_steps
from deltaw.train.private import PrivacyPlan, plan_privacy, privacy_record, rows_of_units

Say = Callable[[str], None]


def throughput(fitted: Fitted, private: PrivacyPlan | None) -> dict[str, Any]:
    """Tokens and their rate; {} for a private run, since how many were drawn tells of the rows."""
    if private is not None:
        return {}
    return {"tokens": fitted.tokens, "tokens_per_s": round(fitted.tokens / fitted.seconds, 1)}


def charged_plan(run: RunFolder, config: TrainConfig, rows: RunRows, encoded: Encoded, say: Say) -> PrivacyPlan:
    """How the run is private, said, recorded and charged to the ledger."""
    groups = [rows.train.groups[i] for i in encoded.kept] if config.unit is not None else None
    units = rows_of_units(groups, len(encoded.examples))
    steps = optimizer_steps(config, len(units))
    ledger = open_ledger(config, len(units))
    known = run.record.get("privacy")
    if known is not None:
        # A resumed run keeps to what it was charged for.
        config = dataclasses.replace(config, noise_multiplier=known["noise_multiplier"], target_epsilon=None)
    plan = plan_privacy(config, units, steps=steps)
    record = privacy_record(plan, config) if known is None else known
    if ledger is not None:
        key = record.setdefault("ledger_key", f"{run.record['started']} {run.path.name} {os.urandom(8).hex()}")
        # Recorded before it is charged: a run that is killed between the two charges the same key when it is resumed.
        run.save(privacy=record)
        spent = ledger.charge(key, plan.spec, data_sha256=rows.train.sha256)
        record["ledger_head"] = ledger.head
        say(f"ledger {config.ledger}: epsilon {spent.epsilon:.4g} of {ledger.budget_epsilon:g} is spent with this run")
    run.save(privacy=record)
    say(f"private: noise multiplier {plan.noise_multiplier:.4g}, clipping norm {plan.max_grad_norm:g}")
    say(f"private: {record['statement']}")
    if config.baselines:
        say("baselines are not measured under dp: they are functions of the training rows without noise")
    return plan


def open_ledger(config: TrainConfig, units: int) -> Any:
    """The run's ledger; None where it has none."""
    if config.ledger is None:
        return None
    from deltaw.privacy.ledger import Ledger

    delta = config.delta
    if delta is None and config.budget_epsilon is not None:
        delta = min(1e-5, 0.1 / units)
    unit = "example" if config.unit is None else "customer"
    return Ledger.open(config.ledger, config.budget_epsilon, delta, unit=unit)
