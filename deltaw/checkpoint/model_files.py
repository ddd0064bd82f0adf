"""Loading and saving whole models. Weights come from safetensors only; a new task's head is drawn from a named seed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltaw.checkpoint.quantized import load_quantized, saved_form, saved_quantization
from deltaw.core.errors import DeltawError, InputError, RunError, unknown_name
from deltaw.core.files import as_os_error, atomic_folder
from deltaw.core.generators import generator
from deltaw.methods.host import book_of, sites_of
from deltaw.models.sites import task_heads
from deltaw.models.sources import ModelSource, explain_hub_error, resolve
from deltaw.quant.config import NF4

TASKS = ("causal-lm", "instruct", "sequence-classification", "token-classification", "masked-lm")

#: What transformers would read as weights.
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """The device to compute on: CUDA where there is one, else the CPU; or the one named, if it is there."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        made = torch.device(device)
    except RuntimeError:
        raise InputError(f"device {device!r}: expected auto, cpu, cuda or cuda:N") from None
    if made.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {str(device)!r}: torch {torch.__version__} sees no CUDA device; use cpu")
    return made


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
    return False


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device has it, float32 elsewhere."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    if dtype not in _DTYPES:
        raise unknown_name("dtype", dtype, ["auto", *_DTYPES])
    return _DTYPES[dtype]


def load_model(
    source: str | os.PathLike[str],
    *,
    task: str = "causal-lm",
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    labels: Sequence[str] | None = None,
    seed: int = 0,
    attn_implementation: str | None = None,
    quantize: NF4 | None = None,
) -> Any:
    """Loads a model for a task.

    With `quantize`, and from a folder in bitsandbytes' NF4, the weights are read one by one, and the process takes
    at no time more than the 4-bit model and its two largest 16-bit tensors.

    Args:
        source: an embedded name (`smollm2-135m`, `minilm`), a folder, a `.gguf` file or a hub id.
        task: one of `TASKS`; an encoder-decoder's `causal-lm` and `instruct` are its sequence-to-sequence form.
        dtype: `auto` (bfloat16 where the device has it), `float32`, `bfloat16`, `float16`, or a torch dtype.
        device: `auto`, `cpu`, `cuda`, ...
        labels: names of the classes, for the two classification tasks.
        seed: decides the starting values of a new classification head.
        attn_implementation: transformers' choice when None.
        quantize: hold the linear weights in 4 bits, frozen; a folder that is in 4 bits is loaded so without asking.

    Returns:
        A transformers model in eval mode on the device.

    Raises:
        InputError: no such model, an architecture without this task, weights that are missing, another quantisation
            than NF4, and with `quantize` a weight with a NaN or an infinity.
        RunError: the hub cannot be reached.
    """
    import transformers

    place = pick_device(device)
    found = resolve(source)
    if task not in TASKS:
        raise unknown_name("task", task, TASKS)
    if quantize is not None and not isinstance(quantize, NF4):
        raise InputError(f"quantize is {quantize!r}: expected dw.NF4() or None")
    with _quiet_transformers():
        config = _load(transformers.AutoConfig, found.path_or_id, source)
        auto = _auto_class(task, config)
        extra: dict[str, Any] = {"dtype": pick_dtype(dtype, place)}
        if attn_implementation:
            extra["attn_implementation"] = attn_implementation
        head: dict[str, Any] = {}
        if task.endswith("classification"):
            if not labels:
                raise InputError(f"task {task} needs labels: give the names of the classes")
            head = {"num_labels": len(labels), "id2label": dict(enumerate(labels))}
            head["label2id"] = {label: i for i, label in enumerate(labels)}
        if quantize is not None or saved_quantization(config, source):
            model, info = _load_4bit(auto, found, source, head, quantize=quantize, device=place, **extra)
        else:
            strict = {"use_safetensors": True, "ignore_mismatched_sizes": False, "output_loading_info": True}
            model, info = _load(auto, found.path_or_id, source, **strict, **extra, **head)
    _fresh_head(model, sorted(info["missing_keys"]), seed, str(source))
    if model.config.pad_token_id is None and task == "sequence-classification":
        eos = model.config.eos_token_id
        model.config.pad_token_id = eos[0] if isinstance(eos, list) else eos
    return model.to(place).eval()


