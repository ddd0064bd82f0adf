"""Models in 4 bits on disk: quantising while reading, and bitsandbytes' folders, both ways.

transformers renames, splits and joins what a checkpoint holds; it does so here too. It is given tensors that are read
when it comes to them, and a quantizer by its public registry, which quantises each before the next is read.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.checkpoint.streaming import StoredTensor, read_folder
from deltaw.core.errors import InputError
from deltaw.models.sites import base_modules, fused_experts, kind_of, task_heads
from deltaw.quant.bitsandbytes import STATE_KEY, from_bitsandbytes, to_bitsandbytes
from deltaw.quant.config import NF4
from deltaw.quant.model import quantizable, quantized_sites
from deltaw.quant.tensor import NF4Tensor, dense, frozen
from deltaw.quant.weight import NF4Weight, nested_scales

log = logging.getLogger("deltaw")

_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(\w+)")
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE_KEY)
#: Values quantised at once: quantising takes several float32 copies of them.
_PIECE = {"cpu": 1 << 18, "cuda": 1 << 20}


class _Stop(BaseException):
    """Carries an error past transformers, which collects every `Exception` of a conversion and goes on."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class PackedTensor:
    """A 4-bit matrix in a folder of bitsandbytes' form; `.to` reads it as an `NF4Tensor`."""

    def __init__(self, name: str, weight: StoredTensor, parts: dict[str, StoredTensor]) -> None:
        self.name = name
        self.weight = weight
        self.parts = parts

    @functools.cached_property
    def shape(self) -> torch.Size:
        """(out, in), as the quantisation state says."""
        try:
            return torch.Size(json.loads(bytes(self.parts[STATE_KEY].to().tolist()))["shape"])
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{self.name} has a damaged quantisation state: copy the folder again") from None

    def get_shape(self) -> list[int]:
        """(out, in)."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """A floating one: the values', not the storage's."""
        return "F32"

    def __getitem__(self, index: Any) -> PackedTensor:
        assert index is Ellipsis, "a stored tensor is read whole"
        return self

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> NF4Tensor:
        """Reads it, with values of `dtype` (None: the one that the folder names)."""
        parts = {key: part.to() for key, part in self.parts.items()}
        return NF4Tensor(from_bitsandbytes(self.weight.to(), parts, name=self.name).to(device, dtype))


def packed_form(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor | PackedTensor]:
    """A folder's tensors with each 4-bit weight and what describes it as one.

    Raises:
        InputError: a weight of another codebook than nf4, or one whose packed values are not there.
    """
    found: dict[str, StoredTensor | PackedTensor] = dict(tensors)
    for key in tensors:
        if (match := _STATE.fullmatch(key)) is None:
            continue
        name, kind = match.groups()
        if kind != "nf4":
            raise InputError(f"{name} is quantised as {kind}: only nf4 is known; load the 16-bit model")
        if name not in tensors:
            raise InputError(f"{name} lacks beside {key}: the folder is incomplete")
        parts = {part: tensors[f"{name}.{part}"] for part in _PARTS if f"{name}.{part}" in tensors}
        found[name] = PackedTensor(name, tensors[name], parts)
        for part in parts:
            del found[f"{name}.{part}"]
    return found


def saved_quantization(config: Any, source: Any) -> dict[str, Any] | None:
    """The quantisation that a model's `config.json` names: None, or bitsandbytes' NF4.

    Raises:
        InputError: another method, 8 bits, or fp4.
    """
    for owner in (config, config.get_text_config()):
        given = getattr(owner, "quantization_config", None)
        if given:
            break
    else:
        return None
    facts: dict[str, Any] = dict(given) if isinstance(given, dict) else given.to_dict()
    method = facts.get("quant_method") or "bitsandbytes"
    if method != "bitsandbytes":
        what = f"by {method}"
    elif not facts.get("load_in_4bit"):
        what = "in 8 bits"
    else:
        kind = facts.get("bnb_4bit_quant_type", "fp4")
        what = f"as {kind}"
        if kind == "nf4":
            return facts
    raise InputError(f"{source} is quantised {what}: expected a 16-bit model or one in bitsandbytes' nf4")


def _quantized(W: Tensor, config: NF4, device: torch.device, name: str) -> NF4Weight:
    """W (out, in) in 4 bits on the device, taken there in pieces: the dense matrix is never there as a whole."""
    rows, columns = W.shape
    # Pieces end where blocks end, so that the codes are those of the whole.
    unit = config.block_size // math.gcd(columns, config.block_size)
    step = max(_PIECE.get(device.type, _PIECE["cpu"]) // max(unit * columns, 1), 1) * unit
    how: dict[str, Any] = {"block_size": config.block_size, "name": name}
    count = rows * columns
    codes = torch.empty(-(-count // 2), dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-count // config.block_size), device=device)
    for begin in range(0, rows, step):
        try:
            piece = NF4Weight.quantize(W[begin : begin + step].to(device), double_quant=False, **how)
        except InputError:
            # The whole tensor's own count of bad values.
            NF4Weight.quantize(W, **how)
            raise
        for whole, part, values in ((codes, piece.codes, 2), (absmax, piece.absmax(), config.block_size)):
            first = begin * columns // values
            whole[first : first + len(part)] = part
    scales = nested_scales(absmax) if config.double_quant else absmax
    return NF4Weight(codes, scales, (rows, columns), W.dtype, config.block_size)


@dataclass
class _Plan:
    """What is done to which parameter of the model being read.

    Attributes:
        quantize: None for a folder that is in 4 bits already.
        device: where 4-bit weights are wanted.
        targets: names of weights to be held in 4 bits, to whether they are a Conv1D's.
        shapes: of all parameters, as the model was built.
    """

    quantize: NF4 | None
    device: torch.device
    targets: dict[str, bool] = field(default_factory=dict)
    shapes: dict[str, torch.Size] = field(default_factory=dict)

    def read_model(self, model: nn.Module) -> None:
        """Takes down what is to be done, from a model without values."""
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        if self.quantize is not None:
            chosen = quantizable(model, self.quantize)
        else:
            heads = task_heads(model)
            chosen = {
                path: module
                for path, module in base_modules(model)
                if kind_of(module) in ("linear", "conv1d") and path.split(".")[0] not in heads
            }
        self.targets = {f"{path}.weight": kind_of(module) == "conv1d" for path, module in chosen.items()}

    def convert(self, name: str, value: Tensor) -> Tensor:
        """What stands in the model for a weight that has been read."""
        if name not in self.targets or (self.quantize is None and not isinstance(value, NF4Tensor)):
            return value
        transposed = self.targets[name]
        if isinstance(value, NF4Tensor):
            made = frozen(value.packed.to(self.device), transposed=transposed)
        else:
            assert self.quantize is not None
            self.check_shape(name, value)
            W = value.t() if transposed else value
            made = frozen(_quantized(W, self.quantize, self.device, name), transposed=transposed)
        self.check_shape(name, made)
        return made

    def check_shape(self, name: str, value: Tensor) -> None:
        expected = self.shapes.get(name, value.shape)
        if value.shape != expected:
            raise InputError(
                f"{name} has shape {tuple(value.shape)} in the files: expected {tuple(expected)} by config.json; "
                "copy the model again"
            )


@functools.cache
def _plugin() -> Any:
    """The configuration type by which transformers finds the quantizer below; registered once."""
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    name = "deltaw_nf4"

    class Quantize(ConversionOps):
        def __init__(self, plan: _Plan) -> None:
            self.plan = plan

        def convert(self, input_dict: dict[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
            made = {}
            for key in list(input_dict):
                value = input_dict.pop(key)
                try:
                    made[key] = self.plan.convert(key, value.pop() if isinstance(value, list) else value)
                # transformers turns what is raised here into a reference to its own report, which nobody sees.
                except Exception as error:
                    raise _Stop(error) from error
            return made

    @register_quantization_config(name)
    class Config(QuantizationConfigMixin):  # type: ignore[misc]
        def __init__(self, plan: _Plan | None = None) -> None:
            self.quant_method = name  # type: ignore[assignment]
            self.plan = plan

        def to_dict(self) -> dict[str, Any]:
            return {"quant_method": name}

    @register_quantizer(name)
    class Quantizer(HfQuantizer):  # type: ignore[misc]
        @property
        def plan(self) -> _Plan:
            config: Any = self.quantization_config
            made: _Plan = config.plan
            return made

        def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
            return param_name in self.plan.targets

        def get_quantize_ops(self) -> Quantize:
            return Quantize(self.plan)

        def is_serializable(self, *_: Any, **__: Any) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return True

    return Config


def load_quantized(
    auto: Any,
    folder: Path,
    config: Any,
    *,
    quantize: NF4 | None,
    dtype: torch.dtype,
    device: torch.device,
    **options: Any,
) -> tuple[Any, dict[str, Any]]:
    """Reads a folder into a model in 4 bits, one tensor at a time.

    Args:
        auto: transformers' auto class of the task.
        folder: a 16-bit model, or one in bitsandbytes' NF4.
        config: its configuration.
        quantize: what to put in 4 bits; None for a folder that is so already.
        dtype: of values and of what is not quantised.
        device: where the 4-bit weights go; the rest is left on the CPU.
        options: for `from_pretrained`.

    Returns:
        The model, and transformers' account of keys.

    Raises:
        InputError: damaged files, NaN or infinity in a weight (by its name), a 4-bit folder that is not what
            `quantize` asks for.
    """
    import transformers

    tensors = packed_form(read_folder(folder))
    packed = any(isinstance(tensor, PackedTensor) for tensor in tensors.values())
    for owner in (config, config.get_text_config()):
        if hasattr(owner, "quantization_config"):
            del owner.quantization_config
    where: dict[str, Any] = {}
    if not (folder / "generation_config.json").is_file():
        where = {"config_file_name": "config.json", "_from_model_config": True}
    # The auto class looks for adapters beside the weights; the class that it chooses takes tensors without a folder.
    with torch.device("meta"):
        empty = auto.from_config(config)
    kind, plan = type(empty), _Plan(None if packed else quantize, device)
    plan.read_model(empty)
    try:
        model, info = kind.from_pretrained(
            None,
            config=config if isinstance(config, kind.config_class) else config.get_text_config(),
            state_dict=tensors,
            dtype=dtype,
            quantization_config=_plugin()(plan),
            generation_config=transformers.GenerationConfig.from_pretrained(folder, **where),
            output_loading_info=True,
            **options,
        )
    except _Stop as stop:
        raise stop.error from None
    _unmark(model)
    missing = set(info["missing_keys"])
    for name, parameter in list(model.named_parameters()):
        plan.check_shape(name, parameter)
        held = isinstance(parameter, NF4Tensor)
        if held == (name in plan.targets) or (not held and (plan.quantize is None or name in missing)):
            continue
        # A task's head is trained, so it is not left in 4 bits; and of several tensors that one of the files becomes,
        # transformers asks about the first only.
        path, _, own = name.rpartition(".")
        value = dense(parameter.detach()) if held else plan.convert(name, parameter.detach())
        setattr(model.get_submodule(path), own, value if not held else nn.Parameter(value))
    if packed and quantize is not None:
        _check_agreement(model, quantize, missing, folder)
    _tell_experts(model)
    return model, info


def _unmark(model: Any) -> None:
    """Takes transformers' marks off: by them its Trainer refuses a model and its `save_pretrained` asks a quantizer."""
    for module in model.modules():
        config = getattr(module, "config", None)
        for owner, names in (
            (module, ("hf_quantizer", "quantization_method", "is_quantized")),
            (config, ("quantization_config", "_is_quantized")),
        ):
            for name in names:
                if name in getattr(owner, "__dict__", {}):
                    delattr(owner, name)


