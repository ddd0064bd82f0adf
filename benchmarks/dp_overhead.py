"""What a differentially private step costs over a plain one: deltaw's, and Opacus' hooks on PEFT's LoRA beside it.

    python benchmarks/dp_overhead.py [--model smollm2-135m] [--rounds 9]
    python benchmarks/dp_overhead.py --gpu [--checkpointing on off] [--out FILE]

A private step is all of it: units drawn, gradients clipped by example, noise, the optimizer. The rows of a step are the
same number in both, where Poisson sampling would vary it; the draw itself is made and timed.

On a CPU as `cpu_train.py`: one process a system, a step in turn, medians of the rounds' own ratios. With `--gpu` a
model of Llama-3.1-8B's shape with random weights, 4 x 2048 tokens, systems one after another, each in a process of its
own; one that fails (no memory, a package that is not there) is a line of the table. `--gpu --shape tiny --device cpu`
tries all of that without a GPU.

Opacus' hooks see every forward pass that keeps a graph, so that with recomputation they go with the reentrant kind only
(whose first pass keeps none); deltaw and PEFT alone have the other kind. Opacus draws its noise from torch's generator,
deltaw from ChaCha20.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time

import cpu_train

RANK = 16
#: Units that a private step draws from.
UNITS = 10_000
#: A private system and the plain one it is measured against.
PAIRS = {
    "deltaw-lora-dp": "deltaw-lora",
    "deltaw-dora-dp": "deltaw-dora",
    "deltaw-qlora-dp": "deltaw-qlora",
    "peft-lora-opacus": "peft-lora",
}
DEFAULTS = {
    "cpu": ["deltaw-lora-dp", "deltaw-dora-dp", "peft-lora-opacus"],
    "gpu": ["deltaw-lora-dp", "deltaw-qlora-dp", "peft-lora-opacus"],
}
#: Vocabulary, width, MLP's width, layers, heads, heads of keys and values.
SHAPES = {"llama-8b": (128256, 4096, 14336, 32, 32, 8), "tiny": (512, 64, 128, 2, 4, 2)}


def random_model(args: argparse.Namespace):
    """A Llama with random weights, made on the device."""
    import torch
    import transformers

    vocab, width, inner, layers, heads, kv_heads = SHAPES[args.shape]
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        tie_word_embeddings=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, args.dtype))
    try:
        with torch.device(args.device):
            return transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def base_model(args: argparse.Namespace, four_bits: bool):
    import deltaw as dw
    from deltaw.quant import quantize_model

    quantize = dw.NF4() if four_bits else None
    if not args.gpu:
        return dw.load_model(args.model, dtype=args.dtype, device="cpu", quantize=quantize)
    model = random_model(args)
    return quantize_model(model, quantize) if quantize is not None else model


class Plain:
    """Forward, backward, optimizer."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        import torch

        self.name, self.args = name, args
        model = base_model(args, name.startswith("deltaw-q"))
        model.config.use_cache = False
        if args.recompute:
            self.recompute(model)
        self.model = self.adapted(model).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=args.device == "cuda")

    def recompute(self, model) -> None:
        """Turns recomputation of activations on."""
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": "opacus" in self.name})

    def adapted(self, model):
        """The model with its adapter."""
        if self.name.startswith("peft"):
            from peft import LoraConfig, get_peft_model

            model.enable_input_require_grads()
            return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
        import deltaw as dw
        from deltaw.fuse.head import install_loss_head

        kind = dw.DoRA if "dora" in self.name else dw.LoRA
        dw.adapt(model, kind(r=RANK, alpha=2 * RANK, target_modules="all-linear"))
        objection = install_loss_head(model)
        assert objection is None, objection
        return model

    def loss(self, inputs):
        """The mean over all labels."""
        import torch

        # PEFT's factors are float32: on a GPU it is trained under autocast, as Trainer does.
        autocast = self.args.device == "cuda" and self.name.startswith("peft")
        with torch.autocast(self.args.device, torch.bfloat16, enabled=autocast):
            return self.model(**inputs).loss

    def gradients(self, inputs) -> None:
        """Puts the step's into `.grad`, or where its optimizer finds them."""
        self.loss(inputs).backward()

    def step(self, inputs) -> None:
        """A whole step."""
        # Backward passes run outside of the fast attention's mode, so that what they recompute would be another's.
        fast = self.args.device == "cpu" and not self.args.recompute
        with cpu_train.training_context(self.name if fast else ""):
            self.gradients(inputs)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Private(Plain):
    """The same with deltaw's private gradients."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        super().__init__(name, args)
        from deltaw.train.losses import SummedLoss
        from deltaw.train.private import PrivacyPlan, PrivateGradients

        rate = args.batch / UNITS
        plan = PrivacyPlan(1.0, 1.0, rate, 1000, 1e-6, "example", [[row] for row in range(UNITS)])
        self.private = PrivateGradients(self.model, "default", plan, SummedLoss(self.model, "causal-lm"))

    def gradients(self, inputs) -> None:
        """Of a drawn step, clipped and noised."""
        from deltaw.train.private import micro_batches

        plan = self.private.plan
        self.private.noise.bernoulli(UNITS, plan.sampling_rate).nonzero().flatten().tolist()
        rows = plan.units[: self.args.batch]
        (micro,) = micro_batches(rows, [self.args.length] * UNITS, micro_batch_size=self.args.batch)
        self.private([(micro, inputs)])


class Opacus(Plain):
    """PEFT's LoRA under Opacus' hooks."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        super().__init__(name, args)
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer

        # Held, as it takes its hooks away when it goes.
        self.hooked = GradSampleModule(self.model, strict=False, loss_reduction="mean")
        self.optimizer = DPOptimizer(
            self.optimizer, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=args.batch
        )

    def gradients(self, inputs) -> None:
        """By example, for the optimizer to clip."""
        import torch

        torch.rand(UNITS).lt(self.args.batch / UNITS).nonzero().flatten().tolist()
        self.loss(inputs).backward()


