"""What the tests of dying run in processes of their own: a training that kills itself at a chosen moment."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any


def train_here(keys: dict[str, Any]) -> None:
    """A whole run."""
    from deltaw.studies.job import run_training as train

    train(**keys)


def resume_here(folder: str) -> None:
    """Goes on with it."""
    from deltaw.studies.job import resume

    resume(folder)


def train_and_die(keys: dict[str, Any], moment: str, count: int) -> None:
    """A run that gets SIGKILL when it comes to `moment` for the `count`-th time."""
    die_at(moment, count)
    train_here(keys)


def resume_and_die(folder: str, moment: str, count: int) -> None:
    """A resumed run that dies again."""
    die_at(moment, count)
    resume_here(folder)


def die_at(moment: str, count: int) -> None:
    """Makes this process die when a function is entered for the `count`-th time."""
    import deltaw.studies.job
    import deltaw.train.trainer

    trainer = deltaw.train.trainer
    places: dict[str, tuple[Any, str]] = {
        "micro-batch": (trainer.DeltawTrainer, "training_step"),
        "evaluating": (trainer.DeltawTrainer, "evaluate"),
        "writing": (trainer.DeltawTrainer, "_save_rng_state"),
        "written": (trainer, "sync_folder"),
        "renamed": (trainer.DeltawTrainer, "_forget_old"),
        "forgetting": (trainer.shutil, "rmtree"),
        "ended": (deltaw.studies.job, "_save"),
        "saved": (deltaw.studies.job, "_finish"),
        "reporting": (deltaw.studies.job, "write_report"),
    }
    holder, name = places[moment]
    own = getattr(holder, name)
    left = count

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        # Only the removal of whole checkpoints counts, and it is half done when the process dies.
        checkpoint = moment != "forgetting" or (Path(args[0]).name.startswith("checkpoint-") and Path(args[0]).exists())
        left -= checkpoint
        if left == 0 and checkpoint:
            if moment == "forgetting":
                (Path(args[0]) / "optimizer.pt").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return own(*args, **kwargs)

    setattr(holder, name, dying)
