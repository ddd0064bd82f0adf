"""A causal language model's loss from the positions that carry one, without the logits of the others.

transformers runs the head on every position and upcasts all logits; with short answers after long prompts nearly all
of that is masked away. Here the base model runs as always, the rows whose shifted label is not -100 are picked from its
last hidden states, and `linear_cross_entropy` makes the loss from them. What a model's own `forward` does between
hidden states and loss is not known in general, so a model is taken by structure and then tried against itself.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.kernels.linear_cross_entropy import linear_cross_entropy

_STATE = "_deltaw_loss_head"
_IGNORED = -100

#: Arguments that causal models hand to their base unchanged. A call with any other one runs the model's own forward,
#: which may do more with it than pass it on (images, labels of a second head, slices of logits).
_PASSED_ON = frozenset(
    "input_ids attention_mask position_ids inputs_embeds past_key_values token_type_ids cache_position use_cache "
    "cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k seq_idx".split()
)
_FOR_THE_LOSS = frozenset({"labels", "shift_labels", "num_items_in_batch"})
#: Requests, by argument or in the configuration, for outputs that only the model's own forward puts together.
_EXTRA_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")


@dataclass
class _LossHead:
    """What was found out about one model: logits = softcap(scale * head(base(...)))."""

    base: nn.Module
    scale: float
    softcap: float | None
    evaluation: bool
    output_class: type[Any]


def install_loss_head(model: nn.Module, *, evaluation: bool = False) -> str | None:
    """Makes `model(..., labels=...)` in training compute its loss from the positions that carry loss alone.

    Replaces `forward` on this instance; the class, and calls without labels, in evaluation mode, with arguments outside
    the usual ones or with requests for hidden states, attentions or router logits stay as they are. The fast call
    returns the model's own output class with `loss`, and with `logits` None; unless `use_cache` is given it keeps no
    key/value cache. `num_items_in_batch` and `shift_labels` mean what they mean to transformers' Trainer. Where no
    position carries loss, the loss is 0 with zero gradients (transformers': NaN), so that every parameter of a
    distributed run takes part in the step.

    A head that is not a bare `nn.Linear` when called (adapted, hooked, sharded) is called as a module, still on the
    positions with loss alone. Before installing, loss and last hidden states are compared with the model's own on a
    batch of two rows of five tokens, in evaluation mode; random state, modes and buffers are as before afterwards.

    Args:
        model: a transformers causal language model. Install before wrapping it for distributed training.
        evaluation: also take the fast path in evaluation mode, where callers then find no logits.

    Returns:
        None where it is installed (also when it was before), else the reason in a few words.
    """
    if _STATE in model.__dict__:
        model.__dict__[_STATE].evaluation = evaluation
        return None
    reason = _structure_objection(model)
    if reason is not None:
        return reason
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    scale, softcap = _logit_shape(config)
    # The base that the model calls: OPT's is not its `base_model` but the decoder inside.
    candidates = [model.base_model, model.get_decoder()]  # type: ignore[operator]
    for base in dict.fromkeys(b for b in candidates if isinstance(b, nn.Module) and b is not model):
        state = _LossHead(base, scale, softcap, evaluation, dict)
        reason = _trial_objection(model, state)
        if reason is None:
            model.__dict__[_STATE] = state
            # A bound method, not a closure: deepcopy binds it to the copy, and its signature is the class's, by which
            # the Trainer chooses columns and decides whether to pass num_items_in_batch.
            model.__dict__["forward"] = MethodType(_replacement(type(model).forward), model)
            return None
    return reason or "it has no base model apart from its head"


def uninstall_loss_head(model: nn.Module) -> bool:
    """Gives `model` its own forward back. Returns whether there was anything to undo.

    Raises:
        InputError: something else has replaced `forward` since; that has to be taken off first.
    """
    if _STATE not in model.__dict__:
        return False
    if not getattr(getattr(model.__dict__.get("forward"), "__func__", None), _STATE, False):
        raise InputError("model.forward was replaced after the loss head was installed: undo that replacement first")
    del model.__dict__["forward"], model.__dict__[_STATE]
    return True


def _structure_objection(model: nn.Module) -> str | None:
    """Why this model's class or configuration rules it out; None if nothing does."""
    from transformers import PreTrainedModel
    from transformers.loss.loss_utils import ForCausalLMLoss

    if not isinstance(model, PreTrainedModel):
        return f"{type(model).__name__} is not a transformers model"
    if getattr(model.config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model"
    if "forward" in model.__dict__:
        return "its forward has been replaced already"
    if model.loss_function is not ForCausalLMLoss:
        return "its loss is not transformers' causal language modelling loss"
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        return "its loss includes the routers' auxiliary loss (output_router_logits)"
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module) or not isinstance(getattr(head, "weight", None), Tensor):
        return "it has no output embeddings with a weight"
    if any(p.is_meta for p in model.parameters()):
        return "some of its weights are not loaded (meta device)"
    return None


def _logit_shape(config: Any) -> tuple[float, float | None]:
    """Scale and soft cap of the logits. Cohere's and Falcon-H1's factor multiplies, Granite's divides."""
    factors = {name: getattr(config, name, None) for name in ("logit_scale", "lm_head_multiplier", "logits_scaling")}
    multiply, again, divide = (1.0 if factor is None else float(factor) for factor in factors.values())
    return multiply * again / divide, getattr(config, "final_logit_softcapping", None)


def _replacement(own: Callable[..., Any]) -> Callable[..., Any]:
    """The forward to bind: takes the fast path where it holds, `own` everywhere else."""
    signature = inspect.signature(own)
    self_name = next(iter(signature.parameters))
    var_keyword = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: _LossHead | None = self.__dict__.get(_STATE)
        if state is None or not (self.training or state.evaluation):
            return own(self, *args, **kwargs)
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        del given[self_name]
        given |= given.pop(var_keyword, {})
        if not _fits(self.config, given):
            return own(self, *args, **kwargs)
        if "use_cache" in signature.parameters and given.get("past_key_values") is None:
            given.setdefault("use_cache", False)
        return _fast(self, state, given)

    setattr(forward, _STATE, True)
    return forward


def _fits(config: Any, given: dict[str, Any]) -> bool:
    """Whether a call asks for a loss and for nothing that only the model's own forward can give."""
    if given.get("labels") is None:
        return False
    if not given.pop("return_dict", True) or not getattr(config, "return_dict", True):
        return False
    if any(given.pop(name, getattr(config, name, False)) or getattr(config, name, False) for name in _EXTRA_OUTPUTS):
        return False
    if not isinstance(given.get("logits_to_keep", 0), int) or given.pop("logits_to_keep", 0):
        return False
    return all(name in _PASSED_ON or name in _FOR_THE_LOSS for name, value in given.items() if value is not None)


class _Positions:
    """Where a mask (n,) is true, counted on a GPU while the host goes on: behind the base model it would drain it."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        if mask.is_cuda:
            self.count = torch.empty((), dtype=torch.int64, pin_memory=True)
            self.count.copy_(mask.sum(), non_blocking=True)
            self.counted = torch.cuda.Event()
            self.counted.record(torch.cuda.current_stream(mask.device))

    def index(self) -> Tensor:
        """The positions (count,), in order."""
        if not self.mask.is_cuda:
            return self.mask.nonzero()[:, 0]
        self.counted.synchronize()
        return self.mask.logical_not().to(torch.uint8).argsort(stable=True)[: int(self.count)]


def _fast(model: Any, state: _LossHead, given: dict[str, Any]) -> Any:
    labels = given["labels"]
    shifted = given.get("shift_labels")
    if shifted is None:
        shifted = F.pad(labels, (0, 1), value=_IGNORED)[..., 1:]
    positions = _Positions(shifted.reshape(-1) != _IGNORED)
    outputs = state.base(**{name: value for name, value in given.items() if name in _PASSED_ON and value is not None})
    hidden = outputs.last_hidden_state
    if shifted.shape != hidden.shape[:-1]:
        raise InputError(
            f"labels have shape {tuple(shifted.shape)} and the model gave {tuple(hidden.shape[:-1])} positions: "
            "expected the same"
        )
    targets = shifted.reshape(-1).to(hidden.device, torch.int64)
    index = positions.index().to(hidden.device)
    loss = _loss_sum(model.get_output_embeddings(), state, hidden.flatten(0, -2)[index], targets[index])
    if len(index):
        items = given.get("num_items_in_batch")
        loss = loss / (len(index) if items is None else items.to(loss.device) if torch.is_tensor(items) else items)
    known = {field.name for field in fields(state.output_class)}
    return state.output_class(**{k: v for k, v in outputs.items() if k in known}, loss=loss, logits=None)


def _loss_sum(head: nn.Module, state: _LossHead, rows: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy of the rows (positions, d) that carry loss."""
    if _is_bare_linear(head):
        assert isinstance(head.weight, Tensor) and (head.bias is None or isinstance(head.bias, Tensor))
        return linear_cross_entropy(
            rows, head.weight, targets, bias=head.bias, softcap=state.softcap, logit_scale=state.scale,
            ignore_index=None,
        )  # fmt: skip
    logits = head(rows).float() * state.scale
    if state.softcap is not None:
        logits = torch.tanh(logits / state.softcap) * state.softcap
    return F.cross_entropy(logits, targets, reduction="sum")


def _is_bare_linear(head: nn.Module) -> bool:
    """Whether calling the head is exactly x W^T + b: no adapter, no replaced forward, no hook, no sharded weight."""
    return (
        type(head) is nn.Linear
        and not head._modules
        and "forward" not in head.__dict__
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks)
        and type(head.weight) in (nn.Parameter, Tensor)
    )


