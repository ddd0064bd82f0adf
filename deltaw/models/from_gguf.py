"""GGUF files turned into plain safetensors folders, weights dequantised to float32 exactly.

A dense Llama is read with the `gguf` package and written shard by shard, which takes a third of the time that
transformers' loader takes and never holds the whole model. llama.cpp stores the rows of each query and key head
interleaved for its rotary kernel, (half, 2), where transformers wants (2, half): they are put back. Every other
architecture goes through transformers' own loader.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from deltaw.core.errors import InputError, RunError
from deltaw.models.packages import Progress

CONVERTER = 1
"""Raised whenever the same file would convert to something else; cached folders of another version are made again."""

_SHARD_BYTES = 4 << 30
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Vocabularies whose merges were learnt on single digits, in llama.cpp's names.
_SINGLE_DIGITS = ("smollm", "starcoder", "refact")
_GPT2_SPLIT = ("gpt-2", "default")


def convert_gguf(
    path: str | os.PathLike[str], folder: str | os.PathLike[str], *, progress: Progress | None = None
) -> None:
    """Writes the model, configuration, generation configuration and tokenizer of a GGUF file into `folder`.

    Args:
        path: the .gguf file.
        folder: an existing folder, empty.
        progress: told of the bytes of float32 weights written; not called where transformers converts.

    Raises:
        InputError: not a GGUF file, a damaged one, one part of several, or one whose conversion would lose something.
        RunError: the folder cannot be written.
    """
    source, target = Path(path), Path(folder)
    reader = _read(source)
    architecture = _value(reader, "general.architecture")
    _refuse_losses(source, reader, architecture)
    layout = llama_layout(reader)
    _write_tokenizer(source, target, reader)
    if layout is None:
        del reader
        _through_transformers(source, target)
        return
    _write_llama_config(target, reader)
    try:
        total = sum(4 * int(tensor.n_elements) for tensor in reader.tensors)
        _write_shards(target, _llama_tensors(reader, layout), total, progress)
    except Exception as error:  # safetensors wraps the operating system's errors in its own
        raise RunError(f"cannot write the weights of {source} to {target}: {error}") from error


def llama_layout(reader: Any) -> dict[str, str] | None:
    """GGUF tensor names to transformers' for a plain dense Llama; None for anything else."""
    needed = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
    if _value(reader, "general.architecture") != "llama":
        return None
    if not all(isinstance(_value(reader, f"llama.{key}"), int) for key in needed) or _value(
        reader, "llama.expert_count"
    ):
        return None
    if not isinstance(_value(reader, "llama.attention.head_count_kv", 1), int):
        return None
    layout: dict[str, str] = {}
    for tensor in reader.tensors:
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        if block and block[2] in _INSIDE:
            layout[tensor.name] = f"model.layers.{block[1]}.{_INSIDE[block[2]]}.weight"
        elif tensor.name.removesuffix(".weight") in _OUTSIDE:
            layout[tensor.name] = _OUTSIDE[tensor.name.removesuffix(".weight")] + ".weight"
        else:
            return None
    blocks = _value(reader, "llama.block_count")
    expected = len(_INSIDE) * blocks + len(_OUTSIDE) - ("output.weight" not in layout)
    return layout if len(layout) == expected else None


def _read(path: Path) -> Any:
    import gguf

    try:
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")
        reader = gguf.GGUFReader(path)
        if not _value(reader, "general.architecture"):
            raise InputError(f"{path} names no architecture: expected a language model's GGUF file")
        if (parts := _value(reader, "split.count", 0)) > 1:
            raise InputError(f"{path} is one of {parts} parts: join them with llama.cpp's `llama-gguf-split --merge`")
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except InputError:
        raise
    except Exception as error:  # the reader raises what numpy raises on a file that ends early
        raise InputError(f"{path} is damaged or not complete: {error}; fetch it again") from error
    return reader


def _value(reader: Any, key: str, default: Any = None) -> Any:
    field = reader.fields.get(key)
    return default if field is None else field.contents()


