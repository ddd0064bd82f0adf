"""A tiny model and rows for it, and the command in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from deltaw.core.generators import generator

WORDS = ["sunny", "warm", "bright", "calm"], ["rainy", "cold", "dark", "wild"]


#: All are shown but for names that the typer of Flower's choice reads and click is about to drop.
WARNINGS = "default,ignore:'click.utils:DeprecationWarning"


def tiny_model(folder: Path, *, seed: int = 0, hidden: int = 32, positions: int = 128, kind: str = "Llama") -> Path:
    """A random model of two layers over bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate(["<|end|>", "<|mask|>", *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|end|>", pad_token="<|end|>", mask_token="<|mask|>"
    )
    common = {"vocab_size": len(vocabulary), "hidden_size": hidden, "intermediate_size": 48, "num_hidden_layers": 2}
    common |= {"num_attention_heads": 4, "max_position_embeddings": positions, "pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(**common, bos_token_id=0, eos_token_id=0)
    suffix = "ForMaskedLM" if kind == "Bert" else "ForCausalLM"
    model = getattr(transformers, kind + suffix)(config)
    random = generator(seed, "tiny")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int = 24) -> Path:
    """Labelled sentences: the weather's words tell the label."""
    rows = []
    for index in range(count):
        words = WORDS[index % 2]
        rows.append(
            {
                "text": f"day {index} was {words[index % 4]} and {words[(index // 4) % 4]}",
                "label": ["good", "bad"][index % 2],
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclass
class Result:
    code: int
    out: str
    err: str

    def line(self) -> str:
        """The one line of an error."""
        lines = self.err.splitlines()
        own = [line for line in lines if line.startswith("deltaw: ")]
        assert len(own) == 1 and lines[-1] == own[0], self.err
        assert "Traceback" not in self.err
        return own[0]

    def error(self, code: int) -> str:
        """The whole of stderr, which is one line, after a wrong input."""
        assert self.code == code, (self.code, self.err)
        assert self.err.count("\n") == 1, self.err
        return self.line()


def digest(folder: Path) -> dict[str, str]:
    """Every file below a folder and its hash."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


QUICK = ["--max-steps", "2", "--batch-size", "4", "--micro-batch-size", "4", "--r", "2", "--device", "cpu"]
QUICK += ["--dtype", "float32"]


def process(*words: object, cwd: Path | None = None, **options: object) -> subprocess.Popen[str]:
    """The real command in a process of its own."""
    code = "from deltaw.cli.main import run; run()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": WARNINGS}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )
