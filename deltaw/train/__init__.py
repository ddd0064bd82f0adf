"""The training loop on transformers' Trainer, its configuration and the run folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltaw.train.config import TrainConfig, read_config
from deltaw.train.run_folder import RunFolder

if TYPE_CHECKING:
    from deltaw.train.loop import Fitted, fit

__all__ = ["Fitted", "RunFolder", "TrainConfig", "fit", "read_config"]


def __getattr__(name: str) -> Any:
    # transformers' Trainer takes seconds to import, and `deltaw train --help` needs the configuration alone.
    if name in ("Fitted", "fit"):
        from deltaw.train import loop

        return getattr(loop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
