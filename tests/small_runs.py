"""Tiny random models of several families, tokenizers for them, and rows that they can learn in seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from deltaw.core.generators import generator

GOOD, BAD, EITHER = ("aa", "bb"), ("xx", "yy"), ("cc", "dd", "ee")
PERSONS, PLACES = ("Ann", "Bob", "Cleo"), ("Rome", "Oslo", "Bern")


def byte_tokenizer() -> Any:
    """One token a byte, as GPT-2's without merges; no token is added around a text."""
    alphabet = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=256
    )


def word_tokenizer(*, encoder: bool) -> Any:
    """One token a word; around a text BERT's two tokens, or T5's end token."""
    words = [*GOOD, *BAD, *EITHER, *PERSONS, *PLACES, "met", "in", "went", "to", "good", "bad", "Text", "Label", ":"]
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*specials, *words])}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    around = ("[CLS] $A [SEP]", [("[CLS]", 2), ("[SEP]", 3)]) if encoder else ("$A [SEP]", [("[SEP]", 3)])
    made.post_processor = processors.TemplateProcessing(single=around[0], special_tokens=around[1])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    more = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"} if encoder else {"eos_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=64, **names, **more)


def make_model(
    folder: Path, family: str, *, layers: int = 2, dropout: float = 0.0, std: float = 0.02, tied: bool = False
) -> str:
    """Writes a random model and its tokenizer into `folder`; `std` is that of its weights."""
    tokenizer = byte_tokenizer() if family in ("llama", "gpt2") else word_tokenizer(encoder=family == "bert")
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    both: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": pad, "eos_token_id": end}
    usual = both | {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 64}
    usual |= {"max_position_embeddings": 256, "initializer_range": std, "tie_word_embeddings": tied}
    drops = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    bert_drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    llama = {"num_key_value_heads": 2, "bos_token_id": 1, "classifier_dropout": dropout}
    if family == "llama":
        kind, config = "LlamaForCausalLM", transformers.LlamaConfig(**usual, **llama)
    elif family == "gpt2":
        shape = {"n_embd": 32, "n_layer": layers, "n_head": 4, "n_positions": 256, "initializer_range": std}
        kind, config = "GPT2LMHeadModel", transformers.GPT2Config(**both, **shape, **drops, bos_token_id=1)
    elif family == "bert":
        kind, config = "BertForMaskedLM", transformers.BertConfig(**usual | bert_drops | {"tie_word_embeddings": True})
    else:
        shape = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": layers, "num_heads": 4, "dropout_rate": dropout}
        kind, config = "T5ForConditionalGeneration", transformers.T5Config(**both, **shape, decoder_start_token_id=pad)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        made: Any = getattr(transformers, kind)(config)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_rows(file: Path, rows: list[dict[str, Any]]) -> str:
    """Writes JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def labelled_texts(count: int, *, seed: int = 0, words: int = 4) -> list[tuple[str, str]]:
    """Texts with words of one side only, and which side; lengths vary."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        label = draw.choice(["good", "bad", "good"])
        side = GOOD if label == "good" else BAD
        chosen = [draw.choice((*side, *EITHER)) for _ in range(draw.randint(1, words))]
        made.append((" ".join([*chosen, draw.choice(side)]), label))
    return made


def rows_of(layout: str, count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of a layout that a model can learn."""
    texts = labelled_texts(count, seed=seed)
    if layout == "label":
        return [{"text": text, "label": label} for text, label in texts]
    if layout == "prompt":
        return [{"prompt": f"{text} ->", "completion": f" {label}"} for text, label in texts]
    if layout == "chat":
        return [
            {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": label}]}
            for text, label in texts
        ]
    if layout == "text":
        return [{"text": f"{text} {label} {label}"} for text, label in texts]
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        person, place = draw.choice(PERSONS), draw.choice(PLACES)
        other = draw.choice((*GOOD, *EITHER))
        tokens = [other, person, *draw.choice((["went", "to"], ["met", other, "in"])), place]
        tags = ["B-PER" if t in PERSONS else "B-LOC" if t in PLACES else "O" for t in tokens]
        if layout == "tags":
            found.append({"tokens": tokens, "tags": tags})
            continue
        for entity, kind in ((person, "PER"), (place, "LOC")):
            asked = f"What is the entity type of '{entity}'?\nInput: {' '.join(tokens)}\nAnswer: "
            found.append({"prompt": asked, "completion": kind})
    return found


def adapter_bytes(run: Path) -> bytes:
    """The trained tensors' file."""
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def logged(run: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` without their times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "elapsed_s"} for line in lines]


def record(run: Path) -> dict[str, Any]:
    """What `run.json` says."""
    found: dict[str, Any] = json.loads((run / "run.json").read_text())
    return found


def outcome(run: Path) -> tuple[bytes, list[dict[str, Any]], dict[str, Any], str]:
    """All that a run must give again, bit for bit."""
    done = record(run)
    assert done["status"] == "done", done.get("error")
    weights = run / "adapter" / "adapter_model.safetensors"
    if not weights.exists():
        weights = run / "model" / "model.safetensors"
    counts = {key: done["cost"][key] for key in ("steps", "tokens")}
    examples = run / "examples.jsonl"
    return (
        weights.read_bytes(),
        logged(run),
        done["metrics"] | counts,
        examples.read_text() if examples.exists() else "",
    )


def noise(shape: tuple[int, ...], *names: str | int) -> torch.Tensor:
    """Normal numbers that depend on their names alone."""
    return torch.randn(shape, generator=generator(0, *names))
