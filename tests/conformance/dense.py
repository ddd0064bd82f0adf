"""The dense reference: the plain model called with W' = W + scale B A and its like, built whole by plain operations."""

import contextlib

import torch
from torch.func import functional_call

from deltaw.methods.companions import ModuleCopy, TokenRows
from deltaw.methods.host import parts_of


def dense_parameters(model, weights):
    """The base's parameters that the adapters change, by name, as differentiable functions of the adapters' own."""
    changed = {}

    def current(path, leaf):
        return changed.get(f"{path}.{leaf}", model.get_submodule(path)._parameters[leaf].detach())

    for name, weight in weights.items():
        for path, module, part in parts_of(model, name):
            if isinstance(part, ModuleCopy):
                assert weight == 1
                changed |= {f"{path}.{key}": value for key, value in part.copy.named_parameters(remove_duplicate=False)}
                continue
            if isinstance(part, TokenRows):
                W, stored = current(path, "weight"), module.weight.detach()
                chosen = torch.zeros(len(W), dtype=W.dtype).index_fill(0, part.index, 1.0)[:, None]
                rows = torch.zeros_like(W).index_copy(0, part.index, part.rows.to(W.dtype))
                changed[f"{path}.weight"] = W + weight * chosen * (rows - stored)
                continue
            if (low := part.low_rank()) is not None:
                W = current(path, "weight")
                delta = low.scale * (low.B.to(W.dtype) @ low.A.to(W.dtype))
                flipped = delta.shape != W.shape or type(module).__name__ == "Conv1D"
                if low.out_scale is not None:
                    own = module.weight.detach().t() if flipped else module.weight.detach()
                    delta = low.out_scale[:, None].to(W.dtype) * (own + delta) - own
                delta = delta.t() if flipped else delta
                if type(module).__name__ == "Embedding" and W.shape[0] == W.shape[1]:
                    raise AssertionError("a square embedding leaves its layout open: use another shape")
                changed[f"{path}.weight"] = W + weight * delta
            if (shift := part.shift()) is not None:
                b = current(path, "bias")
                changed[f"{path}.bias"] = b + weight * shift.to(b.dtype)
    return changed


def dense_call(plain, model, weights, **kwargs):
    """`plain` (the bare base, of the dtype to compute in) called with the dense parameters; biases' aliases follow."""
    dtype = next(plain.parameters()).dtype
    changed = {name: value.to(dtype) for name, value in dense_parameters(model, weights).items()}
    by_bias = {id(model.get_parameter(name)): value for name, value in changed.items() if name.endswith(".bias")}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.endswith(".bias") and "adapted" not in name.split(".") and id(parameter) in by_bias:
            changed.setdefault(name, by_bias[id(parameter)])
    with contextlib.nullcontext():
        return functional_call(plain, changed, args=(), kwargs=kwargs, tie_weights=False)
