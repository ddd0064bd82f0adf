"""Parts that any adapter can bring along: trained biases, rows of an embedding, whole trained copies of modules.

All are kept beside the base, never in it, so that several adapters share one base and unloading leaves it untouched.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltaw.core.errors import InputError, near
from deltaw.core.protocols import LowRank
from deltaw.methods.contract import Placed
from deltaw.models.sites import Site, base_modules, output_head, site_of


class BiasPart(nn.Module):
    """A trained bias b' in place of the module's b: adds b' - b to the output."""

    replaces = False
    dropout = 0.0

    def __init__(self, module: nn.Module, *, on_site: bool, dtype: torch.dtype | None) -> None:
        super().__init__()
        bias = module.bias
        assert isinstance(bias, Tensor)
        self.bias = nn.Parameter(bias.detach().to(dtype or torch.float32, copy=True))
        # PEFT finds the bias of an adapted module one level down, under its wrapper's `base_layer`.
        self.key = ".base_layer.bias" if on_site else ".bias"
        object.__setattr__(self, "_module", module)

    def low_rank(self) -> LowRank | None:
        """None: a bias is no product."""
        return None

    def shift(self) -> Tensor | None:
        """The trained bias less the module's: (out,)."""
        return self.bias - self._module.bias.detach().to(self.bias.dtype)

    def update(self, x: Tensor, base_out: Tensor) -> Tensor:
        """The shift, broadcast over tokens."""
        shift = self.shift()
        assert shift is not None
        return shift.to(base_out.dtype).expand_as(base_out)

    def delta(self, rows: slice | None = None) -> Tensor | None:
        """None: the matrix stays."""
        return None

    def replacements(self) -> dict[str, Tensor]:
        """None: a merge adds the shift."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """The bias under PEFT's key."""
        return {self.key: self.bias.detach()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes the bias back."""
        with torch.no_grad():
            self.bias.copy_(tensors[self.key])

    def described(self) -> dict[str, Any]:
        """What it is."""
        return {"part": "bias"}


class TokenRows(nn.Module):
    """New values for chosen rows of an embedding (vocab, dim), or of the output head tied to it.

    With S selecting the rows, W' = W + S (T - S^T W): a low-rank update whose one factor is fixed.
    """

    replaces = False
    dropout = 0.0

    def __init__(
        self, site: Site, indices: Sequence[int], *, dtype: torch.dtype | None, tied_to: TokenRows | None = None
    ) -> None:
        super().__init__()
        stored = site.weight.stored.detach()
        index = torch.tensor(sorted(set(indices)), dtype=torch.long, device=stored.device)
        if not len(index) or int(index[0]) < 0 or int(index[-1]) >= stored.shape[0]:
            raise InputError(f"trainable tokens {list(indices)!r}: expected row numbers of {site.name} below {stored.shape[0]}")
        self.kind = site.kind
        self.register_buffer("index", index, persistent=False)
        if tied_to is None:
            self.rows = nn.Parameter(stored[index].to(dtype or torch.float32, copy=True))
        else:
            self.rows = tied_to.rows
        self.tied = tied_to is not None
        object.__setattr__(self, "_site", site)

    def low_rank(self) -> LowRank | None:
        """None: one of its factors is fixed, and it is no dense product."""
        return None

    def shift(self) -> Tensor | None:
        """None: the bias stays as it is."""
        return None

    def _shift(self) -> Tensor:
        return self.rows - self._site.weight.stored.detach()[self.index].to(self.rows.dtype)

    def update(self, x: Tensor, base_out: Tensor) -> Tensor:
        """Adds T - W at chosen tokens (embedding), or h (T - W)^T at chosen logits (head)."""
        shift = self._shift().to(base_out.dtype)
        if self.kind == "embedding":
            slot = torch.full((self._site.shape[1],), -1, dtype=torch.long, device=x.device)
            slot[self.index] = torch.arange(len(self.index), device=x.device)
            found = slot[x]
            padded = torch.cat([shift, shift.new_zeros(1, shift.shape[1])])
            scale = getattr(self._site.module, "embed_scale", None)
            rows = padded[found]
            return rows if scale is None else rows * torch.as_tensor(scale, dtype=rows.dtype, device=rows.device)
        out = torch.zeros_like(base_out)
        return out.index_add(-1, self.index, x.to(shift.dtype) @ shift.t())

    def delta(self, rows: slice | None = None) -> Tensor | None:
        """T - W at the chosen rows of the stored matrix, zero elsewhere: (out, in) rows, float32."""
        out_features, in_features = self._site.shape
        full = torch.zeros((out_features, in_features), dtype=torch.float32, device=self.rows.device)
        shift = self._shift().detach().float()
        if self.kind == "embedding":
            full[:, self.index] = shift.t()
        else:
            full[self.index] = shift
        return full if rows is None else full[rows]

    def replacements(self) -> dict[str, Tensor]:
        """None of the module's parameters is replaced whole."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """The rows under PEFT's key; nothing for the tied twin."""
        return {} if self.tied else {".token_adapter.trainable_tokens_delta": self.rows.detach()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes the rows back."""
        if not self.tied:
            with torch.no_grad():
                self.rows.copy_(tensors[".token_adapter.trainable_tokens_delta"])

    def described(self) -> dict[str, Any]:
        """What it is."""
        return {"part": "tokens", "rows": len(self.index), "tied": self.tied}


class ModuleCopy(nn.Module):
    """A whole trained copy of a module, used in its place (`modules_to_save`: a new classifier, a norm, a head)."""

    replaces = True
    dropout = 0.0

    def __init__(self, module: nn.Module, *, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.copy = copy.deepcopy(module)
        for inner in self.copy.modules():
            # Another adapter may already sit on the module; its copy starts from the bare base.
            if inner._modules.pop("adapted", None) is not None:
                del inner.__dict__["forward"]
        if dtype is not None:
            self.copy.to(dtype)
        for parameter in self.copy.parameters():
            parameter.requires_grad_(True)

    def low_rank(self) -> LowRank | None:
        """None: a copy has no factors."""
        return None

    def shift(self) -> Tensor | None:
        """None: the bias stays as it is."""
        return None

    def update(self, x: Tensor, base_out: Tensor) -> Tensor:
        """The copy's output less the module's."""
        replaced: Tensor = self.copy(x)
        return replaced - base_out

    def delta(self, rows: slice | None = None) -> Tensor | None:
        """None: the parameters are replaced, not changed."""
        return None

    def replacements(self) -> dict[str, Tensor]:
        """Every parameter of the copy."""
        return {name: parameter.detach() for name, parameter in self.copy.named_parameters()}

    def tensors(self) -> dict[str, Tensor]:
        """The copy's state under the module's own keys."""
        return {f".{name}": tensor.detach() for name, tensor in self.copy.state_dict().items()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes the state back."""
        self.copy.load_state_dict({name.removeprefix("."): tensor for name, tensor in tensors.items()})

    def described(self) -> dict[str, Any]:
        """What it is."""
        return {"part": "copy"}


def saved_modules(model: nn.Module, names: Sequence[str] | None) -> list[str]:
    """Paths of the modules that `modules_to_save` names (a path or the end of one).

    Raises:
        InputError: a name matches nothing.
    """
    found: list[str] = []
    modules = [name for name, _ in base_modules(model) if name]
    for wanted in names or ():
        matched = [name for name in modules if name == wanted or name.endswith("." + wanted)]
        if not matched:
            ends = {name.rsplit(".", 1)[-1] for name in modules} - {str(i) for i in range(1000)}
            hint = near(wanted, ends) or sorted(ends)[:12]
            raise InputError(
                f"modules_to_save {wanted!r} matches no module of {type(model).__name__}: near names are {', '.join(hint)}"
            )
        found.extend(matched)
    return [name for name in dict.fromkeys(found) if not any(name.startswith(other + ".") for other in found)]


def companions(
    model: nn.Module,
    sites: Sequence[Site],
    *,
    bias: Literal["none", "all", "lora_only"],
    modules_to_save: Sequence[str] | None,
    trainable_tokens: Sequence[int] | dict[str, list[int]] | None,
    dtype: torch.dtype | None,
) -> list[Placed]:
    """The parts that come along with an adapter on `sites`."""
    placed: list[Placed] = []
    on_site = {site.name for site in sites}
    copied = saved_modules(model, modules_to_save)
    modules = dict(base_modules(model))
    for path in copied:
        placed.append(Placed(path, ModuleCopy(modules[path], dtype=dtype)))
    if bias != "none":
        for path, module in modules.items():
            inside = any(path == name or path.startswith(name + ".") for name in copied)
            has = isinstance(getattr(module, "bias", None), nn.Parameter)
            if has and not inside and (bias == "all" or path in on_site):
                placed.append(Placed(path, BiasPart(module, on_site=path in on_site, dtype=dtype)))
    if trainable_tokens is not None:
        placed.extend(_token_parts(model, modules, trainable_tokens, dtype))
    return placed


def _token_parts(
    model: nn.Module,
    modules: dict[str, nn.Module],
    tokens: Sequence[int] | dict[str, list[int]],
    dtype: torch.dtype | None,
) -> list[Placed]:
    getter: Any = getattr(model, "get_input_embeddings", None)
    if isinstance(tokens, dict):
        chosen = {}
        for wanted, indices in tokens.items():
            paths = [path for path in modules if path == wanted or path.endswith("." + wanted)]
            if not paths:
                raise InputError(f"trainable tokens name {wanted!r}, which is no module of {type(model).__name__}")
            chosen.update(dict.fromkeys(paths, indices))
    else:
        embedding = getter() if getter is not None else None
        paths = [path for path, module in modules.items() if module is embedding]
        if not paths:
            raise InputError(f"{type(model).__name__} has no input embedding: give trainable tokens as {{module: rows}}")
        chosen = {paths[0]: list(tokens)}
    placed: list[Placed] = []
    head = output_head(model)
    for path, indices in chosen.items():
        part = TokenRows(site_of(path, modules[path]), indices, dtype=dtype)
        placed.append(Placed(path, part))
        tied = head is not None and head is not modules[path] and head.weight is modules[path].weight
        if tied:
            head_path = next(name for name, module in modules.items() if module is head)
            twin = TokenRows(site_of(head_path, modules[head_path]), indices, dtype=dtype, tied_to=part)
            placed.append(Placed(head_path, twin))
    return placed
