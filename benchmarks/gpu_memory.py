"""What fine-tuning LLaMA-shaped models takes on one GPU: 7B, 13B, 33B and 65B in 4 bits, beside published figures.

    python benchmarks/gpu_memory.py [--sizes 7B 13B 33B 65B] [--lora 7B 13B] [--tokens 512] [--json FILE]

Weights are random, made and quantised matrix by matrix, so that no model is ever there in 16 bits. Then come two real
optimizer steps: batch 1, r 16 on q, k, v, o, activations recomputed, AdamW. Every size runs in a process of its own.
`--lora` does the same with 16-bit weights, for the sizes that fit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

VOCAB = 32000
#: Width, layers, heads, width of the MLP.
SHAPES = {
    "7B": (4096, 32, 32, 11008),
    "13B": (5120, 40, 40, 13824),
    "33B": (6656, 60, 52, 17920),
    "65B": (8192, 80, 64, 22016),
}
#: GB that are published for these sizes, as QLoRA and as LoRA.
PUBLISHED = {"7B": (5, 9), "13B": (10, 16), "33B": (21, 40), "65B": (41, 80)}


def parameters(size: str) -> tuple[int, int]:
    """(of the linears that are quantised, of everything else)."""
    width, layers, _, inner = SHAPES[size]
    return layers * (4 * width**2 + 3 * width * inner), 2 * VOCAB * width + (2 * layers + 1) * width


def build(size: str, four_bits: bool, draw):
    """The model on the GPU with random weights, matrix by matrix."""
    import torch
    import transformers

    from deltaw.quant import NF4, quantizable
    from deltaw.quant.model import quantized_parameter

    width, layers, heads, inner = SHAPES[size]
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        use_cache=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    packed = set(quantizable(model, NF4())) if four_bits else set()
    for path, module in model.named_modules():
        for name, old in list(module._parameters.items()):
            if old is None:
                continue
            values = torch.ones(old.shape, dtype=torch.bfloat16, device="cuda")
            if old.dim() > 1:
                values.normal_(std=0.02, generator=draw)
            if path in packed:
                made = quantized_parameter(values, False, NF4(), f"{path}.{name}")
            else:
                made = torch.nn.Parameter(values, requires_grad=False)
            module._parameters[name] = made
    # Its frequencies are computed when it is made, which a model without memory cannot.
    with torch.device("cuda"):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def cell(size: str, four_bits: bool, tokens: int, steps: int) -> dict:
    """One model, trained for some steps."""
    import torch

    import deltaw as dw
    from deltaw.core.protocols import stored_bytes
    from deltaw.fuse.head import install_loss_head

    began = time.perf_counter()
    draw = torch.Generator("cuda").manual_seed(0)
    model = build(size, four_bits, draw)
    weights = sum(stored_bytes(parameter) for parameter in model.parameters())
    loaded = torch.cuda.max_memory_allocated()
    dw.adapt(model, dw.LoRA(r=16, alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    objection = install_loss_head(model)
    assert objection is None, objection
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for _ in range(steps):
        ids = torch.randint(0, VOCAB, (1, tokens), device="cuda", generator=draw)
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss))
    return {
        "size": size,
        "method": "qlora" if four_bits else "lora",
        "weights_bytes": weights,
        "while_loading_bytes": loaded,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "step_s": min(seconds),
        "losses": losses,
        "gpu": torch.cuda.get_device_name(),
        "total_s": time.perf_counter() - began,
    }


def table(cells: list[dict]) -> str:
    """Measured figures beside the published ones, in GB (1e9 bytes)."""
    lines = [
        "| model | weights | while loading | peak of a step | reserved | published | s a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for c in cells:
        published = PUBLISHED[c["size"]][c["method"] == "lora"]
        figures = (c[k] / 1e9 for k in ("weights_bytes", "while_loading_bytes", "peak_bytes", "reserved_bytes"))
        shown = " | ".join(f"{figure:.2f}" for figure in figures)
        lines.append(f"| {c['size']} {c['method']} | {shown} | {published} | {c['step_s']:.2f} |")
    lines += ["", "16-bit weights alone, by arithmetic, beside what is published for LoRA with them:", ""]
    for size, (_, lora) in PUBLISHED.items():
        need = 2 * sum(parameters(size)) / 1e9
        verdict = "cannot be: the weights alone are larger" if need > lora else "leaves nothing for a step"
        if need < 0.9 * lora:
            verdict = "possible"
        lines.append(f"- {size}: {need:.1f} GB; published {lora} GB, {verdict}")
    return "\n".join(lines)


def main() -> None:
    """Every size in turn, each in its own process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--lora", nargs="*", default=[], choices=list(SHAPES), help="sizes to run in 16 bits too")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--json")
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        print("RESULT " + json.dumps(cell(args.cell[0], args.cell[1] == "qlora", args.tokens, args.steps)), flush=True)
        return
    import torch

    if not torch.cuda.is_available():
        sys.exit("this benchmark measures a GPU's memory: torch sees no CUDA device")
    cells = []
    for size, method in [*((s, "qlora") for s in args.sizes), *((s, "lora") for s in args.lora)]:
        done = subprocess.run([sys.executable, *sys.argv, "--cell", size, method], stdout=subprocess.PIPE, text=True)
        found = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if done.returncode or not found:
            print(f"{size} {method} failed with exit code {done.returncode}", file=sys.stderr, flush=True)
            continue
        cells.append(json.loads(found[0]))
        print(f"{size} {method}: {cells[-1]}", file=sys.stderr, flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(cells, indent=1))
    print(table(cells))


if __name__ == "__main__":
    main()
