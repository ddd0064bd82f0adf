"""Gaussian noise and Poisson sampling from a cryptographic source.

The source is ChaCha20 under a key of 256 bits from the operating system. Two words of 63 bits make two normals by Box
and Muller: z = sqrt(-2 ln u) (cos 2 pi v, sin 2 pi v) in float64. 63 bits let |z| reach 9.42, so that what is cut off
has probability 5e-21 a value; 53 bits would stop at 8.57 (1e-17).

**Attacks on floating-point noise.** In floating point, x + z shows x: which sums can occur, and their last bits,
depend on x (Mironov, "On significance of the least significant bits for differential privacy", CCS 2012); for the
Gaussian, the noise's own values have gaps that an observer can search (Holohan and Braghin, "Secure random sampling in
differential privacy", arXiv 2107.10138; Jin et al., arXiv 2112.05307, broke DP-SGD that way). Two answers:

- `SecureNoise.release`, for sums of clipped gradients. Let q be a power of two, at most 2^-30 sigma. Both x and z are
  rounded to multiples of q and added exactly (integers below 2^53 in float64). The noise is then a rounded normal that
  does not depend on x, every multiple of q can occur for every x, and no bits below q exist. As round(x) + round(z) =
  round(round(x) + z), the release is the Gaussian mechanism on round(x) with its result rounded, so it costs what the
  Gaussian does. Rounding x moves the sensitivity from C to at most C + q sqrt(d), and sigma grows by the same factor
  (6e-6 for 42M values at a noise multiplier of 1). A cell of width q at 9 sigma still has more than 2^30 of the 2^126
  possible (u, v).
- `SecureNoise.normal`, for values used otherwise: Holohan and Braghin's sum of 2n independent draws over sqrt(2n), by
  default n = 2, for which their attack needs 2^159 trials.

What this does not cover: the sum of clipped gradients was itself added up in floating point, whose rounding (1e-7 of
it in float32) depends on every example.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from deltaw.core.errors import InputError
from deltaw.privacy.chacha import keystream

LOW_63_BITS = 2**63 - 1
#: Bits of the release's grid below the noise's standard deviation.
GRID_BITS = 30
#: Values worked on at a time: what fits a CPU's cache, and what keeps a GPU busy in 100 MB.
CPU_CHUNK, DEVICE_CHUNK = 1 << 18, 1 << 22


class SecureNoise:
    """A stream of noise that nobody can predict or repeat.

    The key is drawn from the operating system, never shown, never saved: the object refuses to be pickled or copied, a
    resumed run begins with a new key, and a forked process gets one of its own.

    Args:
        insecure_test_key: 32 bytes that make the stream repeatable. For tests: noise under a known key protects nobody.
    """

    def __init__(self, *, insecure_test_key: bytes | None = None) -> None:
        if insecure_test_key is not None and len(insecure_test_key) != 32:
            raise InputError(f"a key of {len(insecure_test_key)} bytes; ChaCha20 takes 32")
        self._begin(insecure_test_key or os.urandom(32))

    def _begin(self, key: bytes) -> None:
        self._key, self._calls, self._process = key, itertools.count(), os.getpid()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("noise is not pickled or copied, as its values would repeat: make a new SecureNoise")

    def words(self, count: int, *, device: torch.device | str = "cpu") -> Tensor:
        """`count` uniform words of 64 bits, int64 (count,)."""
        if os.getpid() != self._process:
            self._begin(os.urandom(32))
        return keystream(self._key, call=next(self._calls), count=count, device=device)

    def normal(
        self,
        shape: Sequence[int],
        std: float,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        draws: int = 4,
    ) -> Tensor:
        """Independent normals of mean 0.

        Args:
            shape: of the result.
            std: standard deviation, at least 0.
            device: where the values are made, keystream and all.
            dtype: float64 or float32; the arithmetic is float64's.
            draws: independent draws that are summed for one value (the page's head says why).

        Raises:
            InputError: a standard deviation that is negative or not finite, fewer than one draw.
        """
        if not 0 <= std < math.inf or draws < 1:
            raise InputError(f"noise of std {std} from {draws} draws; a std from 0 on and at least 1 draw are needed")
        out = torch.zeros(tuple(shape), dtype=dtype, device=device)
        if std:
            flat = out.view(-1)
            for part in _chunks(flat):
                value = self._draw(len(part), std / math.sqrt(draws), out.device)
                for _ in range(draws - 1):
                    value += self._draw(len(part), std / math.sqrt(draws), out.device)
                part.copy_(value)
        return out

    def release(
        self, sums: Sequence[Tensor], *, noise_multiplier: float, max_grad_norm: float, write: bool = False
    ) -> list[Tensor]:
        """The Gaussian mechanism: sums of vectors of joint norm at most `max_grad_norm`, with noise.

        Args:
            sums: tensors of any shapes, floating dtypes and devices: together one vector, of which one unit changes
                at most `max_grad_norm` in Euclidean norm.
            noise_multiplier: standard deviation of the noise over `max_grad_norm`; 0 gives the sums as they are.
            max_grad_norm: the clipping bound C > 0.
            write: puts the result into `sums` and returns those.

        Returns:
            Tensors like `sums`.

        Raises:
            InputError: a multiplier below 0, a bound of 0 or less, or one that is not finite.
        """
        if not (0 <= noise_multiplier < math.inf and 0 < max_grad_norm < math.inf):
            raise InputError(
                f"noise_multiplier {noise_multiplier}, max_grad_norm {max_grad_norm}; from 0 on and above 0 are needed"
            )
        released = list(sums) if write else [tensor.detach().clone() for tensor in sums]
        if not noise_multiplier:
            return released
        step = 2.0 ** (math.floor(math.log2(noise_multiplier * max_grad_norm)) - GRID_BITS)
        values = sum(tensor.numel() for tensor in sums)
        std = noise_multiplier * (max_grad_norm + step * math.sqrt(values))
        for tensor in released:
            flat = tensor.detach() if tensor.is_contiguous() else tensor.detach().contiguous()
            for part in _chunks(flat.view(-1)):
                noise = self._draw(len(part), std / step, tensor.device).round_()
                part.copy_(noise.add_((part.double() / step).round_()).mul_(step))
            if not tensor.is_contiguous():
                tensor.detach().copy_(flat)
        return released

    def _draw(self, count: int, std: float, device: torch.device) -> Tensor:
        """One Box-Muller draw a value, float64 (count,)."""
        half = (count + 1) // 2
        values = self.words(2 * half, device=device).bitwise_and_(LOW_63_BITS).double()
        radius = values[:half].add_(0.5).mul_(2.0**-63).log_().mul_(-2 * std**2).sqrt_()
        angle = values[half:].mul_(2 * math.pi * 2.0**-63)
        out = torch.empty_like(values)
        torch.cos(angle, out=out[:half])
        torch.sin(angle, out=out[half:])
        out.view(2, half).mul_(radius)
        return out[:count]

    def bernoulli(self, n: int, p: float) -> Tensor:
        """Which of `n` units are sampled, each by itself with probability `p`: bool (n,) on the CPU.

        A unit is in where its 63 bits lie below p 2^63, which is exact for every float64 from 2^-10 on.

        Raises:
            InputError: a negative number of units, a probability outside 0 to 1.
        """
        if n < 0 or not 0 <= p <= 1:
            raise InputError(f"sampling {n} units with probability {p}; 0 or more units and 0 to 1 are needed")
        if p == 1:
            return torch.ones(n, dtype=torch.bool)
        return self.words(n).bitwise_and_(LOW_63_BITS) < int(p * 2**63)


def _chunks(flat: Tensor) -> Iterator[Tensor]:
    return iter(flat.split(CPU_CHUNK if flat.device.type == "cpu" else DEVICE_CHUNK))