def system(name: str, args: argparse.Namespace) -> Plain:
    """One system, built."""
    kinds = {"dp": Private, "opacus": Opacus}
    return kinds.get(name.rpartition("-")[2], Plain)(name, args)


class Device:
    """Its clock and memory."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.cuda = args.device == "cuda"

    def now(self) -> float:
        """Seconds, once everything asked for is done."""
        import torch

        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak_mib(self) -> float:
        """The most memory in use so far."""
        import torch

        if self.cuda:
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def worker(args: argparse.Namespace) -> None:
    """Takes one step for each line on standard input and answers with its seconds, or with why it cannot."""
    import torch

    torch.set_num_threads(args.threads)
    args.recompute = args.gpu and args.checkpointing == ["on"]
    device, built, failure = Device(args), None, None
    draw = torch.Generator(args.device).manual_seed(0)
    for line in sys.stdin:
        answer = {"error": failure}
        try:
            if built is None and failure is None:
                built = system(args.worker, args)
                if device.cuda:
                    # What building took is not the step's.
                    torch.cuda.reset_peak_memory_stats()
            if failure is None:
                if line.startswith("profile"):
                    profile(built, args, draw)
                    answer = {}
                else:
                    answer = timed(built, args, draw, device)
        except Exception as error:
            failure = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            answer, built = {"error": failure}, None
        print("ANSWER " + json.dumps(answer), flush=True)


def batch(args: argparse.Namespace, vocab: int, draw) -> dict:
    import torch

    ids = torch.randint(4, vocab, (args.batch, args.length), generator=draw, device=args.device)
    # On a GPU a mask would take attention off its fast path.
    masked = {"attention_mask": torch.ones_like(ids)} if args.device == "cpu" else {}
    return {"input_ids": ids, "labels": ids.clone(), **masked}


def timed(built: Plain, args: argparse.Namespace, draw, device: Device) -> dict:
    inputs = batch(args, built.model.config.vocab_size, draw)
    begun, busy = device.now(), time.process_time()
    built.step(inputs)
    seconds, busy = device.now() - begun, time.process_time() - busy
    return {"s": seconds, "busy_s": busy, "peak_mib": device.peak_mib()}


def profile(built: Plain, args: argparse.Namespace, draw) -> None:
    """Where a step goes, by operation, on standard error."""
    import torch

    built.step(batch(args, built.model.config.vocab_size, draw))
    activities = [torch.profiler.ProfilerActivity.CPU]
    if args.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found:
        built.step(batch(args, built.model.config.vocab_size, draw))
    order = "self_device_time_total" if args.device == "cuda" else "self_cpu_time_total"
    table = found.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=40)
    print(f"{built.name}\n{table}", file=sys.stderr, flush=True)


def rounds_of(names: list[str], args: argparse.Namespace) -> dict[str, list[dict]]:
    """Each system's answers, round by round; a process that dies gives one that says so."""
    if not args.gpu:
        rounds = cpu_train.rounds_of(names, "all", args.dtype, args)
        return {name: [taken[name] for taken in rounds] for name in names}
    found = {}
    for name in names:
        try:
            found[name] = [taken[name] for taken in cpu_train.rounds_of([name], "all", args.dtype, args)]
        except (SystemExit, OSError) as error:
            found[name] = [{"error": f"{error}"}] * args.rounds
    return found