def _check_agreement(model: nn.Module, quantize: NF4, missing: Iterable[str], folder: Path) -> None:
    held = {path: weight.packed for path, _, weight in quantized_sites(model)}
    asked = {path for path in quantizable(model, quantize) if f"{path}.weight" not in missing}
    kinds = {(packed.double_quant, packed.block_size) for packed in held.values()}
    if set(held) == asked and kinds == {(quantize.double_quant, quantize.block_size)}:
        return
    kind = " and ".join(f"{'8' if double else '32'}-bit scales of {block} values" for double, block in sorted(kinds))
    raise InputError(
        f"{folder} is in 4 bits already ({len(held)} matrices, {kind}), which is not what {quantize} asks for "
        f"({len(asked)} matrices): leave quantize out to load it as it is"
    )


def _tell_experts(model: nn.Module) -> None:
    names = set(fused_experts(model))
    experts = [parameter for name, parameter in model.named_parameters() if name in names]
    if experts:
        log.warning(
            "%d fused expert tensors (%s parameters, %s bytes) stay in %s: only matrices are held in 4 bits",
            len(experts),
            f"{sum(parameter.numel() for parameter in experts):,}",
            f"{sum(parameter.nbytes for parameter in experts):,}",
            str(experts[0].dtype).removeprefix("torch."),
        )


