"""Fused decoder layers: recognised by their structure, tried against their own forward, installed on the instance.

No class is touched. A layer whose forward was replaced asks at every call whether the fused function fits what is asked
now (a cache, hooks, dropout, an adapter of another kind, gradients by example), and runs its own forward where not.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltaw.core.contexts import sink_context
from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.core.protocols import packed_of
from deltaw.fuse import flash
from deltaw.fuse.block import run_block
from deltaw.fuse.call import GROUPS, Call, Norm
from deltaw.fuse.directions import Directions, directions
from deltaw.fuse.head import undisturbed
from deltaw.fuse.keep import Keep, Room
from deltaw.fuse.linears import fused_linear, hooked
from deltaw.fuse.plan import PROJECTIONS, Fusion, Layer
from deltaw.fuse.store import join, part
from deltaw.kernels.gated import gated_torch
from deltaw.kernels.norm import invertible, rms_norm_torch
from deltaw.methods.host import book_of

_STATE = "_deltaw_fused"
Fp8 = Literal["none", "backward", "most", "all"]
#: Names of the linears with products in 8-bit floats: forward, and backward.
FP8: dict[Fp8, tuple[frozenset[str], frozenset[str]]] = {
    "none": (frozenset(), frozenset()),
    "backward": (frozenset(), frozenset(PROJECTIONS)),
    "most": (frozenset({"o", "gate", "up"}), frozenset(PROJECTIONS)),
    "all": (frozenset(PROJECTIONS), frozenset(PROJECTIONS)),
}
#: Modules of a layer that the fused function knows; one more, and it is another structure.
_KNOWN = frozenset(
    "input_layernorm post_attention_layernorm self_attn mlp self_attn.q_norm self_attn.k_norm mlp.act_fn "
    "self_attn.rotary_fn".split()
) | frozenset(PROJECTIONS.values())
#: Arguments of a layer's forward that are not handed on to attention.
_OWN = frozenset({"hidden_states", "attention_mask", "past_key_values", "use_cache", "position_embeddings"})


def install_blocks(
    model: nn.Module,
    *,
    keep: Keep | None = None,
    room: Room | None = None,
    fp8: Fp8 = "none",
    by_flash: bool = False,
    joins: bool | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[int, int, str | None]:
    """Fuses the decoder layers of a model that the fused function computes as they do themselves.

    Before, each layer's output and input gradient are compared with its own on five tokens. Install before wrapping the
    model for distributed training.

    Args:
        model: a transformers model.
        keep: what layers keep for the backward pass; None: chosen by `room`.
        room: the memory there is; by default the card's.
        fp8: which products with frozen weights are made in 8-bit floats.
        by_flash: whether causal attention without a mask is computed by FlashAttention 4, see `flash.py`.
        joins: whether dense weights that read one input become parts of one matrix until `uninstall_blocks`; None: on
            a GPU. False where they will be sharded. Joined ones are views with longer rows: save a model afterwards.
        say: takes a line about what is kept, for each batch longer than those before.

    Returns:
        How many layers are fused, how many there are, and why the first one that is not is left as it is.
    """
    layers = _decoder_layers(model)
    forward, backward = FP8[fp8]
    fusion = Fusion(keep, room or Room(), len(layers), say, backward, forward, by_flash)
    reasons: list[str] = []
    found: list[Layer] = []
    for index, module in enumerate(layers):
        layer = _structure(module, index, fusion)
        if isinstance(layer, str):
            reasons.append(layer)
        else:
            found.append(layer)
    if found:
        objections = _tried(model, found)
        reasons += objections.values()
        found = [layer for layer in found if layer.index not in objections]
    for layer in found:
        fusion.firsts[layer.index] = layer.norms[0]
        layer.module.__dict__[_STATE] = layer
        layer.module.__dict__["forward"] = MethodType(_replacement(type(layer.module).forward), layer.module)
        if joins or (joins is None and layer.norms[0].weight.is_cuda):
            _join(layer)
    reason = reasons[0] if reasons else None if layers else "it has no list of decoder layers"
    return len(found), len(layers), reason


def uninstall_blocks(model: nn.Module) -> int:
    """Gives all fused layers their own forward back. Returns how many there were.

    Raises:
        InputError: something else has replaced a layer's forward since.
    """
    count = 0
    for module in model.modules():
        if _STATE not in module.__dict__:
            continue
        if not getattr(getattr(module.__dict__.get("forward"), "__func__", None), _STATE, False):
            raise InputError("a layer's forward was replaced after it was fused: undo that replacement first")
        _part(module.__dict__[_STATE])
        del module.__dict__["forward"], module.__dict__[_STATE]
        count += 1
    return count


def _join(layer: Layer) -> None:
    """Makes a layer's dense weights one matrix for each group, with room for the adapters that are active now."""
    for names in GROUPS:
        modules = [layer.module.get_submodule(PROJECTIONS[name]) for name in names.split()]
        linears = [linear for module in modules if not isinstance(linear := fused_linear(module), str)]
        if layer.fusion.fp8_forward.issuperset(names.split()) or len(linears) < len(modules):
            continue
        whole = join([module.weight for module in modules], sum(linear.rank for linear in linears))
        if whole is not None:
            layer.fusion.store.joined[layer.index, names] = whole


def _part(layer: Layer) -> None:
    """Undoes `_join`."""
    for names in GROUPS:
        whole = layer.fusion.store.joined.get((layer.index, names))
        weights = [layer.module.get_submodule(PROJECTIONS[name]).weight for name in names.split()]
        if whole is not None:
            storage = whole.untyped_storage().data_ptr()
            part(w for w in weights if packed_of(w) is None and w.untyped_storage().data_ptr() == storage)
            layer.fusion.store.factors.forget([(layer.index, names)])
            del layer.fusion.store.joined[layer.index, names]


def set_turn(model: nn.Module, turn: int) -> None:
    """Says which optimizer step this is: by it fused layers' 8-bit weights are rounded with other scales.

    See `spreads` in `kernels/fp8.py`. Without it they are always rounded in the same way.
    """
    layer = next((layer for layer in _decoder_layers(model) if _STATE in layer.__dict__), None)
    if layer is not None:
        # All layers share it.
        layer.__dict__[_STATE].fusion.store.turn = turn


def learn_directions(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
    """From a batch (batch, seq) learns how 8-bit products forward make up for rounding: see `directions.py`.

    The model runs it with its adapters as they are, by the layers' own forward. A model that is sharded knows no whole
    weights: learn before.
    """
    learned: dict[Any, Directions] = {}

    def learn(layer: Layer, names: str) -> Any:
        modules = [layer.module.get_submodule(PROJECTIONS[name]) for name in names.split()]
        linears = [linear for module in modules if not isinstance(linear := fused_linear(module), str)]

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0] if attention_mask is None else args[0][attention_mask.bool()]
            W = torch.cat([linear.weight.dequantize(dtype=torch.float32) for linear in linears])
            learned[layer.index, names] = directions(x.flatten(0, -2), W)

        # What no fused function computes now has nothing to be made up for.
        return modules[0].register_forward_pre_hook(hook) if len(linears) == len(modules) else None

    fused = [layer.__dict__[_STATE] for layer in _decoder_layers(model) if _STATE in layer.__dict__]
    handles = [
        handle
        for layer in fused
        for names in GROUPS
        if layer.fusion.fp8_forward.issuperset(names.split()) and (handle := learn(layer, names)) is not None
    ]
    try:
        if handles:
            with undisturbed(model):
                getattr(model, "base_model", model)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for layer in fused:
        layer.fusion.store.directions = learned


def leave_checkpointing(model: nn.Module) -> None:
    """Turns transformers' recomputation off around fused layers, which make things again by themselves."""
    for layer in _decoder_layers(model):
        if _STATE in layer.__dict__ and hasattr(layer, "gradient_checkpointing"):
            layer.gradient_checkpointing = False


def needs_mask(model: nn.Module) -> bool:
    """Whether rows that are padded on the right need an attention mask.

    Under causal attention no token sees what comes after it. Without a mask attention takes its fastest kernels; what
    padding computes has no loss. False only where all layers are known to be causal, and nothing reads lengths.
    """
    layers = _decoder_layers(model)
    fused = [layer for layer in layers if _STATE in layer.__dict__ and layer.self_attn.is_causal is True]
    return not layers or len(fused) < len(layers) or bool(book_of(model).beside)


def _decoder_layers(model: Any) -> list[Any]:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else getattr(model, "base_model", model)
    layers = getattr(decoder, "layers", None)
    return list(layers) if isinstance(layers, nn.ModuleList) else []


def _structure(module: Any, index: int, fusion: Fusion) -> Layer | str:
    if "forward" in module.__dict__:
        return "a layer's forward has been replaced already"
    own = {path for path, _ in module.named_modules() if path and "adapted" not in path.split(".")}
    needed = {"input_layernorm", "post_attention_layernorm", *PROJECTIONS.values()}
    if not needed <= own:
        return f"{type(module).__name__} has no {sorted(needed - own)[0]}"
    if extra := sorted(own - _KNOWN):
        return f"{type(module).__name__} has {extra[0]} too"
    head_dim = getattr(module.self_attn, "head_dim", None)
    if not isinstance(head_dim, int) or not isinstance(getattr(module.self_attn, "scaling", None), float):
        return f"{type(module.self_attn).__name__} does not say its head_dim and scaling"
    norms = [_norm(getattr(module, name)) for name in ("input_layernorm", "post_attention_layernorm")]
    heads = [_norm(getattr(module.self_attn, f"{n}_norm")) for n in "qk" if f"self_attn.{n}_norm" in own]
    if None in norms or None in heads or len(heads) == 1:
        return "its norms are no RMS norms"
    if any(norm is not None and norm.weight.shape != (head_dim,) for norm in heads):
        return "its norms of queries and keys are not by head"
    activation = _activation(module.mlp.act_fn)
    if activation is None:
        return "its activation is none of silu, gelu and gelu's tanh form"
    return Layer(module, index, head_dim, activation, tuple(norms), tuple(heads) or None, fusion)  # type: ignore[arg-type]