def measure(args: argparse.Namespace, checkpointing: str) -> list[dict]:
    """Every pair; on a CPU both of it alive together."""
    rows = []
    # Workers are this command again: it has to say which kind.
    sys.argv[1:] = [*args.given, "--checkpointing", checkpointing]
    for private in args.systems:
        plain = PAIRS[private]
        found = rounds_of([plain, private], args)
        row = {"system": private, "over": plain, "checkpointing": checkpointing, "rounds": args.rounds}
        failed = [f"{name}: {ones[-1]['error']}" for name, ones in found.items() if "error" in ones[-1]]
        if failed:
            row["error"] = "; ".join(failed)
        for key, name in (("private", private), ("plain", plain)):
            if "error" not in found[name][-1]:
                row[f"{key}_s"] = statistics.median(one["s"] for one in found[name])
                row[f"{key}_peak_mib"] = found[name][-1]["peak_mib"]
        if not failed:
            pairs = list(zip(found[private], found[plain], strict=True))
            ratios = [a["s"] / b["s"] for a, b in pairs]
            row["ratio"], row["ratio_spread"] = statistics.median(ratios), [min(ratios), max(ratios)]
            row["busy_ratio"] = statistics.median(a["busy_s"] / b["busy_s"] for a, b in pairs)
        rows.append(row)
        print(line_of(row), flush=True)
    return rows


def line_of(row: dict) -> str:
    def shown(key: str, digits: int) -> str:
        return f"{row[key]:.{digits}f}" if key in row else ""

    ratio = ""
    if "ratio" in row:
        ratio = f"{row['ratio']:.3f} ({row['ratio_spread'][0]:.3f}, {row['ratio_spread'][1]:.3f})"
    cells = [
        row["system"],
        row["checkpointing"],
        shown("plain_s", 3),
        shown("private_s", 3),
        ratio or row["error"],
        shown("busy_ratio", 3),
        shown("plain_peak_mib", 0),
        shown("private_peak_mib", 0),
    ]
    return "| " + " | ".join(cells) + " |"


COLUMNS = [
    "system", "recomputation", "plain s", "private s", "ratio (least, most)", "of processor time", "plain MiB",
    "private MiB",
]  # fmt: skip


def main() -> None:
    """Measures, prints a line for each pair as it comes, writes JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="the 8B shape with random weights, one system at a time")
    parser.add_argument("--model", default="smollm2-135m", help="without --gpu")
    parser.add_argument("--shape", default="llama-8b", choices=SHAPES, help="with --gpu")
    parser.add_argument("--device", choices=["cuda", "cpu"])
    parser.add_argument("--systems", nargs="*", choices=PAIRS)
    parser.add_argument("--checkpointing", nargs="*", choices=["on", "off"], help="with --gpu; both")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, help="256, with --gpu 2048")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="print where each system's step goes, by operation")
    parser.add_argument("--out")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.device = args.device or ("cuda" if args.gpu else "cpu")
    args.length = args.length or (2048 if args.gpu else 256)
    args.systems = args.systems or DEFAULTS["gpu" if args.gpu else "cpu"]
    args.checkpointing = args.checkpointing or (["on", "off"] if args.gpu else ["off"])
    if args.worker:
        worker(args)
        return
    args.given = sys.argv[1:]
    print(f"{machine(args)}, {args.batch} x {args.length} tokens, {args.dtype}, r {RANK} on all linears\n")
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    rows = [row for one in args.checkpointing for row in measure(args, one)]
    if args.out:
        with open(args.out, "w") as file:
            json.dump(
                {"machine": machine(args), "batch": args.batch, "length": args.length, "rows": rows}, file, indent=1
            )


def machine(args: argparse.Namespace) -> str:
    """What it ran on."""
    if args.device == "cuda":
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} threads"


if __name__ == "__main__":
    main()