# Writing.


@contextlib.contextmanager
def saved_form(model: Any) -> Iterator[dict[str, Any]]:
    """What `save_pretrained` is to be given for a model with 4-bit weights, whose configuration says so meanwhile.

    Raises:
        InputError: a 4-bit weight that bitsandbytes' form or its loading by transformers has no place for.
    """
    held = {path: (module, weight) for path, module, weight in quantized_sites(model)}
    if not held:
        yield {}
        return
    check_savable(model, held)
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        if isinstance(value, NF4Tensor):
            state |= {f"{key}{part}": tensor for part, tensor in to_bitsandbytes(value.packed).items()}
        else:
            state[key] = value
    model.config.quantization_config = _bitsandbytes_config(model, held)
    try:
        yield {"state_dict": state, "save_original_format": not _rewritten(model, held)}
    finally:
        del model.config.quantization_config


def check_savable(model: Any, held: dict[str, Any]) -> None:
    """Raises an `InputError` where what is held in 4 bits has no place in bitsandbytes' form."""
    from transformers.pytorch_utils import Conv1D

    dense = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    dense |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for path, (module, _) in held.items():
        instead = ""
        if isinstance(module, nn.Embedding):
            reason, instead = "bitsandbytes' form has no 4-bit embedding", "NF4(embeddings=False, head=False)"
        elif type(module) is not nn.Linear and not isinstance(module, Conv1D):
            reason = f"transformers loads no 4-bit {type(module).__name__}"
            others = [name for name, (other, _) in held.items() if type(other) is type(module)]
        elif kept := [name for name in dense if _skips(name, path)]:
            reason, others = f"transformers loads {kept[0]} in float32 only", kept
        else:
            continue
        instead = instead or f"NF4(skip_modules={sorted({name.rpartition('.')[2] for name in others})})"
        raise InputError(f"cannot save {path} in 4 bits: {reason}; quantise with {instead} to save the model")


