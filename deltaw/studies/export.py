"""Models as other programs read them: in 4 bits for bitsandbytes, and runs for transformers, vLLM and bitsandbytes.

vLLM serves a LoRA beside its base, from a folder in PEFT's layout, of which it reads one rank, one scale and the
tensors of linear modules (`vllm/lora/peft_helper.py`, `vllm/lora/lora_model.py`; ranks: `vllm/config/lora.py`).
Patterns of ranks and scales are passed over there, so an adapter is rewritten with one of each: factors of a smaller
rank get rows and columns of zeros, and another scale goes into B.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.checkpoint import load_adapter, load_model, load_tokenizer, save_model
from deltaw.checkpoint.adapters import PREFIX, adapter_folder, read_adapter, write_state
from deltaw.checkpoint.model_files import model_facts, pick_dtype
from deltaw.checkpoint.quantized import check_savable, quantized_bytes, saved_quantization
from deltaw.core.errors import InputError, unknown_name
from deltaw.core.files import atomic_folder
from deltaw.core.protocols import LowRank
from deltaw.methods import AdaLoRA, LoRA, adapt, delete_adapter
from deltaw.methods.host import parts_of
from deltaw.models.sites import base_modules, fused_experts, kind_of, output_head, task_heads
from deltaw.models.sources import resolve
from deltaw.quant import NF4, NF4Tensor, quantizable, quantized_sites
from deltaw.studies.catalogue import empty_model
from deltaw.studies.merged import merge_into, new_folder, one_base, stored_dtype
from deltaw.studies.plain_lora import made_plain, write_plain
from deltaw.studies.ship import FinishedRun, model_labels, open_run, run_of_adapter
from deltaw.train.run_folder import peak_memory_bytes

Say = Callable[[str], None]

TARGETS = ("hf", "vllm", "bnb", "lora")
#: What vLLM's `--max-lora-rank` may be, but for the 1 that only its newer releases take.
MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

#: AdaLoRA's tensors, which become LoRA's.
ADALORA_KEYS = (".lora_A", ".lora_B", ".lora_E")

_HEADS = {"ForSequenceClassification": "sequence-classification", "ForTokenClassification": "token-classification"}


# A model in 4 bits.


def quantize_into(
    output: str | os.PathLike[str],
    *,
    model: str,
    quantize: NF4,
    task: str | None = None,
    labels: Sequence[str] | None = None,
    dtype: str = "auto",
    device: str = "auto",
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Writes a model in bitsandbytes' NF4, as a folder that transformers with bitsandbytes, vLLM and deltaw load.

    The weights are read and quantised one by one: the process takes at no time more than the 4-bit model and its two
    largest 16-bit tensors.

    Args:
        output: the folder to write: new, or empty.
        model: an embedded name, a folder, a `.gguf` file or a hub id.
        quantize: what is quantised, and how.
        task: what the model is for; None means what its architecture says.
        labels: names of the classes of a classification model; None means the model's own.
        dtype: of what is not quantised; `auto` is the one that the model is stored in, bfloat16 for float32.
        device: where the codes are computed.
        say: takes lines of progress.

    Returns:
        What was quantised (`matrices`, `parameters`, `bytes`, `bits` a parameter), what was `kept` in 16 bits by its
        part in the model, `source_bytes` and `weights_bytes` of the weights before and after, the process' peak.

    Raises:
        InputError: a folder that is not empty, a model that is in 4 bits already, a NaN or an infinity in a weight,
            what bitsandbytes' form has no place for.
    """
    new_folder(output)
    _check_model(model)
    config = _configuration(model)
    if (saved := saved_quantization(config, model)) is not None:
        kind = "with 8-bit scales" if saved.get("bnb_4bit_use_double_quant") else "with 32-bit scales"
        raise InputError(f"{model} is in 4 bits already (bitsandbytes' nf4 {kind}): load it as it is")
    task, names = _task_of(model, config, task, labels)
    source_dtype = stored_dtype(model)
    kept = source_dtype if source_dtype.itemsize == 2 else torch.bfloat16
    if dtype != "auto":
        kept = pick_dtype(dtype, torch.device("cpu"))
    if task.endswith("classification") and not _made_for(config):
        say("the classification head is new, and untrained")
    # Before any weight is read.
    empty = empty_model(model, task)
    check_savable(empty, {path: (module, None) for path, module in quantizable(empty, quantize).items()})
    tokenizer = load_tokenizer(model)
    say(f"quantising {model} tensor by tensor")
    loaded = load_model(model, task=task, dtype=kept, device=device, labels=names, quantize=quantize)
    say(f"writing {output}")
    save_model(loaded, output, tokenizer=tokenizer)
    return {
        "model": model,
        "class": type(loaded).__name__,
        "task": task,
        "dtype": _name(kept),
        "double_quant": quantize.double_quant,
        "block_size": quantize.block_size,
        **_counted(loaded, resolve(model).path_or_id, source_dtype),
        "weights_bytes": _weights(output),
        "output": str(output),
        "output_bytes": _size(output),
        "peak_memory_bytes": peak_memory_bytes(torch.device("cpu")),
    }


