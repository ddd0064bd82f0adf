"""Where LoRA's factors start, other than at random.

W (out, in) is the frozen matrix of a site, Q its values where it is held in few bits, s the adapter's scale, r its
rank; U S V^T is a singular value decomposition with falling S, and [r] takes the first r.

**PiSSA** (Meng et al., arXiv 2404.02948, equations 2 to 4) trains the principal part of W, **OLoRA** (Büyükakyüz,
arXiv 2406.01775, section 3) an orthonormal basis of its columns, from W = Q R:

    PiSSA    A0 = (S[r] / s)^1/2 V[r]^T    B0 = U[r] (S[r] / s)^1/2        OLoRA    A0 = R[r]    B0 = Q[r]
    W' = (W - s B0 A0) + s B A,    A = A0 and B = B0 at first

Both take the start out of the base. Here the base is never changed, so that other adapters and 4-bit codes stay what
they are: W' = W + s (B A - B0 A0). With a = A - A0 and b = B - B0 that is a product of rank 2r,

    B A - B0 A0 = [b, B0 + b] [A0; a]

which is what is computed, merged and saved: a plain LoRA of rank 2r and of the same scale. Trained are a and b, from
zero: their gradients are A's and B's, W' = W holds exactly at first, and in 16 bits nothing large cancels, as it does
in [B, -B0] [A; A0]. AdamW's weight decay therefore pulls W' towards W, as it does with a plain LoRA. `pissa_niter_N`
finds U, S and V by N rounds of subspace iteration (Halko et al., arXiv 0909.4061, algorithm 4.4) from random
directions: faster where r is far below the matrix's size.

**LoftQ** (Li et al., arXiv 2310.08659, equation 6) starts at the best rank-r approximation of what quantising lost:

    s B A = U[r] S[r] V[r]^T  of  W - Q        A = (S[r] / s)^1/2 V[r]^T    B = U[r] (S[r] / s)^1/2

It is the paper's algorithm with one round, since further ones would choose other codes.

**EVA** (Paischer et al., arXiv 2410.07170, section 3) starts A at the directions in which the site's inputs x vary
most, the leading eigenvectors of C = mean (x - mean x)(x - mean x)^T, and B at zero; their shares of the variance,
eigenvalue over trace, of all sites together are sorted, and the largest take the budget of the sum of all r, at most
rho r of them at one site. Inputs are centred and ranks shared as in PEFT, whose incremental decomposition has the same
limit: here C is summed up whole and decomposed once, which is exact, does not depend on how rows are batched, and needs
(in, in) numbers however many tokens there are. A site whose share is no direction at all gets no adapter.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.errors import InputError
from deltaw.core.protocols import packed_of
from deltaw.methods.contract import Start
from deltaw.models.sites import Site

INITS = "'default', 'gaussian', 'pissa', 'pissa_niter_N', 'olora', 'loftq' or 'eva'"

#: Bytes of covariances that are gathered in one pass over the rows.
_BUDGET_BYTES = 4 << 30


def is_init(value: Any) -> bool:
    """Whether `value` names a start."""
    known = r"default|gaussian|pissa|pissa_niter_[1-9]\d*|olora|loftq|eva"
    return isinstance(value, str) and re.fullmatch(known, value) is not None


def is_taken_from_base(init: str | bool) -> bool:
    """Whether a start is a part of W that W' = W + s (B A - B0 A0) counts from."""
    return str(init).startswith(("pissa", "olora"))


def starting_factors(init: str | bool, site: Site, r: int, scale: float, start: Start) -> tuple[Tensor, Tensor] | None:
    """A (r, in) and B (out, r) that a site starts from; None where it starts at random.

    Raises:
        InputError: a rank above the matrix's, or no weights from before quantising for LoftQ.
    """
    if init != "loftq" and not is_taken_from_base(init):
        return None
    if init == "loftq" and packed_of(site.weight.stored) is None:
        return None
    if r > min(site.shape):
        raise InputError(f"init {init}: r is {r} at {site.name}, whose matrix has rank {min(site.shape)}: choose less")
    W = site.weight.dequantize(dtype=torch.promote_types(site.weight.dtype, torch.float32))
    if init == "olora":
        basis, triangle = torch.linalg.qr(W)
        return triangle[:r], basis[:, :r]
    if init == "loftq":
        return _split(*_leading(_original(site, start).to(W) - W, r), scale)
    if init == "pissa":
        return _split(*_leading(W, r), scale)
    rounds = int(str(init).removeprefix("pissa_niter_"))
    return _split(*_approximately_leading(W, r, rounds, start.generator(site.name)), scale)


