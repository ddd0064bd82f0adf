"""Uploads in fewer bytes, and what that loses kept for the next round.

An upload is one vector x of n values, keys sorted and tensors flattened. Kinds, with bytes on the wire:

    none      float32                                                  4 n
    bfloat16  rounded to nearest                                       2 n
    int8      round(127 x / a) of blocks of 256, a = max |x| in it     (1 + 4/256) n
    nf4       NormalFloat codes of blocks of 64, two in a byte         (1/2 + 4/64) n
    topk      the `share` n values of largest |x|, with their places   8 share n

A block's a is float32. The 4-bit code is QLoRA's (arXiv 2305.14314, section 3). Blocks of 64 make 4.5 bits a value:
9.2 MB for 16.4 million values; of 32 they would make 10.2.

Error feedback (Seide et al., "1-Bit Stochastic Gradient Descent", Interspeech 2014; Karimireddy et al., "Error Feedback
Fixes SignSGD and other Gradient Compression Schemes", arXiv 1901.09847, algorithm 2): with the client's memory e,

    p = x + e,    sent: C(p),    e <- p - C(p)

so that the sum of what was sent is the sum of x less the last e, whose norm stays bounded: the mean over T rounds is
off by |e|/T. It needs uploads that add up over rounds (`Rule.additive`), and the memory is the client's alone: it holds
what was never sent, and under differential privacy x has to be noised before it comes here. Masked words in a ring
cannot be compressed: with secure aggregation every value takes 32 bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.core.errors import InputError, RunError, unknown_name
from deltaw.federated.messages import MessageError
from deltaw.federated.wire import flat, unflat
from deltaw.kernels.nf4 import dequantize_4bit, quantize_4bit
from deltaw.quant.codebooks import nf4_code

KINDS = ("none", "bfloat16", "int8", "nf4", "topk")

#: Values that share a scale.
BLOCK = {"int8": 256, "nf4": 64}

_BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.int8: 1, torch.uint8: 1, torch.int32: 4}

#: Name, dtype and shape of each tensor of a payload.
Form = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Compressed:
    """A compressed upload.

    Attributes:
        tensors: what is sent.
        header: what the receiver checks: the kind.
        memory: by key, what the next call gets; keys that were not in this upload keep theirs.
    """

    tensors: dict[str, Tensor]
    header: dict[str, Any]
    memory: dict[str, Tensor]


@dataclass(frozen=True)
class Compressor:
    """One way of compressing; keeps nothing between calls.

    Attributes:
        kind: one of `KINDS`.
        error_feedback: adds what earlier calls lost; without it memory comes back as it was given.
        share: of values that `topk` sends.
    """

    kind: str
    error_feedback: bool = True
    share: float = 0.01

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown_name("compression", self.kind, KINDS)
        if isinstance(self.share, bool) or not isinstance(self.share, (int, float)) or not 0 < self.share <= 1:
            raise InputError(f"share is {self.share!r}: expected a number above 0 and at most 1")

    def form(self, shapes: Mapping[str, tuple[int, ...]]) -> Form:
        """What the payload for tensors of these shapes consists of."""
        n = sum(math.prod(shape) for shape in shapes.values())
        if self.kind == "topk":
            kept = math.ceil(self.share * n)
            return {"places": (torch.int32, (kept,)), "values": (torch.float32, (kept,))}
        if self.kind in BLOCK:
            codes = (torch.int8, (n,)) if self.kind == "int8" else (torch.uint8, (-(-n // 2),))
            return {"codes": codes, "scales": (torch.float32, (-(-n // BLOCK[self.kind]),))}
        return {"values": (torch.bfloat16 if self.kind == "bfloat16" else torch.float32, (n,))}

    def compress(self, tensors: Mapping[str, Tensor], memory: Mapping[str, Tensor] | None = None) -> Compressed:
        """The payload of an upload.

        Args:
            tensors: by key.
            memory: what the last call gave; None or {} at first.

        Raises:
            RunError: NaN, infinity, or more values than places in 32 bits have room for.
        """
        memory = dict(memory or {})
        shapes = {key: tuple(value.shape) for key, value in tensors.items()}
        vector = flat(tensors).to(torch.float32)
        if self.error_feedback:
            vector = vector + flat({key: memory.get(key, torch.zeros(shape)) for key, shape in shapes.items()})
        if not bool(torch.isfinite(vector).all()):
            raise RunError("an update with NaN or infinity cannot be compressed: look at the loss, lower the rate")
        payload = self._encode(vector)
        if self.error_feedback:
            memory |= unflat(vector - self._decode(payload, len(vector)), shapes)
        return Compressed(payload, {"compression": self.kind}, memory)

    def decompress(
        self, payload: Mapping[str, Tensor], header: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Tensor]:
        """The tensors by key, float32, of what somebody else has sent; whether they are finite is not looked at.

        Raises:
            MessageError: a payload of another kind, or of other sizes than these shapes have.
        """
        if (found := header.get("compression")) != self.kind:
            raise MessageError(f"an upload with compression {found!r}: expected {self.kind!r}")
        form = self.form(shapes)
        got = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in payload.items()}
        if got != form:
            raise MessageError(f"a {self.kind} payload of {got}: expected {form}")
        n = sum(math.prod(shape) for shape in shapes.values())
        if self.kind == "topk" and (places := payload["places"]).numel():
            if not (0 <= int(places[0]) and int(places[-1]) < n and bool((places.diff() > 0).all())):
                raise MessageError(f"a topk payload whose places do not rise from 0 to below {n}")
        return unflat(self._decode(payload, n), shapes)

    def _encode(self, x: Tensor) -> dict[str, Tensor]:
        if self.kind == "topk":
            if len(x) >= 1 << 31:
                raise RunError(f"topk of {len(x)} values: places have 32 bits; use nf4")
            places = x.abs().topk(math.ceil(self.share * len(x)), sorted=False).indices.sort().values
            return {"places": places.int(), "values": x[places]}
        if self.kind == "nf4":
            codes, scales = quantize_4bit(x, nf4_code(), block_size=BLOCK["nf4"])
            return {"codes": codes, "scales": scales}
        if self.kind == "int8":
            blocks = F.pad(x, (0, -len(x) % BLOCK["int8"])).view(-1, BLOCK["int8"])
            scales = blocks.abs().amax(1)
            inverse = torch.where(scales > 0, 127 / scales, 0.0).clamp(max=torch.finfo(torch.float32).max)
            codes = (blocks * inverse[:, None]).round_().clamp_(-127, 127).to(torch.int8)
            return {"codes": codes.flatten()[: len(x)], "scales": scales}
        return {"values": x.to(torch.bfloat16) if self.kind == "bfloat16" else x}

    def _decode(self, payload: Mapping[str, Tensor], n: int) -> Tensor:
        if self.kind == "topk":
            return torch.zeros(n).index_copy_(0, payload["places"].long(), payload["values"])
        if self.kind == "nf4":
            code, block = nf4_code(), BLOCK["nf4"]
            return dequantize_4bit(
                payload["codes"], code, payload["scales"], start=0, stop=n, dtype=torch.float32, block_size=block
            )
        if self.kind == "int8":
            scales = payload["scales"].repeat_interleave(BLOCK["int8"])[:n]
            return payload["codes"].float() * (scales / 127)
        return payload["values"].float()


def wire_bytes(shapes: Mapping[str, tuple[int, ...]], kind: str, *, secure: bool = False, share: float = 0.01) -> int:
    """Bytes of one upload's tensors; the message around them takes less than 1,000 more.

    Args:
        shapes: of the uploaded tensors by key.
        kind: one of `KINDS`.
        secure: as masked 32-bit words, with one for the weight.
        share: of `topk`.

    Raises:
        InputError: a kind that is none, or compression of masked words.
    """
    form = Compressor(kind, share=share).form(shapes)
    if not secure:
        return sum(_BYTES[dtype] * math.prod(shape) for dtype, shape in form.values())
    if kind != "none":
        raise InputError(f"compression {kind} under secure aggregation: masked words are random, take none")
    return 4 * (sum(math.prod(shape) for shape in shapes.values()) + 1)