def _counted(loaded: nn.Module, source: str, source_dtype: torch.dtype) -> dict[str, Any]:
    """What is in 4 bits and what is not; the bytes before are computed where the source is no folder."""
    counts = quantized_bytes(loaded)
    whole = (counts.parameters + counts.other_parameters) * source_dtype.itemsize
    return {
        "matrices": len({id(weight) for _, _, weight in quantized_sites(loaded)}),
        "parameters": counts.parameters,
        "bytes": counts.bytes,
        "bits": round(counts.bits, 4),
        "kept": _kept(loaded),
        "source_bytes": _weights(source) or whole,
    }


def _check_model(model: str) -> None:
    """Sends a run or an adapter, which bring their base along, to where they are merged into it."""
    if run_of_adapter(model) is not None or (Path(model) / "run.json").is_file():
        raise InputError(f"{model} is a run, not a model: deltaw export {model} --to bnb writes it merged, in 4 bits")
    if (Path(model) / "adapter_config.json").is_file() and not (Path(model) / "config.json").is_file():
        raise InputError(
            f"{model} is an adapter, not a model: deltaw export --adapter {model} --model BASE --to bnb writes it "
            "merged, in 4 bits"
        )


def _configuration(model: str) -> Any:
    import transformers

    # Its errors are one line.
    model_facts(model)
    return transformers.AutoConfig.from_pretrained(resolve(model).path_or_id, trust_remote_code=False)


def _task_of(model: str, config: Any, task: str | None, labels: Sequence[str] | None) -> tuple[str, list[str] | None]:
    """The task to load a model for, and its class names."""
    if task is None:
        generative = model_facts(model).generative
        if not generative and any(name.endswith("Model") for name in config.architectures or ()):
            raise InputError(
                f"{model} is an encoder without a head: name what it is for with --task (sequence-classification or "
                "token-classification) and its classes with --labels"
            )
        task = _made_for(config) or ("causal-lm" if generative else "masked-lm")
    if not task.endswith("classification"):
        if labels is not None:
            raise InputError(f"labels were given, and {task} has no classes: name a classification with --task")
        return task, None
    names = list(labels) if labels is not None else model_labels(model)
    if names is None and _made_for(config):
        names = [str(config.id2label[index]) for index in sorted(config.id2label)]
    if names is None:
        raise InputError(f"{model} has no classes of its own: name them with --labels")
    return task, names


def _made_for(config: Any) -> str | None:
    """The classification that a model's file holds a head for."""
    names = config.architectures or ()
    return next((task for end, task in _HEADS.items() for name in names if name.endswith(end)), None)


