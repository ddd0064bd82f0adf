"""A decoder layer as one autograd function, which keeps for the backward pass what it is told to keep.

The layer (Llama's, Mistral's, Qwen's, Gemma's first), x0 (batch, seq, d) its input:

    n1 = norm(x0)    q, k, v = linears(n1), rotated (their heads normed before, where the layer does that)
    a = attention(q, k, v)              x1 = x0 + o(a)
    n2 = norm(x1)    act = f(gate(n2)) up(n2)           x2 = x1 + down(act)

Autograd over the layer's own modules keeps every one of these tensors, some twice. Here the backward pass is written
out: norms and act are always made again (they cost one pass over memory), products with weights where `keep` says so.
Buffers are written over once their values are done with: dgate over gate, dup over up, act over its own gradient.

| keep | kept for M tokens beside the low-rank h's | made again |
|---|---|---|
| "all" | x0, q, k, v, a, x1, gate, up | |
| "attention" | x0, q, k, v, a, x1 | gate, up |
| "input" | x0 | all but the last product, which nothing asks for |
| "host" | x0 in host memory | the same |

Attention runs through transformers' own interface in a graph of its own, which is kept with q, k, v and a.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaw.core.errors import RunError
from deltaw.fuse.host_memory import HostMemory
from deltaw.fuse.linears import Fused, Group, Narrow, products
from deltaw.kernels.gated import gated, gated_backward, gated_backward_low_rank
from deltaw.kernels.norm import rms_norm, rms_norm_backward
from deltaw.kernels.rotary import norm_rotate, norm_rotate_backward, rotate

Keep = Literal["all", "attention", "input", "host"]
KEEPS: tuple[Keep, ...] = ("all", "attention", "input", "host")


@dataclass(frozen=True)
class Norm:
    """A frozen RMS norm: its module, its epsilon, and how its weight (d,) meets the values."""

    module: Any
    eps: float
    style: Any

    @property
    def weight(self) -> Tensor:
        """Read at every use, as a sharded module has it only then."""
        weight: Tensor = self.module.weight.detach()
        return weight


@dataclass
class Call:
    """A layer's forward pass: what it computes with.

    Attributes:
        head_dim: columns of a head.
        activation: of the gated MLP.
        norms: before attention and before the MLP.
        head_norms: of queries and keys, or None.
        linears: q, k, v, o, gate, up, down.
        cos, sin: (batch or 1, seq, rotated columns); None: no rotation.
        attend: (q, k, v), each (batch, heads, seq, head_dim), to (batch, seq, heads, head_dim), differentiable.
        keep: what stays for the backward pass.
        host: where "host" puts x0.
        fp8: names of the linears whose products with W are made in 8-bit floats.
        held: where weights in 8 bits stay between calls, by layer and group; None: nowhere.
        index: of the layer.
    """

    head_dim: int
    activation: Any
    norms: tuple[Norm, Norm]
    head_norms: tuple[Norm, Norm] | None
    linears: dict[str, Fused]
    cos: Tensor | None
    sin: Tensor | None
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    keep: Keep = "all"
    host: HostMemory | None = None
    fp8: frozenset[str] = frozenset()
    held: dict[Any, Narrow] | None = None
    index: int = 0
    groups: dict[str, Group] = field(default_factory=dict)

    def group(self, names: str, dtype: torch.dtype) -> Group:
        """The group of some linears, by their names with blanks between."""
        if names not in self.groups:
            parts = names.split()
            self.groups[names] = Group(
                [self.linears[name] for name in parts],
                dtype,
                fp8=self.fp8.issuperset(parts),
                held=self.held,
                name=(self.index, names),
            )
        return self.groups[names]


QKV, OUT, GATE_UP, DOWN = "q k v", "o", "gate up", "down"


def run_block(x: Tensor, call: Call) -> Tensor:
    """The layer's output (batch, seq, d), differentiable once in x and in the adapters' tensors."""
    trained = [tensor for linear in call.linears.values() for tensor in linear.trained]
    result: Tensor = _Block.apply(x, call, *trained)
    return result


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Call, *trained: Tensor) -> Tensor:  # type: ignore[override]
        ctx.state = state = _State(call, x, any(ctx.needs_input_grad))
        out = state.forward()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        state: _State | None = ctx.state
        if state is None:
            raise RunError("a fused layer's backward pass ran twice, and what it needs is gone after the first")
        ctx.state = None
        dx = state.backward(grad, need_x=ctx.needs_input_grad[0])
        return dx, None, *state.gradients()


class _State:
    """One pass forward and back."""

    def __init__(self, call: Call, x: Tensor, wanted: bool) -> None:
        self.call, self.shape, self.wanted = call, x.shape, wanted
        self.x0: Tensor | None = x.detach().reshape(-1, x.shape[-1])
        self.qkv, self.o, self.gate_up, self.down = (call.group(n, x.dtype) for n in (QKV, OUT, GATE_UP, DOWN))
        self.h: dict[str, Tensor | None] = {}
        self.kept: dict[str, Any] = {}
        self.found: dict[str, tuple[Tensor | None, Tensor | None, Tensor | None]] = {}

    # Forward.

    def forward(self) -> Tensor:
        """X2; keeps what the call says."""
        call, x0 = self.call, self.x0
        assert x0 is not None
        keep = call.keep
        attention = self._attention(x0, graph=self.wanted and keep in ("all", "attention"))
        x1, zo = self._after_attention(x0, attention["a"])
        if self.wanted and keep in ("all", "attention"):
            self.kept |= attention | {"x1": x1, "zo": zo}
        del attention
        gate, up = self._gate_up(x1)
        act = gated(gate, up, activation=call.activation, factors=self._factors())
        if self.wanted and keep == "all":
            self.kept |= {"gate": gate, "up": up}
        del gate, up
        self.h[DOWN] = self.down.project(act)
        x2, zd = self._onto(self.down, act, self.h[DOWN], x1)
        if self.wanted and keep != "input" and keep != "host":
            self.kept["zd"] = zd
        if self.wanted and keep == "host" and call.host is not None:
            self.kept["x0"] = call.host.put(x0)
            self.x0 = None
        if not self.wanted:
            self.x0 = None
        return x2.view(self.shape)

    def _attention(self, x0: Tensor, *, graph: bool) -> dict[str, Any]:
        """Q, k, v as attention sees them and a (M, heads head_dim); with a graph from one to the other where wanted."""
        call = self.call
        norm = call.norms[0]
        n1, _ = rms_norm(x0, norm.weight, eps=norm.eps, style=norm.style)
        if QKV not in self.h:
            self.h[QKV] = self.qkv.project(n1)
        outs = self.qkv.finish(self.qkv.outputs(n1, self.h[QKV]))
        del n1
        q, k, v = (out.view(*self.shape[:2], -1, call.head_dim) for out in outs)
        found: dict[str, Any] = {}
        if call.head_norms is not None:
            raw = (q, k)
            (q, rq), (k, rk) = (
                norm_rotate(t, n.weight, call.cos, call.sin, eps=n.eps, style=n.style)
                for t, n in zip(raw, call.head_norms, strict=True)
            )
            found = {"raw": raw, "rstd": (rq, rk)}
        elif call.cos is not None and call.sin is not None:
            rotate(q, call.cos, call.sin)
            rotate(k, call.cos, call.sin)
        leaves = [t.detach().requires_grad_(graph) for t in (q, k, v)]
        with torch.set_grad_enabled(graph):
            out = call.attend(*(t.transpose(1, 2) for t in leaves))
        return found | {"qkv": leaves, "graph": out if graph else None, "a": out.detach().reshape(len(x0), -1)}

    def _after_attention(self, x0: Tensor, a: Tensor) -> tuple[Tensor, Tensor | None]:
        if OUT not in self.h:
            self.h[OUT] = self.o.project(a)
        return self._onto(self.o, a, self.h[OUT], x0)

    def _onto(self, group: Group, x: Tensor, h: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """Residual + y, and z where there is a c."""
        c = group.c[0]
        if c is None:
            return group.outputs(x, h, onto=residual)[0], None
        z = group.outputs(x, h)[0]
        out = torch.addcmul(residual, z, c.to(z.dtype))
        bias = group.linears[0].bias
        return out if bias is None else out.add_(bias.to(out.dtype)), z

    def _gate_up(self, x1: Tensor) -> tuple[Tensor, Tensor]:
        n2 = self._n2(x1)[0]
        if GATE_UP not in self.h:
            self.h[GATE_UP] = self.gate_up.project(n2)
        gate, up = self._z_or_y(self.gate_up.outputs(n2, self.h[GATE_UP]))
        return gate, up

    def _z_or_y(self, outs: list[Tensor]) -> list[Tensor]:
        """The gated kernels take z and c, but know no bias and need a c of both or of none."""
        return outs if self._factors() is not None else self.gate_up.finish(outs)

    def _factors(self) -> tuple[Tensor, Tensor] | None:
        gate, up = self.gate_up.c
        biased = any(linear.bias is not None for linear in self.gate_up.linears)
        return None if gate is None or up is None or biased else (gate, up)

    def _n2(self, x1: Tensor) -> tuple[Tensor, Tensor]:
        norm = self.call.norms[1]
        return rms_norm(x1, norm.weight, eps=norm.eps, style=norm.style)

    # Backward.

    def backward(self, grad: Tensor, *, need_x: bool) -> Tensor | None:
        """Dx0 (batch, seq, d)."""
        g = grad.reshape(-1, grad.shape[-1])
        self._restore()
        dx1 = self._mlp_backward(g)
        dx0 = self._attention_backward(dx1, need_x=need_x)
        return None if dx0 is None else dx0.view(self.shape)

    def _restore(self) -> None:
        """What was not kept, but for gate and up, which the MLP's own part makes."""
        if self.call.keep == "host" and self.call.host is not None:
            self.x0 = self.call.host.take(self.kept.pop("x0"))
        if "qkv" not in self.kept:
            assert self.x0 is not None
            self.kept |= self._attention(self.x0, graph=True)
            self.kept["x1"], self.kept["zo"] = self._after_attention(self.x0, self.kept["a"])

    def _mlp_backward(self, g: Tensor) -> Tensor:
        call = self.call
        x1: Tensor = self.kept.pop("x1")
        norm = call.norms[1]
        n2, rstd = self._n2(x1)
        if "gate" in self.kept:
            gate, up = self.kept.pop("gate"), self.kept.pop("up")
        else:
            gate, up = self._z_or_y(self.gate_up.outputs(n2, self.h[GATE_UP]))
        zd = self.kept.pop("zd", None)
        if zd is None and self.down.c[0] is not None:
            act = gated(gate, up, activation=call.activation, factors=self._factors())
            zd = self.down.outputs(act, self.h[DOWN])[0]
        gz, dc = self._scaled(self.down, g, zd)
        dact, pairs = self.down.backward([gz], None, self.h[DOWN])
        assert dact is not None
        dA_down, known, dcs = self._gated_backward(dact, gate, up)
        self.found["down"] = (dA_down, pairs[0][1], dc)
        del dact
        # From here on gate and up are the gradients of their z.
        dn2, pairs = self.gate_up.backward([gate, up], n2, self.h[GATE_UP], known=known)
        for name, pair, one in zip(("gate", "up"), pairs, dcs, strict=True):
            self.found[name] = (*pair, one)
        assert dn2 is not None
        return rms_norm_backward(dn2, x1, norm.weight, rstd, style=norm.style, add=g, out=dn2)

    def _gated_backward(
        self, dact: Tensor, gate: Tensor, up: Tensor
    ) -> tuple[Tensor | None, list[tuple[Tensor, Tensor]] | None, list[Tensor | None]]:
        """Turns gate and up into the gradients of their z; dact is lost. Gives down's dA, (k, dB) and dc of both."""
        call, factors = self.call, self._factors()
        low_gate, low_up = (linear.low for linear in self.gate_up.linears)
        (B_gate, B_up), k_down = self.gate_up.B, self.down.k
        h_gate, h_up = self.gate_up.parts(self.h[GATE_UP])
        plain = factors is not None or all(c is None for c in self.gate_up.c)
        if plain and k_down is not None and low_gate is not None and low_up is not None:
            assert B_gate is not None and B_up is not None and h_gate is not None and h_up is not None
            k_gate, k_up, dB_gate, dB_up, dA_down, *sums = gated_backward_low_rank(
                dact, gate, up, B_gate=B_gate, B_up=B_up, h_gate=h_gate, h_up=h_up, k_down=k_down,
                scale_gate=low_gate.scale, scale_up=low_up.scale, activation=call.activation, factors=factors,
            )  # fmt: skip
            return dA_down, [(k_gate, dB_gate), (k_up, dB_up)], [*sums] if sums else [None, None]
        ys: list[Tensor | None] = [None, None]
        if factors is None:
            ys = [_copied(t, self.gate_up, index) for index, t in enumerate((gate, up))]
        totals = gated_backward(dact, gate, up, activation=call.activation, factors=factors)
        return (
            self.down.take_dA(dact)[0],
            None,
            list(totals) if totals else self.gate_up.scale_gradients([gate, up], ys),
        )

    def _scaled(self, group: Group, g: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """DL/dz of dL/dy, and dc, of a group of one whose y went straight into the residual."""
        c = group.c[0]
        if c is None or z is None:
            return g, None
        return g * c.to(g.dtype), products(g, z)

    def _attention_backward(self, dx1: Tensor, *, need_x: bool) -> Tensor | None:
        call, x0 = self.call, self.x0
        assert x0 is not None
        a = self.kept.pop("a")
        zo = self.kept.pop("zo")
        gz, dc = self._scaled(self.o, dx1, zo)
        da, pairs = self.o.backward([gz], a, self.h[OUT])
        self.found["o"] = (*pairs[0], dc)
        assert da is not None
        del a, zo, gz
        leaves, graph = self.kept.pop("qkv"), self.kept.pop("graph")
        dq, dk, dv = torch.autograd.grad(graph, leaves, da.view(graph.shape))
        del da, graph
        q, k, v = (leaf.detach() for leaf in leaves)
        del leaves
        if call.head_norms is not None:
            q, k = self.kept.pop("raw")
            dq, dk = (
                norm_rotate_backward(_last_contiguous(g), t, n.weight, r, call.cos, call.sin, style=n.style)
                for g, t, n, r in zip((dq, dk), (q, k), call.head_norms, self.kept.pop("rstd"), strict=True)
            )
        elif call.cos is not None and call.sin is not None:
            dq, dk = _last_contiguous(dq), _last_contiguous(dk)
            for t in (dq, dk):
                rotate(t, call.cos, call.sin, inverse=True)
            if self.qkv.c[0] is not None or self.qkv.c[1] is not None:
                for t in (q, k):
                    rotate(t, call.cos, call.sin, inverse=True)
        grads = [t.reshape(len(x0), -1) for t in (dq, dk, dv)]
        dcs = self.qkv.scale_gradients(grads, [t.reshape(len(x0), -1) for t in (q, k, v)])
        del dq, dk, dv, q, k, v
        norm = call.norms[0]
        n1, rstd = rms_norm(x0, norm.weight, eps=norm.eps, style=norm.style)
        dn1, pairs = self.qkv.backward(grads, n1, self.h[QKV], need_x=need_x)
        for name, pair, one in zip("qkv", pairs, dcs, strict=True):
            self.found[name] = (*pair, one)
        self.x0 = None
        if dn1 is None:
            return None
        return rms_norm_backward(dn1, x0, norm.weight, rstd, style=norm.style, add=dx1, out=dn1)

    def gradients(self) -> list[Tensor | None]:
        """Of the trained tensors, in their order and dtypes."""
        result: list[Tensor | None] = []
        for name, linear in self.call.linears.items():
            low = linear.low
            if low is None:
                continue
            for tensor, gradient in zip((low.A, low.B, low.out_scale), self.found[name], strict=True):
                if tensor is not None and tensor.requires_grad:
                    assert gradient is not None
                    result.append(gradient.to(tensor.dtype))
        return result


def _copied(t: Tensor, group: Group, index: int) -> Tensor | None:
    """A copy where `scale_gradients` will want y and the gated kernel is about to write over it."""
    return None if group.c[index] is None else t.clone()


def _last_contiguous(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def kept_bytes(
    keep: Keep, tokens: int, *, width: int, inner: int, heads: int, kv_heads: int, head_dim: int, itemsize: int,
    scaled: bool = False, head_norms: bool = False,
) -> int:  # fmt: skip
    """Bytes of a layer's kept tensors on the device, the low-rank h's left out.

    Args:
        keep: what is kept.
        tokens: M.
        width: d.
        inner: of the MLP.
        heads: of the queries.
        kv_heads: of keys and values.
        head_dim: columns of a head.
        itemsize: bytes of a value.
        scaled: whether o and down have a c, whose z is kept.
        head_norms: whether queries and keys are kept unnormed too.
    """
    columns = {"all": 0, "attention": 0, "input": width, "host": 0}[keep]
    if keep in ("all", "attention"):
        columns = 2 * width + 2 * (heads + kv_heads) * head_dim
        columns += 2 * width if scaled else 0
        columns += (heads + kv_heads) * head_dim if head_norms else 0
        columns += 2 * inner if keep == "all" else 0
    return columns * tokens * itemsize