def _trial_objection(model: Any, state: _LossHead) -> str | None:
    """Compares the fast path with the model's own forward on a tiny batch; fills in `state.output_class`.

    In a fresh model logits are near 0, where a soft cap or a missing bias shows in no loss. So the base's output is
    replaced, in both, by states that give logits of standard deviation 20, and the true outputs are compared as well.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    vocab = min(head.weight.shape[0], embedding.weight.shape[0])
    draw = generator(0, "loss head")
    ids = torch.randint(0, vocab, (2, 5), generator=draw).to(embedding.weight.device)
    labels = ids.clone()
    labels[0, :3] = labels[1, 4] = _IGNORED
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    calls = [given]
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values()):
        calls.append(given | {"shift_labels": labels.roll(1, 1), "num_items_in_batch": torch.tensor(7)})
    seen: list[Tensor] = []

    def swap(module: nn.Module, args: Any, outputs: Any) -> Any:
        true = outputs.last_hidden_state
        states = torch.randn(true.shape, generator=generator(1, "loss head")).to(true)
        with torch.no_grad():
            spread = head(states).float().std()
        outputs.last_hidden_state = states * (20.0 / spread).to(true)
        seen.append(true)
        return outputs

    with undisturbed(model):
        handle = state.base.register_forward_hook(swap)
        try:
            for call in calls:
                seen.clear()
                own = model.forward(**call)
                state.output_class = type(own)
                if not seen or not hasattr(own, "loss") or not hasattr(own, "logits"):
                    return "its forward does not go from a base model's last hidden states to a loss"
                ours = _fast(model, state, call)
                loose = 2e-2 if own.logits.dtype.itemsize < 4 or seen[0].dtype.itemsize < 4 else 1e-4
                if not torch.allclose(seen[0], seen[1], rtol=loose, atol=loose):
                    return "its forward calls its base model in another way"
                if not torch.allclose(ours.loss.float(), own.loss.float(), rtol=loose, atol=0.0):
                    return f"its own loss differs on a trial batch ({own.loss.item():.6g}, not {ours.loss.item():.6g})"
        except Exception as error:
            # Whatever an unknown model raises here, it is a model that this path is not for.
            line = str(error).strip().partition("\n")[0]
            return f"a trial batch failed ({type(error).__name__}: {line})"
        finally:
            handle.remove()
    return None


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; puts random state, modes and buffers back."""
    modes = [(module, module.training) for module in model.modules()]
    # Buffers above a million elements are storage (quantised weights), not state that a forward pass changes.
    buffers = [
        (module, name, buffer, buffer.clone() if buffer.numel() <= 1 << 20 else None)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    cuda = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    try:
        for module, _ in modes:
            module.training = False
        with torch.random.fork_rng(devices=cuda), torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, name, buffer, values in buffers:
            if values is not None and not torch.equal(buffer, values):
                buffer.copy_(values)
            module._buffers[name] = buffer
