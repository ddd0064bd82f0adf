"""deltaw (ΔW): low-rank adaptation of large language models.

The public names below are loaded when first used, so that importing the package stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "LoRA": "deltaw.methods",
    "AdaLoRA": "deltaw.methods",
    "to_lora": "deltaw.methods",
    "DoRA": "deltaw.methods",
    "NF4": "deltaw.quant",
    "quantize_model": "deltaw.quant",
    "Full": "deltaw.methods",
    "NEFTune": "deltaw.methods",
    "BitFit": "deltaw.methods",
    "Bottleneck": "deltaw.methods",
    "PrefixTuning": "deltaw.methods",
    "adapt": "deltaw.methods",
    "adapter_names": "deltaw.methods",
    "adapter_parameters": "deltaw.methods",
    "delete_adapter": "deltaw.methods",
    "set_adapter": "deltaw.methods",
    "summary": "deltaw.methods",
    "unload": "deltaw.methods",
    "load_adapter": "deltaw.checkpoint",
    "load_adapters": "deltaw.checkpoint",
    "load_model": "deltaw.checkpoint",
    "load_tokenizer": "deltaw.checkpoint",
    "merge": "deltaw.checkpoint",
    "MergeReport": "deltaw.checkpoint",
    "save_adapter": "deltaw.checkpoint",
    "save_adapters": "deltaw.checkpoint",
    "save_model": "deltaw.checkpoint",
    "unmerge": "deltaw.checkpoint",
    "DeltawError": "deltaw.core.errors",
    "InputError": "deltaw.core.errors",
    "RunError": "deltaw.core.errors",
    "TrainConfig": "deltaw.train",
    "run_federation": "deltaw.studies.federate",
    "run_training": "deltaw.studies.job",
    "shrink": "deltaw.studies.shrinking",
    "shrink_adapter": "deltaw.studies.shrinking",
    "rank_advice": "deltaw.studies.shrinking",
    "combine": "deltaw.studies.combining",
}

__all__ = [
    "NF4",
    "AdaLoRA",
    "BitFit",
    "Bottleneck",
    "DeltawError",
    "DoRA",
    "Full",
    "InputError",
    "LoRA",
    "MergeReport",
    "NEFTune",
    "PrefixTuning",
    "RunError",
    "TrainConfig",
    "__version__",
    "adapt",
    "adapter_names",
    "adapter_parameters",
    "combine",
    "delete_adapter",
    "load_adapter",
    "load_adapters",
    "load_model",
    "load_tokenizer",
    "merge",
    "quantize_model",
    "rank_advice",
    "run_federation",
    "run_training",
    "save_adapter",
    "save_adapters",
    "save_model",
    "set_adapter",
    "shrink",
    "shrink_adapter",
    "summary",
    "to_lora",
    "unload",
    "unmerge",
]

if TYPE_CHECKING:
    from deltaw.checkpoint import (
        MergeReport,
        load_adapter,
        load_adapters,
        load_model,
        load_tokenizer,
        merge,
        save_adapter,
        save_adapters,
        save_model,
        unmerge,
    )
    from deltaw.core.errors import DeltawError, InputError, RunError
    from deltaw.methods import (
        AdaLoRA,
        BitFit,
        Bottleneck,
        DoRA,
        Full,
        LoRA,
        NEFTune,
        PrefixTuning,
        adapt,
        adapter_names,
        adapter_parameters,
        delete_adapter,
        set_adapter,
        summary,
        to_lora,
        unload,
    )
    from deltaw.quant import NF4, quantize_model
    from deltaw.studies.combining import combine
    from deltaw.studies.federate import run_federation
    from deltaw.studies.job import run_training
    from deltaw.studies.shrinking import rank_advice, shrink, shrink_adapter
    from deltaw.train import TrainConfig


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'deltaw' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