def _kept(model: nn.Module) -> dict[str, dict[str, int]]:
    """What is not in 4 bits, counted by its part in the model; what is shared counts once."""
    head, experts, heads = output_head(model), set(fused_experts(model)), (*task_heads(model), "pooler")
    found: dict[str, dict[str, int]] = {}
    seen: set[int] = set()
    for path, module in base_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is None or isinstance(parameter, NF4Tensor) or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if f"{path}.{name}" in experts:
                part = "fused experts"
            elif any(own in heads for own in path.split(".")):
                part = "task head"
            elif kind_of(module) == "embedding":
                part = "embeddings"
            elif module is head:
                part = "output head"
            elif name == "weight" and kind_of(module) is not None:
                part = "other matrices"
            else:
                part = "norms and biases"
            counts = found.setdefault(part, {"tensors": 0, "parameters": 0, "bytes": 0})
            counts["tensors"] += 1
            counts["parameters"] += parameter.numel()
            counts["bytes"] += parameter.nbytes
    return found


def _weights(folder: str | os.PathLike[str]) -> int:
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def _size(folder: str | os.PathLike[str]) -> int:
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


# A run for other programs.


def export_into(
    output: str | os.PathLike[str],
    *,
    to: str,
    run: str | None = None,
    adapter: str | None = None,
    model: str | None = None,
    name: str | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Writes what a run made, or an adapter, as another program takes it.

    `hf` is the merged model for plain transformers, in the dtype of the base, or 16 bits where that is in 4. `bnb` is
    the merged model in bitsandbytes' NF4. `vllm` is the adapter as vLLM serves it beside its base. `lora` is an
    adapter of another method (AdaLoRA's) as the plain LoRA that computes the same, which everybody reads.

    Args:
        output: the folder to write: new, or empty.
        to: `hf`, `vllm`, `bnb` or `lora`.
        run: a run folder.
        adapter: an adapter folder, in the place of a run.
        model: the base; None means the one that the run was trained on.
        name: what vLLM's requests call the adapter; None means the name of its folder.
        say: takes lines of progress.

    Returns:
        `to` and, for `vllm`, `command` (what serves it), `name`, `r`, `max_lora_rank`, `padded` and `rescaled`;
        for `lora` what `write_plain` gives; else what `merge_into` gives or, for a run that trained the whole model,
        `quantize_into`.

    Raises:
        InputError: no finished run there, a folder that is not empty, for `vllm` what it does not serve.
    """
    if to not in TARGETS:
        raise unknown_name("form to export to", to, TARGETS)
    if name is not None and (to != "vllm" or not re.fullmatch(r"[^\s=,{]+", name)):
        wanted = "expected no spaces, commas, = or {" if to == "vllm" else f"it is for vllm, and {to} takes none"
        raise InputError(f"name is {name!r}: {wanted}")
    if (run is None) == (adapter is None):
        raise InputError("nothing to export: give a run folder, or an adapter (--adapter) with its base (--model)")
    new_folder(output)
    path = str(run or adapter)
    folder = run_of_adapter(path) or (run if run is not None else None)
    finished = open_run(folder) if folder is not None else None
    if finished is not None and finished.adapter is None:
        return {"to": to, **_whole_model(output, to, finished, say)}
    base = one_base(model, [finished] if finished else [], [(path, 1.0)])
    if to == "lora":
        return {"to": to, **write_plain(output, path, base, finished)}
    if to == "vllm":
        return {"to": to, **_for_vllm(output, path, base, finished, name)}
    into: str | None = "nf4"
    if to == "hf":
        into = None if _quantization(base, finished) is None else _half(finished)
    return {"to": to, **merge_into(output, adapters=[(path, 1.0)], model=model, into=into, say=say)}


def _whole_model(output: str | os.PathLike[str], to: str, run: FinishedRun, say: Say) -> dict[str, Any]:
    """What a run made that trained the whole model: there is nothing to merge."""
    if to == "lora":
        raise InputError(f"the run at {run.path} trained the whole model: there is no adapter to write as LoRA")
    if to == "vllm":
        raise InputError(
            f"the run at {run.path} trained the whole model: vllm serve {shlex.quote(run.model)} serves it as it is"
        )
    if to == "bnb":
        return quantize_into(
            output, model=run.model, quantize=NF4(), task=run.config.task, labels=_classes(run), say=say
        )
    say(f"copying {run.model}, as the run trained the whole model")
    with atomic_folder(output) as folder:
        shutil.copytree(run.model, folder, dirs_exist_ok=True)
    facts = {"model": run.model, "task": run.config.task, "dtype": _name(stored_dtype(output))}
    return {**facts, "adapters": [], "output": str(output), "output_bytes": _size(output)}


def _classes(run: FinishedRun) -> list[str] | None:
    return run.labels if (run.config.task or "").endswith("classification") else None


def _quantization(base: str, run: FinishedRun | None) -> NF4 | dict[str, Any] | None:
    """How the base of an adapter is held in 4 bits: by its folder, or by the run; None: it is not."""
    return saved_quantization(_configuration(base), base) or (run.config.quantization if run is not None else None)


def _half(run: FinishedRun | None) -> str:
    """The 16-bit dtype to write a 4-bit base's values in: float16 where the adapter was trained on such."""
    trained = run.record.get("device", {}).get("dtype") if run is not None else None
    return "float16" if trained == "float16" else "bf16"


# For vLLM.


def _for_vllm(
    output: str | os.PathLike[str], path: str, base: str, run: FinishedRun | None, name: str | None
) -> dict[str, Any]:
    """Writes an adapter with one rank and one scale, and gives the command that serves it."""
    folder = adapter_folder(path)
    _, config, tensors = read_adapter(folder)
    place = resolve(base).path_or_id
    _refuse(folder, [*_unserved_features(config), *_unserved_tensors(tensors), *_unserved_class(base)])
    # The base's modules without its weights: what is adapted, and whether the adapter fits.
    empty = empty_model(base, "causal-lm")
    load_adapter(empty, folder, name="original")
    parts = {site: (module, part) for site, module, part in parts_of(empty, "original")}
    _refuse(folder, _unserved_modules(empty, parts))
    if isinstance(config, AdaLoRA):
        tensors = made_plain(empty, "original", tensors)
        parts = {site: (module, part) for site, module, part in parts_of(empty, "original")}
    lows = {site: part.low_rank() for site, (_, part) in parts.items()}
    r, scale, state = _normal_form(lows, tensors, folder)
    delete_adapter(empty, "original")
    adapt(empty, LoRA(r=r, alpha=r * scale, target_modules=list(lows)), name="served")
    with atomic_folder(output) as made:
        write_state(empty, "served", state, made, base_model=place)
    known = next(rank for rank in MAX_RANKS if rank >= r)
    served = name or _served_name(path)
    four_bits = _quantization(base, run)
    record = {
        "model": base,
        "adapter": str(folder),
        "name": served,
        "r": r,
        "alpha": r * scale,
        "max_lora_rank": known,
        "dtype": _name(next(iter(state.values())).dtype),
        "sites": len(lows),
        "padded": sum(low.A.shape[0] < r for low in lows.values()),
        "rescaled": sum(low.scale != scale for low in lows.values()),
        "parameters": sum(tensor.numel() for tensor in state.values()),
        "output": str(output),
        "output_bytes": _size(output),
        "command": _serve(place, served, str(output), known, four_bits is not None),
    }
    if isinstance(four_bits, NF4) and four_bits != NF4():
        record["note"] = (
            "the run's 4-bit base has scales in 32 bits, and vLLM's own quantisation has them in 8: write the base "
            f"with deltaw quantize {shlex.quote(base)} --no-double-quant --output FOLDER and serve that"
        )
    return record


def _refuse(folder: Path, reasons: Sequence[str]) -> None:
    if reasons:
        raise InputError(f"vLLM does not serve {folder} beside its base, for {'; '.join(reasons)}: use --to hf")


def _unserved_features(config: Any) -> list[str]:
    if type(config) not in (LoRA, AdaLoRA):
        return [f"its method is {type(config).__name__}, and vLLM knows LoRA"]
    fields = {
        "bias": config.bias != "none" and config.bias,
        "lora_bias": getattr(config, "lora_bias", False),
        "modules_to_save": config.modules_to_save and list(config.modules_to_save),
        "trainable_tokens": config.trainable_tokens,
    }
    return [f"it has {field}={value!r}" for field, value in fields.items() if value]


def _unserved_tensors(tensors: dict[str, Tensor]) -> list[str]:
    factors = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B", *ADALORA_KEYS)
    known = ("bias", "modules_to_save", "trainable_tokens")
    others = [key for key in sorted(tensors) if not key.endswith(factors) and not any(part in key for part in known)]
    return [f"it carries {others[0].removeprefix(PREFIX)} beside its factors"] if others else []


def _unserved_class(base: str) -> list[str]:
    config = _configuration(base)
    if config.is_encoder_decoder or not model_facts(base).generative:
        return [f"{base} is {config.model_type}, which is no decoder that generates"]
    return []


def _unserved_modules(model: Any, parts: dict[str, tuple[nn.Module, Any]]) -> list[str]:
    """What vLLM has no LoRA for, of each kind the first; embeddings and heads it takes in few architectures."""
    found: dict[str, str] = {}
    head = output_head(model)
    for path, (module, _) in parts.items():
        kind = kind_of(module)
        what = {"embedding": "an embedding", "conv1d": "a Conv1D"}.get(str(kind))
        if module is head:
            what = "the output head"
        if what is not None:
            found.setdefault(what, path)
    return [f"it adapts {what} ({path})" for what, path in found.items()]


def _normal_form(
    lows: dict[str, LowRank], tensors: dict[str, Tensor], folder: Path
) -> tuple[int, float, dict[str, Tensor]]:
    """The largest rank, the scale that most sites have, and tensors with both that compute the same.

    B times a ratio of scales is kept in float32 where the adapter's own dtype would round it; the rest stays bit for
    bit what it is.
    """
    r = max(low.A.shape[0] for low in lows.values())
    if r > MAX_RANKS[-1]:
        _refuse(folder, [f"rank {r}, above its largest of {MAX_RANKS[-1]}"])
    scale = Counter(low.scale for low in lows.values()).most_common(1)[0][0]
    state: dict[str, Tensor] = {}
    for site, low in lows.items():
        key_A, key_B = (f"{PREFIX}{site}.lora_{factor}.weight" for factor in "AB")
        A, B = tensors[key_A], tensors[key_B]
        if low.scale != scale:
            scaled = B.to(torch.promote_types(B.dtype, torch.float32)) * (low.scale / scale)
            B = scaled.to(B.dtype) if torch.equal(scaled.to(B.dtype).to(scaled.dtype), scaled) else scaled
        missing = r - A.shape[0]
        state[key_A] = nn.functional.pad(A, (0, 0, 0, missing))
        state[key_B] = nn.functional.pad(B, (0, missing))
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in state.values()))
    return r, scale, {key: tensor.to(dtype) for key, tensor in state.items()}


def _served_name(path: str) -> str:
    folder = Path(path).resolve()
    folder = folder.parent if folder.name == "adapter" else folder
    return re.sub(r"[^\w.-]+", "-", folder.name).strip("-") or "adapter"


def _serve(base: str, name: str, folder: str, rank: int, four_bits: bool) -> str:
    """The command line; vLLM cuts NAME=PATH at every = and takes what has a comma for JSON."""
    import json

    module = f"{name}={folder}" if not re.search("[=,]", folder) else json.dumps({"name": name, "path": folder})
    words = ["vllm", "serve", base, "--enable-lora", "--lora-modules", module, "--max-lora-rank", str(rank)]
    return shlex.join([*words, *(["--quantization", "bitsandbytes"] if four_bits else [])])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