def _norm(module: Any) -> Norm | None:
    """The norm that a module computes, by trying it."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float) or weight.requires_grad:
        return None
    x = torch.randn(3, len(weight), generator=generator(0, "norm")).to(weight)
    with torch.no_grad():
        wanted = module(x)
        for style in ("llama", "gemma"):
            y, _ = rms_norm_torch(x, weight.detach(), eps=eps, style=style)  # type: ignore[arg-type]
            if _close(y, wanted):
                return Norm(module, eps, style, invertible(weight, style))  # type: ignore[arg-type]
    return None


def _activation(function: Any) -> str | None:
    x = torch.linspace(-6.0, 6.0, 97)[None]
    with torch.no_grad():
        wanted = function(x)
        for name in ("silu", "gelu_tanh", "gelu"):
            if torch.allclose(gated_torch(x, torch.ones_like(x), activation=name), wanted, rtol=1e-5, atol=1e-6):  # type: ignore[arg-type]
                return name
    return None


def _close(ours: Tensor, theirs: Tensor) -> bool:
    loose = 2e-2 if theirs.dtype.itemsize < 4 else 1e-4
    difference, size = (ours.double() - theirs.double()).norm(), theirs.double().norm()
    return bool(difference <= loose * size)


def _replacement(own: Any) -> Any:
    signature = inspect.signature(own)
    self_name = next(iter(signature.parameters))
    var_keyword = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        layer: Layer | None = self.__dict__.get(_STATE)
        if layer is None or not self.training or not torch.is_grad_enabled():
            if layer is not None:
                # Who computes without training may need the memory.
                layer.fusion.store.bridged.clear()
            return own(self, *args, **kwargs)
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        del given[self_name]
        given |= given.pop(var_keyword, {})
        call = call_of(layer, given)
        if isinstance(call, str):
            return own(self, *args, **kwargs)
        return run_block(given["hidden_states"], call)

    setattr(forward, _STATE, True)
    return forward


def call_of(layer: Layer, given: dict[str, Any], keep: Keep | None = None) -> Call | str:
    """A layer's call as the fused function takes it, or why it does not fit; `keep` None is asked of the plan."""
    module, x = layer.module, given.get("hidden_states")
    if given.get("past_key_values") is not None or given.get("use_cache"):
        return "a cache is wanted"
    if not isinstance(x, Tensor) or x.dim() != 3 or torch.is_autocast_enabled(x.device.type):
        return "the arithmetic's dtype is autocast's to choose"
    if sink_context() is not None:
        return "gradients are wanted by example"
    attn = module.self_attn
    if getattr(attn, "attention_dropout", 0.0):
        return "attention has dropout"
    inner = [attn, module.mlp, *(norm.module for norm in (*layer.norms, *(layer.head_norms or ())))]
    if any(hooked(child) or "forward" in child.__dict__ for child in (*inner, module.mlp.act_fn)):
        return "a module inside the layer has hooks, or a forward of its own"
    linears = {}
    for name, path in PROJECTIONS.items():
        linear = fused_linear(module.get_submodule(path))
        if isinstance(linear, str):
            return linear
        if linear.weight.dtype != x.dtype:
            return "weights and activations differ in dtype"
        linears[name] = linear
    if linears["gate"].scaled != linears["up"].scaled:
        return "one of gate and up has magnitudes"
    rotation = given.get("position_embeddings")
    cos, sin = rotation if rotation is not None else (None, None)
    fusion = layer.fusion
    return Call(
        head_dim=layer.head_dim,
        activation=layer.activation,
        norms=layer.norms,
        head_norms=layer.head_norms,
        linears=linears,
        cos=cos,
        sin=sin,
        attend=_attention(attn, given, fusion.by_flash),
        keep=keep or fusion.of(layer, x, masked=given.get("attention_mask") is not None),
        host=fusion.host,
        fp8=fusion.fp8,
        fp8_forward=fusion.fp8_forward,
        store=fusion.store,
        handed=fusion.handed,
        index=layer.index,
        following=_whole(fusion.firsts.get(layer.index + 1)),
        passed=fusion.passed,
    )


