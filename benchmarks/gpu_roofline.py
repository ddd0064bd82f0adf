"""What one step of LoRA has to compute and to move, part by part, for a decoder of given sizes.

`python benchmarks/gpu_train.py --roofline` prints it; docs/performance.md shows it beside what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

RANK = 16


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes."""

    family: str
    vocab: int
    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    rope_theta: float = 500000.0

    @property
    def groups(self) -> list[tuple[int, int, int]]:
        """Projections that share an input: (width of the input, width of all outputs, how many)."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [
            (self.width, q + 2 * kv, 3), (q, self.width, 1), (self.width, 2 * self.inner, 2),
            (self.inner, self.width, 1),
        ]  # fmt: skip

    @property
    def layer_parameters(self) -> int:
        """Of the projections of one layer."""
        return sum(inputs * outputs for inputs, outputs, _ in self.groups)

    @property
    def adapter_parameters(self) -> int:
        """Of LoRA's factors on all layers."""
        return self.layers * RANK * sum(inputs * count + outputs for inputs, outputs, count in self.groups)

    def config(self, positions: int):
        """What transformers makes a model of."""
        import transformers

        return transformers.AutoConfig.for_model(
            self.family,
            vocab_size=self.vocab,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            rope_theta=self.rope_theta,
            max_position_embeddings=max(8192, positions),
            tie_word_embeddings=False,
            use_cache=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )


SHAPES = {
    "llama-8b": Shape("llama", 128256, 4096, 14336, 32, 32, 8),
    "llama-70b": Shape("llama", 128256, 8192, 28672, 80, 64, 8),
    "qwen3-8b": Shape("qwen3", 151936, 4096, 12288, 36, 32, 8, rope_theta=1e6),
    "tiny": Shape("llama", 512, 64, 128, 2, 4, 2, head_dim=16),
}

#: What a layer keeps for the backward pass (`deltaw.fuse.keep.KEEPS`); what it does not keep is computed again.
KEEPS = {
    "all": "everything that the backward pass reads",
    "attention": "no more than attention's tensors; the MLP again",
    "input": "its input; everything again",
}
#: Bytes a number: bfloat16, and 4 bits with scales in 8.
WIDE, NARROW = 2, 4.127 / 8


@dataclass(frozen=True)
class Part:
    """One part of a step."""

    name: str
    flops: float
    moved_bytes: float

    def seconds(self, tflops: float, tbps: float) -> float:
        """The least it can take, arithmetic and transfer side by side."""
        return max(self.flops / tflops, self.moved_bytes / tbps) / 1e12


def step_parts(shape: Shape, batch: int, length: int, *, keep: str, base: str) -> list[Part]:
    """FLOPs and bytes of one optimizer step of LoRA, each tensor read or written once by each kernel that needs it.

    Low-rank products with B forward and with A back are part of the frozen GEMMs, those of the MLP's gradients part of
    SwiGLU's pass. Attention counts the causal half, seven products of forward and backward pass together. The layer's
    last projection is never computed again.
    """
    tokens, layers, weights = batch * length, shape.layers, shape.layer_parameters
    again = {"all": [], "attention": shape.groups[2:3], "input": shape.groups[:3]}[keep]
    q, kv, d, inner = shape.groups[1][0], shape.kv_heads * shape.head_dim, shape.width, shape.inner

    def gemms(groups: list[tuple[int, int, int]]) -> tuple[float, float]:
        moved = sum(i * o + tokens * (i + o) for i, o, _ in groups)
        return 2 * tokens * layers * sum(i * o for i, o, _ in groups), WIDE * layers * moved

    forward, moved = gemms(shape.groups)
    parts = [Part("frozen GEMMs, forward", forward, moved), Part("frozen GEMMs, input gradient", forward, moved)]
    if again:
        parts.append(Part("frozen GEMMs, again", *gemms(again)))
    if base == "nf4":
        uses = 2 * weights + sum(i * o for i, o, _ in again)
        parts.append(Part("dequantise", 0, layers * uses * (NARROW + WIDE)))
    product = 2 * batch * length**2 * q / 2
    attended = WIDE * tokens * (2 * q + 2 * kv)
    parts.append(
        Part(
            "attention",
            layers * product * (9 if keep == "input" else 7),
            layers * attended * (4 if keep == "input" else 3),
        )
    )
    flops = 2 * tokens * layers * RANK * sum(i * n + o for i, o, n in shape.groups)
    qkv, out, gate_up, down = shape.groups
    # x once for h; back, g once for k and dB, and x once for dA, but for what SwiGLU's pass has at hand.
    columns = sum(i for i, _, _ in shape.groups) + sum(i + o for i, o, _ in (qkv, out)) + gate_up[0] + down[1]
    parts.append(Part("low-rank", 3 * flops, WIDE * layers * tokens * columns))
    # Forward: norm (2), sum and norm (4), sum (3). Backward: twice (gradient, input, residual's gradient, result).
    # Again: both norms, and the sum before the second.
    norms = 17 + (6 if keep == "input" else 0)
    parts.append(Part("norms and residuals", 0, WIDE * layers * tokens * d * norms))
    parts.append(Part("rotary", 0, WIDE * layers * tokens * (q + kv) * 2 * (3 if keep == "input" else 2)))
    parts.append(Part("SwiGLU", 0, WIDE * layers * tokens * inner * 8))
    logits = tokens * shape.vocab
    parts.append(Part("head's GEMMs", 4 * logits * d, WIDE * 2 * (logits + tokens * d + shape.vocab * d)))
    # One pass for maximum and sum, one that reads logits and writes their gradient.
    parts.append(Part("cross-entropy", 0, WIDE * 3 * logits))
    # Norm, clipping, and AdamW's four reads and three writes, in float32.
    parts.append(Part("clipping and AdamW", 0, 4 * 10 * shape.adapter_parameters))
    return parts


