"""What is quantised, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deltaw.core.errors import InputError

#: Values that may share a scale: the sizes of the reference format.
BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class NF4:
    """4-bit NormalFloat for a model's linear modules.

    Attributes:
        double_quant: store the scales in 8 bits: 4.127 bits a parameter instead of 4.5.
        block_size: values that share a scale.
        embeddings: quantise the input embedding too (and with it an output head tied to it).
        head: quantise the output head too (and with it an input embedding tied to it).
        skip_modules: paths, or ends of paths, of modules to leave as they are.
    """

    double_quant: bool = True
    block_size: int = 64
    embeddings: bool = False
    head: bool = False
    skip_modules: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise InputError(f"block_size is {self.block_size!r}: expected one of {', '.join(map(str, BLOCK_SIZES))}")
        if isinstance(self.skip_modules, str):
            raise InputError(f"skip_modules is {self.skip_modules!r}: expected a list of names")

    @property
    def bits(self) -> float:
        """Bits a parameter, for long tensors."""
        scale = 8 + 32 / 256 if self.double_quant else 32
        return 4 + scale / self.block_size