def _refuse_losses(path: Path, reader: Any, architecture: str) -> None:
    """Rotary scaling sits in metadata and tensors that transformers' loader passes over, except for gpt-oss."""
    scaling = _value(reader, f"{architecture}.rope.scaling.type", "none")
    factors = [t.name for t in reader.tensors if t.name.startswith(("rope_freqs", "rope_factors"))]
    if architecture != "gpt-oss" and (scaling != "none" or factors):
        what = f"scaling {scaling!r}" if scaling != "none" else f"factors ({factors[0]})"
        raise InputError(
            f"{path} has rotary {what}, which a conversion would lose: give the model's safetensors folder instead"
        )


def _llama_tensors(reader: Any, layout: dict[str, str]) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """(name, float32 array) of each tensor, in transformers' layout."""
    import gguf

    heads = _value(reader, "llama.attention.head_count")
    split = {"attn_q": heads, "attn_k": _value(reader, "llama.attention.head_count_kv", heads)}
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        count = split.get(tensor.name.split(".")[-2])
        if count:
            rows, columns = weight.shape
            weight = weight.reshape(count, rows // count // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
        yield layout[tensor.name], np.require(weight, np.float32, ["C", "W"])


def _write_shards(
    folder: Path, tensors: Iterator[tuple[str, np.ndarray[Any, Any]]], total: int, progress: Progress | None
) -> None:
    import torch
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    done = held_bytes = 0

    def flush() -> None:
        nonlocal held_bytes
        if held:
            save_file(held, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
            shards.append(list(held))
            held.clear()
            held_bytes = 0

    for name, array in tensors:
        if held_bytes + array.nbytes > _SHARD_BYTES:
            flush()
        held[name] = torch.from_numpy(array)
        held_bytes += array.nbytes
        done += array.nbytes
        if progress is not None:
            progress("converting to float32", done, total)
    flush()
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": done}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for i, name in enumerate(names):
        os.rename(folder / f"shard-{i}", folder / name)


def _write_llama_config(folder: Path, reader: Any) -> None:
    from transformers import GenerationConfig, LlamaConfig

    def of(key: str, default: Any = None) -> Any:
        return _value(reader, f"llama.{key}", default)

    heads = of("attention.head_count")
    # GGUF stores float32: the shortest decimal that reads back to the same float32 is what the author wrote.
    eps, theta = (
        float(str(np.float32(of(key, default))))
        for key, default in (("attention.layer_norm_rms_epsilon", 1e-6), ("rope.freq_base", 10000.0))
    )
    ids = {
        name: _value(reader, f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding"))
    }
    shapes = {tensor.name: tensor.shape for tensor in reader.tensors}
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=int(shapes["token_embd.weight"][1]),
        hidden_size=of("embedding_length"),
        intermediate_size=of("feed_forward_length"),
        num_hidden_layers=of("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=of("attention.head_count_kv", heads),
        head_dim=int(shapes["blk.0.attn_q.weight"][1]) // heads,
        max_position_embeddings=of("context_length"),
        rms_norm_eps=eps,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings="output.weight" not in shapes,
        **ids,
    ).save_pretrained(folder)
    GenerationConfig(**ids).save_pretrained(folder)


def _write_tokenizer(path: Path, folder: Path, reader: Any) -> None:
    """Saves the tokenizer, with the pieces that transformers' conversion leaves out: digits and the length limit."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
    except Exception as error:
        raise InputError(f"{path}: transformers cannot rebuild its tokenizer ({error}); give a model folder") from error
    backend = tokenizer.backend_tokenizer
    rule = _value(reader, "tokenizer.ggml.pre", "default")
    if _value(reader, "tokenizer.ggml.model") == "gpt2":
        if rule in _SINGLE_DIGITS:
            digits = pre_tokenizers.Digits(individual_digits=True)
            backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        elif rule not in _GPT2_SPLIT and json.loads(backend.to_str())["pre_tokenizer"]["type"] == "ByteLevel":
            raise InputError(
                f"{path} splits text by the rule {rule!r}, which transformers does not rebuild from GGUF: "
                "give the model's safetensors folder instead"
            )
    context = _value(reader, f"{_value(reader, 'general.architecture')}.context_length")
    if context:
        tokenizer.model_max_length = context
    for key in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.save_pretrained(folder)


def _through_transformers(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(path.parent),
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            local_files_only=True,
        )
    except Exception as error:
        raise InputError(f"{path}: transformers cannot load it ({error}); give a model folder instead") from error
    try:
        model.save_pretrained(folder)
    except Exception as error:
        raise RunError(f"cannot write the weights of {path} to {folder}: {error}") from error
