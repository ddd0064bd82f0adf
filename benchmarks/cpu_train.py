"""Training speed and memory on a CPU: deltaw, PEFT, and the frozen model's own forward and backward as the yardstick.

    python benchmarks/cpu_train.py [--model smollm2-135m] [--rounds 9]

One process a system, all alive together; they take a step in turn, round by round, so that a machine whose speed drifts
slows all of them alike. Tokens/s and memory are medians over the rounds; ratios are medians of the rounds' own ratios.
A matrix product timed in each round shows the drift. `frozen` is stock transformers with input gradients and no
optimizer; `full` fine-tunes every weight. `deltaw-qlora` and `peft-qlora` (bitsandbytes) hold the base in 4 bits;
`deltaw-dora`, `peft-qdora` and so on are DoRA.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time

RANK = 16


def quantized_by_bitsandbytes(args: argparse.Namespace):
    """The base as PEFT's guide to QLoRA has it, without recomputation."""
    import torch
    import transformers
    from peft import prepare_model_for_kbit_training

    from deltaw.models.sources import resolve

    dtype = getattr(torch, args.dtype)
    four_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        resolve(args.model).path_or_id, dtype=dtype, quantization_config=four_bits, device_map={"": "cpu"}
    )
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def build(name: str, args: argparse.Namespace):
    """(model, optimizer or None) of one system."""
    import torch

    import deltaw as dw

    package, _, method = name.partition("-")
    four_bits = method.startswith("q")
    if package == "peft" and four_bits:
        model = quantized_by_bitsandbytes(args)
    else:
        model = dw.load_model(args.model, dtype=args.dtype, device="cpu", quantize=dw.NF4() if four_bits else None)
    model.config.use_cache = False
    if package == "deltaw":
        from deltaw.fuse.head import install_loss_head

        kind = dw.DoRA if "dora" in method else dw.LoRA
        if method.endswith("-keep"):
            from deltaw.methods import dora

            dora._recomputes = lambda out, columns: False
        dw.adapt(model, kind(r=RANK, alpha=2 * RANK, target_modules="all-linear"))
        objection = install_loss_head(model)
        assert objection is None, objection
    elif package == "peft":
        from peft import LoraConfig, get_peft_model

        model.enable_input_require_grads()
        options = {"use_dora": method.endswith("dora"), "target_modules": "all-linear"}
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, **options))
    elif name == "frozen":
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.enable_input_require_grads()
    else:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, torch.optim.AdamW(trained, lr=1e-4) if trained else None


def worker(args: argparse.Namespace) -> None:
    """Takes one step for each line on standard input, and answers with its seconds."""
    import torch

    torch.set_num_threads(args.threads)
    model, optimizer = build(args.worker, args)
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1024, 1024, generator=draw) for _ in range(2))
    for line in sys.stdin:
        if line.startswith("profile"):
            profile(model, optimizer, args, draw)
            continue
        begun = time.perf_counter()
        for _ in range(10):
            a @ b
        probe = time.perf_counter() - begun
        busy = time.process_time()
        seconds = step(model, optimizer, args, draw, line.split()[0] == "short")
        busy = time.process_time() - busy
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print("ANSWER " + json.dumps({"s": seconds, "busy_s": busy, "probe_s": probe, "peak_mib": used}), flush=True)


def step(model, optimizer, args: argparse.Namespace, draw, short: bool) -> float:
    """One step on fresh random tokens; `short`: only the last eight tokens of a row carry loss."""
    import torch

    ids = torch.randint(4, model.config.vocab_size, (args.batch, args.length), generator=draw)
    labels = ids.clone()
    if short:
        labels[:, :-8] = -100
    begun = time.perf_counter()
    with training_context(args.worker):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - begun
    assert bool(torch.isfinite(loss))
    return seconds