def check_loftq(sites: Sequence[Site], start: Start) -> None:
    """Raises an InputError unless there is something that quantising lost, and what it was is known."""
    if all(packed_of(site.weight.stored) is None for site in sites):
        raise InputError("init loftq makes up for what 4 bits lose, and the base is not in 4 bits: quantize it to nf4")
    if start.original is None:
        raise InputError(
            "init loftq needs the weights from before they were quantised: give dw.adapt(..., original=function of a "
            "module's path), such as lambda path: plain.get_submodule(path).weight"
        )


def _original(site: Site, start: Start) -> Tensor:
    assert start.original is not None
    found = start.original(site.name).detach()
    if found.shape != site.shape:
        raise InputError(f"original({site.name!r}) gave {tuple(found.shape)}: expected W (out, in), {site.shape}")
    return found


def _split(U: Tensor, S: Tensor, Vh: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """A and B with scale B A = U diag(S) Vh, the singular values shared evenly."""
    root = (S / scale).sqrt()
    return root[:, None] * Vh, U * root


def _leading(W: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :r], S[:r], Vh[:r]


def _approximately_leading(W: Tensor, r: int, rounds: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    if W.shape[0] < W.shape[1]:
        V, S, Uh = _approximately_leading(W.t(), r, rounds, generator)
        return Uh.t(), S, V.t()
    # Drawn on the CPU, so that the start does not depend on the device.
    test = torch.randn(W.shape[1], r, generator=generator, dtype=W.dtype).to(W.device)
    basis = torch.linalg.qr(W @ test)[0]
    for _ in range(rounds):
        basis = torch.linalg.qr(W @ torch.linalg.qr(W.t() @ basis)[0])[0]
    U, S, Vh = torch.linalg.svd(basis.t() @ W, full_matrices=False)
    return basis @ U, S, Vh


def eva_directions(
    model: nn.Module,
    sites: Sequence[Site],
    ranks: Mapping[str, int],
    *,
    rho: float,
    batches: Sequence[Mapping[str, Any]] | None,
) -> dict[str, Tensor]:
    """A's starting values at each site, orthonormal rows (rank, in); the rank may be 0.

    Args:
        model: the base, whose other adapters are left out.
        sites: linears and Conv1Ds.
        ranks: by site; their sum is what is shared out.
        rho: how much of its rank a site may get at most.
        batches: keyword arguments of forward passes; positions that `attention_mask` hides do not count.

    Raises:
        InputError: no batches, too few tokens in them, a site that they do not pass through, or that is an embedding.
    """
    if not batches:
        raise InputError(
            "init eva starts from what the sites read: give dw.adapt(..., batches=[{'input_ids': ..., "
            "'attention_mask': ...}, ...]) of training rows"
        )
    for site in sites:
        if site.kind == "embedding":
            raise InputError(f"init eva: {site.name} is an embedding, which reads no vectors; leave it out")
        if ranks[site.name] > site.shape[1]:
            raise InputError(f"init eva: r is {ranks[site.name]} at {site.name}, which has {site.shape[1]} inputs")
    width = {site.name: site.shape[1] for site in sites}
    leaders = _shared_inputs(model, sites, batches[0])
    members: dict[str, list[str]] = {}
    for path, leader in leaders.items():
        members.setdefault(leader, []).append(path)
    most = {lead: min(max(round(ranks[p] * rho) for p in paths), width[lead]) for lead, paths in members.items()}
    shares: dict[str, list[float]] = {}
    rows: dict[str, Tensor] = {}
    for group in _within_budget(list(members), width):
        for path, spread in _gather(model, group, batches).items():
            if spread.tokens <= most[path]:
                raise InputError(
                    f"init eva: {path} read {spread.tokens} tokens, too few for {most[path]} directions: give more rows"
                )
            shares[path], rows[path] = spread.leading(most[path])
    # Those that were decomposed come first: where sites that read the same are cut, theirs is never the lesser rank.
    order = [*members, *(path for path in leaders if path not in members)]
    counts = share_ranks({path: shares[leaders[path]] for path in order}, sum(ranks.values()))
    return {path: rows[leaders[path]][: counts[path]] for path in width}


def share_ranks(shares: Mapping[str, Sequence[float]], budget: int) -> dict[str, int]:
    """How many of each site's directions are among the `budget` largest of all; of equal ones, the first."""
    entries = [(share, path) for path, own in shares.items() for share in own]
    entries.sort(key=lambda entry: -entry[0])
    counts = dict.fromkeys(shares, 0)
    for _, path in entries[:budget]:
        counts[path] += 1
    return counts


class _Spread:
    """Sums for the covariance of a site's inputs, counted from the first rows' mean, lest two large numbers cancel."""

    def __init__(self) -> None:
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Counts x (tokens, in) in."""
        if not len(x):
            return
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if not self.tokens:
            self.origin = x.mean(0)
            self.first = torch.zeros_like(self.origin)
            self.second = x.new_zeros(x.shape[1], x.shape[1])
        x = x - self.origin
        self.first += x.sum(0)
        self.second.addmm_(x.t(), x)
        self.tokens += len(x)

    def leading(self, count: int) -> tuple[list[float], Tensor]:
        """Shares of the variance, falling, and the directions (count, in), whose largest entries are positive."""
        values, vectors = torch.linalg.eigh(self.second - torch.outer(self.first, self.first) / self.tokens)
        values = values.clamp(min=0).flip(0)
        found = vectors.flip(1)[:, :count].t()
        largest = found.gather(1, found.abs().argmax(1, keepdim=True))
        total = values.sum().clamp(min=torch.finfo(values.dtype).tiny)
        return (values[:count] / total).tolist(), found * torch.where(largest < 0, -1, 1)


def _shared_inputs(model: nn.Module, sites: Sequence[Site], batch: Mapping[str, Any]) -> dict[str, str]:
    """Each site, to the first of those in a row that are called with the very same tensor (queries, keys, values)."""
    found: dict[str, str] = {}
    last: list[Any] = [None, ""]

    def look(path: str, x: Tensor) -> None:
        if x is not last[0]:
            last[:] = x, path
        found.setdefault(path, last[1])

    _run(model, {site.name: look for site in sites}, [batch])
    unread = next((site.name for site in sites if site.name not in found), None)
    if unread is not None:
        raise InputError(f"init eva: the batches do not pass through {unread}; leave it out of target_modules")
    return found


def _within_budget(paths: Sequence[str], width: Mapping[str, int]) -> Iterator[list[str]]:
    group: list[str] = []
    taken = 0
    for path in paths:
        needed = 4 * width[path] ** 2
        if group and taken + needed > _BUDGET_BYTES:
            yield group
            group, taken = [], 0
        group.append(path)
        taken += needed
    yield group


def _gather(model: nn.Module, paths: Sequence[str], batches: Sequence[Mapping[str, Any]]) -> dict[str, _Spread]:
    spreads = {path: _Spread() for path in paths}
    config = getattr(model, "config", None)
    now: dict[str, Any] = {}

    def add(path: str, x: Tensor) -> None:
        # An encoder's mask is not of what its decoder reads; of what is laid out in another way, all counts.
        own = not getattr(config, "is_encoder_decoder", False) or "encoder" in path.split(".")
        mask = now.get("attention_mask") if own else None
        if mask is not None and mask.shape == x.shape[:-1]:
            spreads[path].add(x[mask.to(x.device).bool()])
        else:
            spreads[path].add(x.reshape(-1, x.shape[-1]))

    _run(model, dict.fromkeys(paths, add), batches, now)
    return spreads


def _run(
    model: nn.Module,
    look: Mapping[str, Callable[[str, Tensor], None]],
    batches: Sequence[Mapping[str, Any]],
    now: dict[str, Any] | None = None,
) -> None:
    """Runs the bare base over batches; `look` sees what modules are called with, `now` holds the batch at hand."""
    device = next(model.parameters()).device

    def hook(path: str) -> Callable[..., None]:
        return lambda module, args, kwargs: look[path](path, args[0] if args else next(iter(kwargs.values())))

    with contextlib.ExitStack() as after, torch.no_grad():
        for path in look:
            handle = model.get_submodule(path).register_forward_pre_hook(hook(path), with_kwargs=True)
            after.callback(handle.remove)
        for module in model.modules():
            after.callback(setattr, module, "training", module.training)
            adapted: Any = module._modules.get("adapted")
            if adapted is not None:
                after.callback(setattr, adapted, "active", adapted.active)
                adapted.active = {}
        model.eval()
        for batch in batches:
            given = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
            if now is not None:
                now.update(given)
            model(**given)
