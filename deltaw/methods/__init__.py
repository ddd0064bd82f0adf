"""The adapter methods, their registry, and the host that puts them on a model."""

from deltaw.methods.adalora import AdaLoRA
from deltaw.methods.bitfit import BitFit
from deltaw.methods.bottleneck import Bottleneck
from deltaw.methods.convert import to_lora
from deltaw.methods.dora import DoRA
from deltaw.methods.full import Full
from deltaw.methods.host import (
    adapt,
    adapter_names,
    adapter_parameters,
    delete_adapter,
    set_adapter,
    unload,
)
from deltaw.methods.lora import LoRA
from deltaw.methods.neftune import NEFTune
from deltaw.methods.prefix import PrefixTuning
from deltaw.methods.registry import METHODS, method_of
from deltaw.methods.summary import summary

__all__ = [
    "METHODS",
    "AdaLoRA",
    "BitFit",
    "Bottleneck",
    "DoRA",
    "Full",
    "LoRA",
    "NEFTune",
    "PrefixTuning",
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