def kept_bytes(shape: Shape, tokens: int, keep: str) -> float:
    """What the layers keep for the backward pass."""
    q, kv, d, inner = shape.groups[1][0], shape.kv_heads * shape.head_dim, shape.width, shape.inner
    numbers = {"input": d, "attention": 2 * d + 2 * q + 2 * kv}
    if shape.family == "qwen3":
        # Queries and keys before their norms too.
        numbers["attention"] += q + kv
    numbers["all"] = numbers["attention"] + 2 * inner
    return WIDE * shape.layers * tokens * numbers[keep]


def weight_bytes(shape: Shape, base: str) -> float:
    """Of the frozen model; embedding and head stay in bfloat16."""
    packed = NARROW if base == "nf4" else WIDE
    return shape.layers * (shape.layer_parameters * packed + 2 * shape.width * WIDE) + WIDE * (
        2 * shape.vocab * shape.width + shape.width
    )


def useful_flops(shape: Shape, batch: int, length: int) -> float:
    """Of a step that computes nothing again."""
    return sum(part.flops for part in step_parts(shape, batch, length, keep="all", base="bfloat16"))


def roofline(name: str, batch: int, length: int, *, keep: str, base: str, tflops: float, tbps: float) -> str:
    """The parts of one step of a shape, and the bound under every policy, as Markdown."""
    shape, tokens = SHAPES[name], batch * length
    lines = [
        f"{name}, {batch} x {length} tokens, r {RANK}, at {tflops:g} TFLOP/s and {tbps:g} TB/s; "
        f"{base}, keeping {keep}:\n",
        "| part | TFLOP | GB moved | ms of arithmetic | ms of transfer | at least ms | share |",
        "|---|---|---|---|---|---|---|",
    ]
    parts = step_parts(shape, batch, length, keep=keep, base=base)
    total = sum(part.seconds(tflops, tbps) for part in parts)
    for part in parts:
        least = part.seconds(tflops, tbps)
        lines.append(
            f"| {part.name} | {part.flops / 1e12:.1f} | {part.moved_bytes / 1e9:.1f} "
            f"| {part.flops / tflops / 1e9:.1f} | {part.moved_bytes / tbps / 1e9:.1f} "
            f"| {least * 1e3:.1f} | {least / total:.1%} |"
        )
    lines.append(f"| all | {sum(p.flops for p in parts) / 1e12:.1f} | {sum(p.moved_bytes for p in parts) / 1e9:.1f} "
                 f"| | | {total * 1e3:.1f} | |")  # fmt: skip
    lines += [
        "",
        "| base | kept by a layer | weights GB | kept GB | at least ms | at most tokens/s |",
        "|---" * 6 + "|",
    ]
    for weights in ("bfloat16", "nf4"):
        for policy, meaning in KEEPS.items():
            parts = step_parts(shape, batch, length, keep=policy, base=weights)
            total = sum(part.seconds(tflops, tbps) for part in parts)
            sizes = f"{weight_bytes(shape, weights) / 1e9:.1f} | {kept_bytes(shape, tokens, policy) / 1e9:.1f}"
            lines.append(f"| {weights} | `{policy}`: {meaning} | {sizes} | {total * 1e3:.1f} | {tokens / total:,.0f} |")
    return "\n".join(lines)


def sharded_bytes(shape: Shape, base: str, gpus: int) -> dict[str, float]:
    """What a GPU holds under FSDP2 while steps run, beside what layers keep; its most before that is the whole model.

    Embedding, head and last norm stay gathered from the first use to the end of a step. Of the layers the one that
    runs is, the one before it still is, and the next one is on its way.
    """
    packed = NARROW if base == "nf4" else WIDE
    layer = shape.layer_parameters * packed + 2 * shape.width * WIDE
    # Values, gradient and AdamW's two states, in float32.
    trained = 4 * 4 * shape.adapter_parameters
    return {
        "its part of the base": weight_bytes(shape, base) / gpus,
        "its part of adapter, gradients and AdamW": trained / gpus,
        "embedding and head, gathered": weight_bytes(shape, base) - shape.layers * layer,
        "layers, gathered": 3 * (layer + 4 * shape.adapter_parameters / shape.layers),
    }


def sharded_table(name: str, gpus: int) -> str:
    """The memory of a shape under FSDP2, as Markdown."""
    shape = SHAPES[name]
    found = {base: sharded_bytes(shape, base, gpus) for base in ("bfloat16", "nf4")}
    columns = [*found["nf4"], "all"]
    lines = [f"{name} under FSDP2 on {gpus} GPUs, GB of each, beside what layers keep:\n"]
    lines += [f"| base | the whole base, at first | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for base, parts in found.items():
        sizes = [weight_bytes(shape, base), *parts.values(), sum(parts.values())]
        lines.append(f"| {base} | {' | '.join(f'{size / 1e9:.1f}' for size in sizes)} |")
    return "\n".join(lines)