def _skips(entry: str, path: str) -> bool:
    """Whether any release of transformers takes an entry of `llm_int8_skip_modules` to mean a module."""
    return re.match(entry, path) is not None or path.endswith(entry)


def _bitsandbytes_config(model: Any, held: dict[str, Any]) -> dict[str, Any]:
    """`quantization_config`, as transformers' BitsAndBytesConfig writes it, which needs bitsandbytes to be made."""
    skipped = []
    for path, module in base_modules(model):
        if path not in held and kind_of(module) in ("linear", "conv1d"):
            clash = any(_skips(path, other) for other in held)
            skipped.append(f"^{re.escape(path)}$" if clash else path)
    weights = [weight.packed for _, weight in held.values()]
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": str(weights[0].dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": any(weight.double_quant for weight in weights),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def _rewritten(model: Any, held: Iterable[str]) -> bool:
    """Whether going back to the checkpoint's own layout would cut or join 4-bit weights, which cannot be done."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    back = [one.reverse_transform() for one in conversions if isinstance(one, WeightConverter)]
    return any(one.rename_source_key(f"{path}.weight")[1] is not None for one in back for path in held)


@dataclass(frozen=True)
class QuantizedBytes:
    """What a model's weights take.

    Attributes:
        parameters: held in 4 bits.
        bytes: their codes and scales.
        other_parameters: the rest of the model.
        other_bytes: theirs.
    """

    parameters: int
    bytes: int
    other_parameters: int
    other_bytes: int

    @property
    def bits(self) -> float:
        """Bits a parameter of what is held in 4 bits: 4.127 with double quantisation, 4.5 without; 0 for none."""
        return 8 * self.bytes / self.parameters if self.parameters else 0.0


def quantized_bytes(model: nn.Module) -> QuantizedBytes:
    """Counts parameters and bytes; what modules share counts once."""
    held = [p for p in model.parameters() if isinstance(p, NF4Tensor)]
    other = [p for p in model.parameters() if not isinstance(p, NF4Tensor)]
    return QuantizedBytes(
        sum(p.numel() for p in held),
        sum(p.packed.nbytes for p in held),
        sum(p.numel() for p in other),
        sum(p.nbytes for p in other),
    )
