"""The adapter methods, their registry, and the host that puts them on a model."""

from deltaw.methods.adalora import AdaLoRA
from deltaw.methods.convert import to_lora
from deltaw.methods.dora import DoRA
from deltaw.methods.full import Full
from deltaw.methods.host import (
    adapt,
    adapter_names,
    adapter_parameters,
    delete_adapter,
    set_adapter,
    summary,
    unload,
)
from deltaw.methods.lora import LoRA
from deltaw.methods.neftune import NEFTune
from deltaw.methods.registry import METHODS, method_of

__all__ = [
    "METHODS",
    "AdaLoRA",
    "DoRA",
    "Full",
    "LoRA",
    "NEFTune",
    "adapt",
    "adapter_names",
    "adapter_parameters",
    "delete_adapter",
    "method_of",
    "set_adapter",
    "summary",
    "to_lora",
    "unload",
]
