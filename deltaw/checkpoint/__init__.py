"""Loading and saving: models, adapters in PEFT's layout, merging."""

from deltaw.checkpoint.adapters import load_adapter, load_adapters, save_adapter, save_adapters, saved_adapters
from deltaw.checkpoint.merging import MergeReport, merge, unmerge
from deltaw.checkpoint.model_files import load_model, load_tokenizer, save_model

__all__ = [
    "MergeReport",
    "load_adapter",
    "load_adapters",
    "load_model",
    "load_tokenizer",
    "merge",
    "save_adapter",
    "save_adapters",
    "save_model",
    "saved_adapters",
    "unmerge",
]