def _whole(norm: Norm | None) -> Norm | None:
    """The next layer's norm, unless its weight is in parts until that layer runs."""
    return norm if norm is not None and type(norm.module.weight) in (nn.Parameter, Tensor) else None


def _attention(attn: Any, given: dict[str, Any], by_flash: bool) -> Any:
    """The call that the layer's own attention would make between rotation and output projection."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager: Any = getattr(sys.modules[type(attn).__module__], "eager_attention_forward", None)
    interface: Any = ALL_ATTENTION_FUNCTIONS.get_interface(attn.config._attn_implementation, eager)
    mask = given.get("attention_mask")
    rest = {name: value for name, value in given.items() if name not in _OWN}
    if hasattr(attn, "sliding_window"):
        rest["sliding_window"] = attn.sliding_window

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if by_flash and flash.takes(q, attn, mask):
            return flash.attend(q, k, v, attn.scaling)
        with _fastest(q, mask):
            out: Tensor = interface(attn, q, k, v, mask, dropout=0.0, scaling=attn.scaling, **rest)[0]
        return out

    return attend


def _fastest(q: Tensor, mask: Any) -> Any:
    """On a GPU without a mask, cuDNN's attention first, where it takes the shapes."""
    from contextlib import nullcontext

    if not q.is_cuda or mask is not None or q.dtype == torch.float32:
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [
        SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
    ]  # fmt: skip
    return sdpa_kernel(order, set_priority=True)


def _tried(model: Any, layers: list[Layer]) -> dict[int, str]:
    """By index, why a layer is not computed as by itself: output and input gradient on five tokens differ."""
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            calls[index] = (args, kwargs)

        return hook

    embedding = model.get_input_embeddings()
    ids = torch.randint(0, embedding.weight.shape[0], (1, 5), generator=generator(0, "fused layers"))
    handles = [layer.module.register_forward_pre_hook(note(layer.index), with_kwargs=True) for layer in layers]
    try:
        with undisturbed(model):
            getattr(model, "base_model", model)(input_ids=ids.to(embedding.weight.device), use_cache=False)
    except Exception as error:
        line = str(error).strip().partition("\n")[0]
        return {layer.index: f"a trial batch failed ({type(error).__name__}: {line})" for layer in layers}
    finally:
        for handle in handles:
            handle.remove()
    objections = {}
    for layer in layers:
        if layer.index not in calls:
            objections[layer.index] = "the model does not call it"
        elif (objection := _differs(layer, *calls[layer.index])) is not None:
            objections[layer.index] = objection
    return objections


def _differs(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    module = layer.module
    signature = inspect.signature(type(module).forward)
    given = dict(signature.bind(module, *args, **kwargs).arguments)
    del given[next(iter(signature.parameters))]
    for p in signature.parameters.values():
        if p.kind is p.VAR_KEYWORD:
            given |= given.pop(p.name, {})
    if not isinstance(given.get("hidden_states"), Tensor):
        return f"{type(module).__name__} is not called with hidden_states"
    x = given.pop("hidden_states").detach()
    modes = [(child, child.training) for child in module.modules()]
    try:
        # What training will meet at every call: dropout, weights that are trained themselves.
        module.train()
        call = call_of(layer, {**given, "hidden_states": x}, keep="input")
        if isinstance(call, str):
            return call
        module.eval()
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            same = _computes_the_same(layer, x, given)
    except Exception as error:
        line = str(error).strip().partition("\n")[0]
        return f"a trial failed ({type(error).__name__}: {line})"
    finally:
        for child, mode in modes:
            child.training = mode
    return None if same else f"{type(module).__name__} computes something else"


def _computes_the_same(layer: Layer, like: Tensor, given: dict[str, Any]) -> bool:
    """Updates and input gradients of the layer's own forward and of the fused function, on random rows."""
    own = type(layer.module).forward
    call = call_of(layer, {**given, "hidden_states": like}, keep="input")
    assert isinstance(call, Call)
    call.fp8 = call.fp8_forward = frozenset()

    def output(x: Tensor) -> Tensor:
        out = own(layer.module, x, **given)
        first: Tensor = out[0] if isinstance(out, tuple) else out
        return first

    x, g = (torch.randn(like.shape, generator=generator(0, f"fused {what}")).to(like) for what in ("input", "gradient"))
    with torch.no_grad():
        update = (output(x) - x).float()
    # Norms make the update the same for smaller rows, and rounding of its sum with them must not hide it.
    x = x * (0.3 * update.square().mean().sqrt()).clamp(1e-3, 1.0).to(x.dtype)
    results = []
    for run in (output, lambda t: run_block(t, call)):
        leaf = x.clone().requires_grad_()
        with torch.enable_grad():
            out = run(leaf)
        results.append((out.detach() - x, torch.autograd.grad(out, leaf, g)[0] - g))
    return all(_close(ours, theirs) for theirs, ours in zip(*results, strict=True))