def training_context(name: str):
    """What deltaw's training loop runs in on a CPU."""
    if not name.startswith("deltaw"):
        return contextlib.nullcontext()
    from deltaw.fuse.attention import FastCpuAttention

    return FastCpuAttention()


def profile(model, optimizer, args: argparse.Namespace, draw) -> None:
    """Where a step goes, by operation, on standard error."""
    import torch

    step(model, optimizer, args, draw, False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as found:
        step(model, optimizer, args, draw, False)
    table = found.key_averages(group_by_input_shape=args.shapes)
    print(table.table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=40), file=sys.stderr)
    print("ANSWER {}", flush=True)


class Worker:
    """One system in its own process."""

    def __init__(self, name: str, dtype: str) -> None:
        environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
        command = [sys.executable, *sys.argv, "--worker", name, "--dtype", dtype]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, line: str) -> dict:
        """Sends a line, waits for the answer."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        for answer in self.process.stdout:
            if answer.startswith("ANSWER "):
                return json.loads(answer[7:])
        raise SystemExit(f"a worker ended with exit code {self.process.wait()}")

    def stop(self) -> None:
        """Ends the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def rounds_of(names: list[str], case: str, dtype: str, args: argparse.Namespace) -> list[dict]:
    """What every system answers in each round after the first ones; all are alive together."""
    workers = {name: Worker(name, dtype) for name in names}
    if getattr(args, "profile", False):
        for one in workers.values():
            one.ask("profile")
    rounds = [{name: one.ask(case) for name, one in workers.items()} for _ in range(args.rounds + args.warmup)]
    for one in workers.values():
        one.stop()
    return rounds[args.warmup :]


def measure(args: argparse.Namespace, dtype: str) -> list[dict]:
    """All systems in one dtype, the two cases apart (a process remembers its peak)."""
    results = []
    for case in args.cases:
        rounds = rounds_of(args.systems, case, dtype, args)
        tokens = args.batch * args.length
        for name in args.systems:
            seconds = [taken[name]["s"] for taken in rounds]
            result = {
                "dtype": dtype,
                "case": case,
                "system": name,
                "tokens_per_s": tokens / statistics.median(seconds),
                "spread": [tokens / max(seconds), tokens / min(seconds)],
                "peak_mib": rounds[-1][name]["peak_mib"],
                "probe_s": statistics.median(taken[name]["probe_s"] for taken in rounds),
            }
            for other in ("frozen", "peft-qlora" if name.endswith("-qlora") else "peft"):
                if other in args.systems:
                    ratios = [taken[other]["s"] / taken[name]["s"] for taken in rounds]
                    result[f"over_{other.partition('-')[0]}"] = statistics.median(ratios)
                    result[f"over_{other.partition('-')[0]}_spread"] = [min(ratios), max(ratios)]
            results.append(result)
    return results


def table(results: list[dict]) -> str:
    """A Markdown table."""
    lines = [
        "| dtype | tokens with loss | system | tokens/s (slowest, fastest) | of frozen | of PEFT | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        shares = [f"{r[key]:.2f}" if key in r else "" for key in ("over_frozen", "over_peft")]
        case = "all" if r["case"] == "all" else "last 8 of each row"
        speed = f"{r['tokens_per_s']:.0f} ({r['spread'][0]:.0f}, {r['spread'][1]:.0f})"
        lines.append(
            f"| {r['dtype']} | {case} | {r['system']} | {speed} | {shares[0]} | {shares[1]} | {r['peak_mib']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures, prints the table, writes JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--systems", nargs="*", default=["deltaw", "peft", "frozen", "full"])
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--cases", nargs="*", default=["all", "short"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="print where each system's step goes, by operation")
    parser.add_argument("--shapes", action="store_true", help="with --profile: apart by input shapes")
    parser.add_argument("--out")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    results = [result for dtype in args.dtypes for result in measure(args, dtype)]
    print(f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} threads, {args.batch} x {args.length} tokens")
    print(table(results))
    if args.out:
        with open(args.out, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