def _load_4bit(
    auto: Any, found: ModelSource, source: Any, head: dict[str, Any], *, quantize: NF4 | None, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """The model and transformers' account of keys; a hub id's files are fetched whole before any is read."""
    import transformers

    folder = Path(found.path_or_id if found.kind != "hub" else _fetch(found.path_or_id, source))
    config = _load(transformers.AutoConfig, str(folder), source, **head)
    saved_quantization(config, source)
    with _one_line(str(folder), source):
        model, info = load_quantized(auto, folder, config, quantize=quantize, **options)
    model.config.name_or_path = model.name_or_path = found.path_or_id
    return model, info


def _fetch(hub_id: str, source: Any) -> str:
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"]
    try:
        return str(snapshot_download(hub_id, allow_patterns=wanted))
    except (OSError, ValueError, RuntimeError) as error:
        raise explain_hub_error(str(source), error) from None


def _auto_class(task: str, config: Any) -> Any:
    import transformers

    if task in ("causal-lm", "instruct"):
        if config.is_encoder_decoder:
            return transformers.AutoModelForSeq2SeqLM
        if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or not _is_decoder(config):
            raise InputError(
                f"{config.model_type} is an encoder and has no {task}: use sequence-classification, "
                "token-classification or masked-lm"
            )
        return transformers.AutoModelForCausalLM
    return {
        "sequence-classification": transformers.AutoModelForSequenceClassification,
        "token-classification": transformers.AutoModelForTokenClassification,
        "masked-lm": transformers.AutoModelForMaskedLM,
    }[task]


def _is_decoder(config: Any) -> bool:
    """Whether the architecture generates: BERT-like ones have a causal class too, but are not used as such."""
    import transformers

    masked = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    return not masked or bool(getattr(config, "is_decoder", False))


@dataclass(frozen=True)
class ModelFacts:
    """What a model's configuration tells before its weights are read.

    Attributes:
        generative: a decoder or an encoder-decoder, as opposed to a BERT-like encoder.
        positions: how many positions it has; None where nothing limits them.
    """

    generative: bool
    positions: int | None


def model_facts(source: str | os.PathLike[str]) -> ModelFacts:
    """Reads a model's configuration only.

    Raises:
        InputError: no such model.
        RunError: the hub cannot be reached.
    """
    import transformers

    with _quiet_transformers():
        config = _load(transformers.AutoConfig, resolve(source).path_or_id, source)
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and _is_decoder(config)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return ModelFacts(bool(config.is_encoder_decoder) or causal, int(positions) if positions else None)


def _load(auto: Any, path_or_id: str, source: Any, **options: Any) -> Any:
    with _one_line(path_or_id, source):
        return auto.from_pretrained(path_or_id, trust_remote_code=False, **options)


@contextlib.contextmanager
def _one_line(path_or_id: str, source: Any) -> Iterator[None]:
    """Turns what transformers and safetensors raise while loading into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except DeltawError:
        raise
    except SafetensorError as error:
        raise InputError(f"{path_or_id} holds a damaged safetensors file ({_line(error)}): copy it again") from None
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        if not Path(path_or_id).exists() and isinstance(error, OSError):
            raise explain_hub_error(str(source), error) from None
        raise InputError(f"cannot load {str(source)!r}: {_line(error)}") from None


def _fresh_head(model: nn.Module, missing: list[str], seed: int, source: str) -> None:
    """Draws the parameters that the checkpoint lacks because the task brings them; any other lack is an error."""
    heads = tuple(f"{name}." for name in (*task_heads(model), "pooler", *_pooler(model)))
    tied = {key for key in missing if key not in dict(model.named_parameters())}
    lacking = [key for key in missing if not key.startswith(heads) and key not in tied]
    if lacking:
        raise InputError(
            f"{source} lacks {len(lacking)} tensors that {type(model).__name__} needs ({lacking[0]}, ...): "
            "it is incomplete, or a model for another task"
        )
    std = float(getattr(getattr(model, "config", None), "initializer_range", None) or 0.02)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key in missing and key not in tied:
                if parameter.dim() == 1:
                    parameter.zero_()
                else:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator(seed, "head", key)) * std)


def _pooler(model: nn.Module) -> list[str]:
    prefix = getattr(model, "base_model_prefix", "")
    return [f"{prefix}.pooler"] if prefix else []


def load_tokenizer(source: str | os.PathLike[str]) -> Any:
    """The model's tokenizer, with a padding token: its own, else the end-of-sequence token.

    Raises:
        InputError: the folder has none.
    """
    import transformers

    with _quiet_transformers():
        tokenizer = _load(transformers.AutoTokenizer, resolve(source).path_or_id, source)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise InputError(f"the tokenizer of {source} has neither a padding nor an end token: set one and save it")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_model(model: Any, path: str | os.PathLike[str], *, tokenizer: Any = None) -> Path:
    """Writes a whole model (merged, or fully fine-tuned) as a folder that plain transformers loads.

    4-bit weights are written in bitsandbytes' form, which transformers loads with bitsandbytes, and deltaw without.

    Args:
        model: a transformers model without unmerged adapters.
        path: the folder; written whole or not at all. Older weights in it go, what else stands there is left alone.
        tokenizer: written beside it when given.

    Raises:
        InputError: adapters are on the model and not merged, or a 4-bit weight that the form has no place for.
    """
    from safetensors import SafetensorError

    if any(True for _ in sites_of(model)):
        names = ", ".join(book_of(model).configs)
        raise InputError(
            f"the adapters {names} are not merged: call dw.merge(model) first, or dw.save_adapter for them"
        )
    if (Path(path) / "adapter_config.json").exists():
        raise InputError(f"{path} holds an adapter, which transformers would put on top: choose another folder")
    with saved_form(model) as form, atomic_folder(path, replaces=_WEIGHTS) as folder, _quiet_transformers():
        try:
            model.save_pretrained(folder, safe_serialization=True, **form)
        except SafetensorError as error:
            raise as_os_error(error) from error
        except RuntimeError as error:
            raise RunError(f"could not write the model to {path}: {_line(error)}") from None
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return Path(path)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silences transformers' progress bars and its report of keys, which is turned into errors here."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:300] + "..."
