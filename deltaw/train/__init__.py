"""The training loop on transformers' Trainer, its configuration and the run folder."""

from deltaw.train.config import TrainConfig, read_config
from deltaw.train.loop import Fitted, fit
from deltaw.train.run_folder import RunFolder

__all__ = ["Fitted", "RunFolder", "TrainConfig", "fit", "read_config"]
