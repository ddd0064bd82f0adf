"""4-bit NormalFloat: weights that stand where parameters stood, exact with bitsandbytes' format."""

from deltaw.quant.bitsandbytes import from_bitsandbytes, to_bitsandbytes
from deltaw.quant.codebooks import dynamic_code, nf4_code, normal_float_code
from deltaw.quant.config import NF4
from deltaw.quant.model import is_quantized, quantizable, quantize_model, quantized_sites
from deltaw.quant.tensor import NF4Tensor
from deltaw.quant.weight import NF4Weight

__all__ = [
    "NF4",
    "NF4Tensor",
    "NF4Weight",
    "dynamic_code",
    "from_bitsandbytes",
    "is_quantized",
    "nf4_code",
    "normal_float_code",
    "quantizable",
    "quantize_model",
    "quantized_sites",
    "to_bitsandbytes",
]
