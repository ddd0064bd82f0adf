"""A decoder layer as one autograd function, which keeps for the backward pass what it is told to keep.

The layer (Llama's, Mistral's, Qwen's, Gemma's first), x0 (batch, seq, d) its input:

    n1 = norm(x0)    q, k, v = linears(n1), rotated (their heads normed before, where the layer does that)
    a = attention(q, k, v)              x1 = x0 + o(a)
    n2 = norm(x1)    act = f(gate(n2)) up(n2)           x2 = x1 + down(act)

Autograd over the layer's own modules keeps every one of these tensors, some twice. Here the backward pass is written
out: act is always made again (within a pass that is needed anyway), products with weights where `keep` says so.
Of a norm its output stays, which the linears' gradients read, and its gradient reads it too in the place of its input;
where its weight has zeros the input stays, and the norm is made again.
Buffers are written over once their values are done with: dgate over gate, dup over up, act over its own gradient.

| keep | kept for M tokens beside the low-rank h's | made again |
|---|---|---|
| "all" | n1, q, k, v, a, n2, gate, up | |
| "attention" | n1, q, k, v, a, n2 | gate, up |
| "host-products" | n1, q, k, v, a, n2, and gate, up in host memory | |
| "input" | x0 | all but the last product, which nothing asks for |
| "host" | x0 in host memory | the same |
| "host-attention" | x0, and what attention's graph keeps but for q, k and v, in host memory | the same but attention |

Attention runs through transformers' own interface in a graph of its own, which is kept with q, k, v and a.

What goes into a group of linears, or comes back to it, is written with room behind each row for the low-rank part
(`Group.spare`); so is the gradient that a layer hands to the one before it.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from deltaw.core.errors import RunError
from deltaw.fuse.away import Away
from deltaw.fuse.call import DOWN, GATE_UP, GROUPS, OUT, QKV, Call, Passed
from deltaw.fuse.group import Group
from deltaw.fuse.host_memory import LEAVING, Held
from deltaw.fuse.keep import KEEPS
from deltaw.kernels.gated import gated, gated_and_project, gated_backward, gated_backward_low_rank
from deltaw.kernels.memory import with_room
from deltaw.kernels.norm import add_rms_norm, rms_norm, rms_norm_backward, wide_dtype
from deltaw.kernels.rotary import norm_rotate, norm_rotate_backward, rotate, rotate_back_scaled
from deltaw.kernels.scaled import scale_and_sum, scaled_add


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
        self.x = weakref.ref(x)
        self.x0: Tensor | None = x.detach().reshape(-1, x.shape[-1])
        self.qkv, self.o, self.gate_up, self.down = (call.group(names, x.dtype) for names in GROUPS)
        # Kernels that read dact and z for the low-rank gradients can add what 8-bit products leave out.
        self.down.lean = self.down.fp8 and self._thin_everywhere
        self.h: dict[str, Tensor | None] = {}
        self.kept: dict[str, Any] = {}
        self.found: dict[str, tuple[Tensor | None, Tensor | None, Tensor | None]] = {}

    # Forward.

    def forward(self) -> Tensor:
        """X2; keeps what the call says."""
        call, x0 = self.call, self.x0
        assert x0 is not None
        keep = call.keep
        attentions = self.wanted and keep in KEEPS[:3]
        away = Away(call.host) if self.wanted and keep == "host-attention" and call.host is not None else None
        attention = self._attention(x0, graph=attentions, away=away)
        x1, zo, n2 = self._after_attention(x0, attention["a"])
        if attentions:
            self.kept |= attention | {"n2": self._readable(1, x1, n2), "zo": zo}
            self.x0 = None
        if away is not None:
            self.kept |= {"away": away, "graph": attention["graph"], "edges": attention["edges"]}
            away.keep(attention["a"])
        del attention
        z = self._gate_up(n2[0], kept=attentions and call.norms[1].invertible)
        del n2
        act, self.h[DOWN] = self._act_and_h(z)
        if self.wanted and keep == "all":
            self.kept["z"] = z
        elif self.wanted and keep == "host-products" and call.host is not None:
            # One at a time: they are large, and the next one is some layers away.
            self.kept["z"] = self._put(_memory(z), leaving=1), z.shape[1], z.stride(0)
        del z
        x2, zd, n3 = self._after_mlp(x1, act)
        if attentions:
            self.kept["zd"] = zd
        if self.wanted and keep in ("host", "host-attention") and call.host is not None:
            self.kept["x0"] = self._put(x0)
            for held in away.held if away is not None else ():
                self._drop_at_the_end(held)
            self.x0 = None
        if not self.wanted:
            self.x0 = None
        # No view of another tensor in autograd's eyes, which FSDP2 would warn of.
        made: Tensor = torch.ops.aten._unsafe_view(x2, self.shape)
        call.passed.clear()
        if n3 is not None and call.following is not None:
            call.passed.append(Passed(weakref.ref(made), made._version, call.following, *n3))
        return made

    def _put(self, tensor: Tensor, leaving: int = LEAVING) -> Held:
        """Moves a contiguous tensor to host memory."""
        assert self.call.host is not None
        held = self.call.host.put(tensor, leaving)
        self._drop_at_the_end(held)
        return held

    def _drop_at_the_end(self, held: Held) -> None:
        """A pass that is never taken back leaves nothing behind."""
        assert self.call.host is not None
        weakref.finalize(self, self.call.host.drop, held).atexit = False

    def _normed(self, which: int, x: Tensor, group: Group | None) -> tuple[Tensor, Tensor]:
        """Norm(x) (M, d + the group's spare), and the reciprocal norms."""
        norm = self.call.norms[which]
        out = _wide(x, x.shape[1], 0 if group is None else group.spare)
        _, rstd = rms_norm(x, norm.weight, eps=norm.eps, style=norm.style, out=out[:, : x.shape[1]])
        return out, rstd

    def _readable(self, which: int, x: Tensor, made: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What the backward pass through a norm reads, norm(x) (M, d + room) or x itself, and the reciprocal norms."""
        return made if self.call.norms[which].invertible else (x, made[1])

    def _again(self, which: int, readable: Tensor, group: Group | None) -> Tensor:
        """The norm's output of what its backward pass reads, with room for the group if that has to be made."""
        return readable if self.call.norms[which].invertible else self._normed(which, readable, group)[0]

    def _attention(self, x0: Tensor, *, graph: bool, away: Away | None = None) -> dict[str, Any]:
        """Q, k, v as attention sees them and a (M, heads head_dim); with a graph from one to the other where wanted."""
        (q, k, v), found = self._queries(x0, wanted=graph)
        if away is not None:
            return found | away.attend(self.call.attend, q, k, v)
        leaves = [t.requires_grad_(graph) for t in (q, k, v)]
        with torch.set_grad_enabled(graph):
            out = self.call.attend(*(t.transpose(1, 2) for t in leaves))
        a = out.detach().reshape(len(x0), -1)
        return found | {"edges": leaves, "graph": get_gradient_edge(out) if graph else None, "a": a}

    def _queries(self, x0: Tensor, *, wanted: bool) -> tuple[list[Tensor], dict[str, Any]]:
        """Q, k, v (batch, seq, heads, head_dim) as attention sees them, and what else is kept where that is wanted."""
        call = self.call
        n1 = self._passed() or self._normed(0, x0, self.qkv)
        if QKV not in self.h:
            self.h[QKV] = self.qkv.project(n1[0], inside=wanted and call.norms[0].invertible)
        y = self.qkv.finish(self.qkv.outputs(n1[0], self.h[QKV]))
        qk, v = self._heads(y)
        heads = self.qkv.widths[0] // call.head_dim
        q, k = qk[:, :, :heads], qk[:, :, heads:]
        found: dict[str, Any] = {"y": y, "n1": self._readable(0, x0, n1)} if wanted else {"y": y}
        del n1
        if call.head_norms is not None:
            (q, rq), (k, rk) = (
                norm_rotate(t, n.weight, call.cos, call.sin, eps=n.eps, style=n.style)
                for t, n in zip((q, k), call.head_norms, strict=True)
            )
            found["rstd"] = (rq, rk)
        elif call.cos is not None and call.sin is not None:
            rotate(qk, call.cos, call.sin)
        return [t.detach() for t in (q, k, v)], found

    def _passed(self) -> tuple[Tensor, Tensor] | None:
        """The first norm, where the layer before this one has made it in this pass."""
        if not self.call.passed:
            return None
        known, x = self.call.passed.pop(), self.x()
        same = x is not None and known.of() is x and known.version == x._version
        fits = known.norm == self.call.norms[0] and known.normed.shape[1] == self.shape[-1] + self.qkv.spare
        return (known.normed, known.rstd) if same and fits else None

    def _heads(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys as (batch, seq, heads of both, head_dim), and values, as views of q, k and v in a row."""
        both = self.qkv.widths[0] + self.qkv.widths[1]
        batch, seq = self.shape[:2]
        qk, v = (
            t.unflatten(0, (batch, seq)).unflatten(2, (-1, self.call.head_dim)) for t in (y[:, :both], y[:, both:])
        )
        return qk, v

    def _after_attention(self, x0: Tensor, a: Tensor) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]:
        """X1, o's z where it has a c, and norm(x1) with its reciprocal norms."""
        o, norm = self.o, self.call.norms[1]
        if OUT not in self.h:
            self.h[OUT] = o.project(a)
        if o.c is None or o.bias is not None:
            x1, zo = self._onto(o, a, self.h[OUT], x0)
            return x1, zo, self._normed(1, x1, self.gate_up)
        zo = o.outputs(a, self.h[OUT])
        n2 = _wide(x0, x0.shape[1], self.gate_up.spare)
        x1, _, rstd = add_rms_norm(
            x0, zo, norm.weight, eps=norm.eps, style=norm.style, factor=o.c, norm_out=n2[:, : x0.shape[1]]
        )
        return x1, zo, (n2, rstd)

    def _after_mlp(self, x1: Tensor, act: Tensor) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
        """X2, down's z where it has a c, and where it takes no pass more the norm of x2 that comes next."""
        down, norm = self.down, self.call.following
        if norm is None or not down.spare or (down.c is not None and down.bias is not None):
            return *self._onto(down, act, self.h[DOWN], x1, ready=True), None
        z = down.outputs(act, self.h[DOWN], ready=True)
        n3 = _wide(x1, x1.shape[1], self.qkv.spare)
        x2, _, rstd = add_rms_norm(
            x1, z, norm.weight, eps=norm.eps, style=norm.style, factor=down.c, out=z if down.c is None else None,
            norm_out=n3[:, : x1.shape[1]],
        )  # fmt: skip
        return x2, None if down.c is None else z, (n3, rstd)

    def _onto(
        self, group: Group, x: Tensor, h: Tensor | None, residual: Tensor, *, ready: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Residual + y, and z where there is a c; `ready` as in `Group.outputs`."""
        if group.c is None:
            return group.outputs(x, h, onto=residual, ready=ready), None
        z = group.outputs(x, h, ready=ready)
        return scaled_add(residual, z, group.c, group.bias), z

    def _gate_up(self, n2: Tensor, *, kept: bool = False) -> Tensor:
        """The real gate and up side by side, or their z where the gated kernels take those and c; `kept`: n2 is."""
        if GATE_UP not in self.h:
            self.h[GATE_UP] = self.gate_up.project(n2, inside=kept)
        z = self.gate_up.outputs(n2, self.h[GATE_UP], spare=self.gate_up.spare, lean=self._lean)
        return z if self._factors() is not None else self.gate_up.finish(z)

    def _act_and_h(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gated activation (M, inner + down's spare), and down's h (M, P), which stands in the spare part too."""
        if not self.down.P:
            return self._act(z), None
        inner = self.down.columns
        out = _wide(z, inner, self.down.spare)
        _, h = gated_and_project(
            *self._halves(z), self.down.thin.A, activation=self.call.activation, factors=self._factors(),
            low_rank=self._missing(), out=out[:, :inner], room=out[:, inner:] if self.down.spare else None,
        )  # fmt: skip
        return out, h

    def _act(self, z: Tensor) -> Tensor:
        """The gated activation (M, inner + down's spare)."""
        out = _wide(z, self.down.columns, self.down.spare)
        gated(
            *self._halves(z), activation=self.call.activation, factors=self._factors(), low_rank=self._missing(),
            out=out[:, : self.down.columns],
        )  # fmt: skip
        return out

    def _missing(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """What a lean z lacks."""
        if not self._lean:
            return None
        (h_gate, B_gate), (h_up, B_up) = self._thin_halves()
        return h_gate, B_gate, h_up, B_up

    def _halves(self, z: Tensor) -> tuple[Tensor, Tensor]:
        inner = self.down.columns
        return z[:, :inner], z[:, inner:]

    @property
    def _lean(self) -> bool:
        """Whether z comes without its low-rank part, which the gated kernels then add."""
        return self.gate_up.fp8_forward and self._thin_everywhere

    @property
    def _thin_everywhere(self) -> bool:
        """Whether the gated kernels know all low-rank parts of the MLP."""
        adapted = all(linear.low is not None for linear in (*self.gate_up.linears, *self.down.linears))
        return adapted and (self.gate_up.bias is None or not any(linear.scaled for linear in self.gate_up.linears))

    def _thin_halves(self) -> list[tuple[Tensor, Tensor]]:
        """H (M, r) and scale B (inner, r) of gate and of up, which both have to be there."""
        found, column = [], 0
        for linear, h, row in zip(
            self.gate_up.linears, self.gate_up.parts(self.h[GATE_UP]), (0, self.down.columns), strict=True
        ):
            assert h is not None
            columns = slice(column, column + linear.rank)
            found.append((h, self.gate_up.thin.B[row : row + self.down.columns, columns]))
            column += linear.rank
        return found

    def _factors(self) -> tuple[Tensor, Tensor] | None:
        """C of gate and up; the gated kernels know no bias."""
        c = self.gate_up.c
        if c is None or self.gate_up.bias is not None:
            return None
        return c[: self.down.columns], c[self.down.columns :]

    # Backward.

    def backward(self, grad: Tensor, *, need_x: bool) -> Tensor | None:
        """Dx0 (batch, seq, d)."""
        self.call.store.factors.trained()
        self.call.passed.clear()
        self._restore()
        dx1 = self._mlp_backward(self._received(grad))
        dx0 = self._attention_backward(dx1, need_x=need_x)
        if dx0 is None:
            return None
        if self.call.index:
            self.call.handed[:] = [dx0]
        return dx0[:, : self.shape[-1]].view(self.shape)

    def _received(self, grad: Tensor) -> Tensor:
        """DL/dx2 (M, d), or with room behind it where a fused layer made it so."""
        if self.call.handed:
            wide = self.call.handed.pop()
            same = wide.data_ptr() == grad.data_ptr() and wide.stride(0) == grad.stride(1) and grad.stride(2) == 1
            if same and len(wide) == self.shape[0] * self.shape[1] and wide.shape[1] == grad.shape[2] + self.down.spare:
                return wide
        flat = grad.reshape(-1, grad.shape[-1])
        return flat if flat.stride(1) == 1 and flat.stride(0) >= flat.shape[1] else flat.contiguous()

    def _restore(self) -> None:
        """What was not kept, but for gate and up, which the MLP's own part makes."""
        if "x0" in self.kept and self.call.host is not None:
            self.x0 = self.call.host.take(self.kept.pop("x0"))
        if "a" not in self.kept:
            assert self.x0 is not None
            away: Away | None = self.kept.pop("away", None)
            if away is None:
                self.kept |= self._attention(self.x0, graph=True)
            else:
                away.begins, found = self._queries(self.x0, wanted=True)
                self.kept |= found | {"a": away.output()}
            x1, self.kept["zo"], n2 = self._after_attention(self.x0, self.kept["a"])
            self.kept["n2"] = self._readable(1, x1, n2)
            self.x0 = None

    def _mlp_backward(self, g: Tensor) -> Tensor:
        """Dx1 (M, d) with room for o's low-rank part."""
        call, d = self.call, self.shape[-1]
        z = self.kept.pop("z", None)
        if isinstance(z, tuple):
            held, columns, stride = z
            assert call.host is not None
            z = call.host.take(held).view(-1, stride)[:, :columns]
        readable, rstd = self.kept.pop("n2")
        n2 = self._again(1, readable, self.gate_up if z is None else None)
        if z is None:
            z = self._gate_up(n2)
        zd = self.kept.pop("zd", None)
        if zd is None and self.down.c is not None:
            zd = self.down.outputs(self._act(z), self.h[DOWN])
        gz, dc = self._scaled(self.down, g, zd)
        dact, pairs = self.down.backward(gz, None, self.h[DOWN])
        del gz, zd
        assert dact is not None
        dA_down, known, dcs = self._gated_backward(dact, z)
        self.found["down"] = (dA_down, pairs[0][1], dc)
        del dact
        # From here on z is the gradient of itself.
        dn2, pairs = self.gate_up.backward(_whole(z, self.gate_up.spare), n2[:, :d], self.h[GATE_UP], known=known)
        for name, pair, one in zip(("gate", "up"), pairs, dcs, strict=True):
            self.found[name] = (*pair, one)
        assert dn2 is not None
        # It may lie in n2's memory, which nothing else needs from here on.
        del self.h[GATE_UP]
        return self._through(1, dn2, readable, rstd, g, self.o)

    def _gated_backward(
        self, dact: Tensor, z: Tensor
    ) -> tuple[Tensor | None, tuple[list[Tensor], list[Tensor]] | None, list[Tensor | None]]:
        """Turns z into its gradient; dact is lost. Gives down's dA, (k, dB) and dc of gate and up."""
        call, factors = self.call, self._factors()
        gate, up = self._halves(z)
        low_gate, low_up = (linear.low for linear in self.gate_up.linears)
        plain = factors is not None or self.gate_up.c is None
        if plain and self.down.k is not None and low_gate is not None and low_up is not None:
            (h_gate, B_gate), (h_up, B_up) = self._thin_halves()
            rank = self.down.linears[0].rank
            A_down = self.down.thin.A[:rank] if self.down.lean else None
            at, wide = z.shape[1], self.gate_up.spare
            room = _whole(z, wide)[:, at : at + B_gate.shape[1] + B_up.shape[1]] if wide else None
            k_gate, k_up, dB_gate, dB_up, dA_down, *sums = gated_backward_low_rank(
                dact, gate, up, B_gate=B_gate, B_up=B_up, h_gate=h_gate, h_up=h_up, k_down=self.down.k[:, :rank],
                scale_gate=1.0, scale_up=1.0, activation=call.activation, factors=factors, adds=self._lean,
                A_down=A_down, sum_scales=(low_gate.scale, low_up.scale), room=room,
            )  # fmt: skip
            return dA_down, ([k_gate, k_up], [dB_gate, dB_up]), [*sums] if sums else [None, None]
        y = z.clone() if factors is None and self.gate_up.c is not None else None
        totals = gated_backward(dact, gate, up, activation=call.activation, factors=factors)
        dcs: list[Tensor | None] = [*totals] if totals else [None, None]
        if y is not None:
            dcs = self.gate_up.scale_gradients(z, y)
        return self.down.take_dA(dact)[0], None, dcs

    def _scaled(self, group: Group, g: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """DL/dz of dL/dy (with room), and dc, of a group of one whose y went straight into the residual."""
        if group.c is None or z is None:
            return g, None
        out = _wide(z, group.rows, group.spare)
        _, total = scale_and_sum(g[:, : group.rows], z, group.c, out=out[:, : group.rows])
        return out, total

    def _attention_backward(self, dx1: Tensor, *, need_x: bool) -> Tensor | None:
        """Dx0 (M, d) with room for the down projection before it."""
        call = self.call
        a = self.kept.pop("a")
        gz, dc = self._scaled(self.o, dx1, self.kept.pop("zo"))
        da, pairs = self.o.backward(gz, a, self.h[OUT])
        self.found["o"] = (*pairs[0], dc)
        assert da is not None
        del a, gz
        grads = torch.autograd.grad(
            self.kept.pop("graph"), self.kept.pop("edges"), da.view(*self.shape[:2], -1, call.head_dim)
        )
        del da
        y = self.kept.pop("y")
        g = _wide(y, self.qkv.rows, self.qkv.spare)
        dcs = self._unrotated(grads, y, g[:, : self.qkv.rows])
        del grads, y
        readable, rstd = self.kept.pop("n1")
        n1 = self._again(0, readable, None)
        dn1, pairs = self.qkv.backward(g, n1[:, : self.shape[-1]], self.h[QKV], need_x=need_x)
        for name, pair, one in zip("qkv", pairs, dcs, strict=True):
            self.found[name] = (*pair, one)
        return None if dn1 is None else self._through(0, dn1, readable, rstd, dx1, self.down)

    def _through(
        self, which: int, grad: Tensor, readable: Tensor, rstd: Tensor, residual: Tensor, before: Group
    ) -> Tensor:
        """The gradient of a norm's input and of the residual beside it, (M, d) with room for the group before it."""
        norm, d = self.call.norms[which], self.shape[-1]
        out = _wide(grad, d, before.spare)
        rms_norm_backward(
            grad, readable[:, :d], norm.weight, rstd, style=norm.style, normed=norm.invertible, add=residual[:, :d],
            out=out[:, :d],
        )  # fmt: skip
        return out

    def _unrotated(self, grads: Any, y: Tensor, out: Tensor) -> list[Tensor | None]:
        """Gradients of the linears' z, side by side, and dc of each; y is lost where there is a c."""
        call, group = self.call, self.qkv
        dq, dk, dv = (t if t.stride(-1) == 1 else t.contiguous() for t in grads)
        (to_qk, to_v), (qk, v) = self._heads(out), self._heads(y)
        heads = dq.shape[2]
        to_q, to_k = to_qk[:, :, :heads], to_qk[:, :, heads:]
        q, k = qk[:, :, :heads], qk[:, :, heads:]
        if group.c is not None and group.bias is None and call.head_norms is None:
            turn, factors = (call.cos, call.sin), group.c.split(group.widths)
            sums = [
                rotate_back_scaled(t, x, c, *by, out=to)
                for t, x, c, by, to in zip(
                    (dq, dk, dv), (q, k, v), factors, (turn, turn, (None, None)), (to_q, to_k, to_v), strict=True
                )
            ]
            return group.factor_gradients(torch.cat(sums))
        if call.head_norms is not None:
            rstds = self.kept.pop("rstd")
            for t, x, n, r, to in zip((dq, dk), (q, k), call.head_norms, rstds, (to_q, to_k), strict=True):
                norm_rotate_backward(t, x, n.weight, r, call.cos, call.sin, style=n.style, out=to)
        elif call.cos is not None and call.sin is not None:
            for t, to in zip((dq, dk), (to_q, to_k), strict=True):
                rotate(t, call.cos, call.sin, inverse=True, out=to)
            if group.c is not None:
                # The transpose is the inverse but for a scale that cos and sin may carry (YaRN's).
                cos, sin = call.cos.to(wide_dtype(y.dtype)), call.sin.to(wide_dtype(y.dtype))
                size = cos.square() + sin.square()
                rotate(qk, cos / size, sin / size, inverse=True)
        else:
            for t, to in zip((dq, dk), (to_q, to_k), strict=True):
                to.copy_(t)
        to_v.copy_(dv)
        return group.scale_gradients(out, y)

    def gradients(self) -> list[Tensor | None]:
        """Of the trained tensors, in their order and dtypes."""
        result: list[Tensor | None] = []
        for name, linear in self.call.linears.items():
            if linear.trained:
                result += linear.gradients(*self.found[name])
        return result


def _wide(like: Tensor, columns: int, spare: int) -> Tensor:
    """Memory for as many rows as `like` has, of so many columns."""
    return with_room(like, len(like), columns, spare)


def _memory(z: Tensor) -> Tensor:
    """All of a matrix' memory, and what lies behind its rows."""
    return z.as_strided((len(z) * z.stride(0),), (1,))


def _whole(z: Tensor, spare: int) -> Tensor:
    """The memory that `z` is the front of."""
    return z if not spare else z.as_strided((len(z), z.shape[1] + spare), z.stride(), z.storage_offset())
