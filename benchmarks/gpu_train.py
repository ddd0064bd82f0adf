"""Training speed and memory on GPUs: deltaw's rows and every peer that is installed, beside the card's own limits.

    python benchmarks/gpu_train.py [--batch 4] [--length 2048] [--systems ROW ...] [--profile] [--out FILE]
    python benchmarks/gpu_train.py --gpus 2
    python benchmarks/gpu_train.py --shape llama-70b --batch 1 --systems qlora-fsdp2x2@max
    python benchmarks/gpu_train.py --roofline [--gpus 2] [--base nf4] [--keep input] [--ceilings 750 3.0]

Random weights in bfloat16, rank 16 on the seven projections of every layer, no dropout, tokens drawn at random, the
median of 8 steps after 3. Every row has a process of its own and a time limit; one that fails, is not installed or
runs out of memory is a line of the table. deltaw's rows are `deltaw train`'s own loop (`deltaw.train.fit`, from the
keys that a run's YAML has) on rows that are in memory: loader, checks for NaN, clipping and logging are in its times.
Peers run forward, backward and a fused AdamW, and nothing else.

deltaw's rows are METHOD[-ddpN|-fsdp2xN][-fp8[-most|-backward]][-flash][-general][-gc][@BUDGET] with METHOD lora, qlora,
dora or qdora: `fp8` with -fp8, `attention` flash with -flash, `fast` off with -general, `gradient_checkpointing` with
-gc, BUDGET the key `memory_budget`, `max` for all that the card has (on a CPU, which has no budget, layers are fused
and the row says that none was given).
Peers and `frozen` (stock transformers, forward and backward alone) recompute activations, but for -nogc; -offload is
Unsloth's own way.

-ddpN and -fsdp2xN run on N GPUs of the machine through torchrun: copies of the model (DDP), or its parts (`sharding`
fsdp2). --batch is each GPU's: N GPUs take N times the tokens of one in a step. Tokens/s are of all GPUs together,
memory is that of the GPU which used most, and the share of the GEMM ceiling is a GPU's. A row on several GPUs says how
many times faster it is than the same row on one, where that stands above it in the table.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import psutil
from gpu_profile import profile_table
from gpu_roofline import KEEPS, RANK, SHAPES, roofline, sharded_table, useful_flops, weight_bytes
from gpu_rows import OWN_ROW, gpus_of, on_one_gpu, work

#: Seconds that torchrun has to end its processes: it asks them, waits for 30 s, and kills them.
GRACE_S = 60
PACKAGES = ("torch", "triton", "transformers", "peft", "unsloth", "liger-kernel", "bitsandbytes")

PEER_ROW = re.compile(
    r"frozen(?:-nogc)?|peft-q?(?:lo|do)ra(?:-liger)?(?:-nogc)?|unsloth-q?lora(?:-nogc)?|unsloth-qlora-offload"
)
OWN = ["lora@max", "qlora@max", "qlora@10.4GB", "qlora@8GB", "dora@max", "qdora@max", "qlora-fp8@max"]
#: What `--gpus N` runs, N in the place of the braces.
ON_SEVERAL = [
    "lora@max", "lora-ddp{}@max", "lora-fsdp2x{}@max", "qlora@max", "qlora-ddp{}@max", "qlora-fsdp2x{}@max",
]  # fmt: skip
PEERS = [
    "frozen", "peft-lora", "peft-lora-nogc", "peft-lora-liger", "peft-lora-liger-nogc", "peft-qlora",
    "peft-qlora-nogc", "peft-qlora-liger", "peft-qlora-liger-nogc", "peft-dora", "peft-dora-nogc", "peft-qdora",
    "peft-qdora-nogc", "unsloth-lora", "unsloth-lora-nogc", "unsloth-qlora", "unsloth-qlora-nogc",
    "unsloth-qlora-offload",
]  # fmt: skip


def ask(name: str, args: argparse.Namespace) -> dict:
    """A row from a process of its own, or one a GPU, ended with all that they started when their time is over."""
    several = gpus_of(name) > 1
    launcher = [
        "-m", "torch.distributed.run", "--nproc-per-node", str(gpus_of(name)), "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1",
    ]  # fmt: skip
    options = [*args.given, "--model-folder", args.model_folder, "--worker", name]
    command = [sys.executable, *(launcher if several else []), __file__, *options]
    # Unsloth writes what it compiles into the working directory unless told otherwise.
    compiled = str(Path(tempfile.gettempdir()) / "unsloth_compiled_cache")
    defaults = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "UNSLOTH_COMPILE_LOCATION": compiled}
    if several:
        # Not every host lets a process bind multicast memory.
        defaults["NCCL_NVLS_ENABLE"] = "0"
    environment = {**defaults, **os.environ}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment, start_new_session=True, **pipes) as process:
        try:
            said, complained = process.communicate(timeout=args.limit)
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {args.limit:g} s"}
        finally:
            if several and process.poll() is None:
                # torchrun's processes are in groups of their own, and it may not get to ending them itself.
                started = psutil.Process(process.pid).children(recursive=True)
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=GRACE_S)
                for child in started:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
                psutil.wait_procs(started, timeout=GRACE_S)
            # Compilers that it started may outlive it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    found = [line[7:] for line in said.splitlines() if line.startswith("RESULT ")]
    if found:
        # Of several processes that failed, the first did so by itself.
        return json.loads(found[0])
    last = ([line for line in complained.splitlines() if line.strip(" =-")] or ["no word"])[-1].strip()
    return {"error": f"ended with exit code {process.returncode}: {last[:160]}"}


def packages_of(name: str) -> list[str]:
    """What has to be importable for a row."""
    wanted = {"unsloth": "unsloth", "peft": "peft", "liger": "liger_kernel", "qlora": "bitsandbytes"}
    own = OWN_ROW.fullmatch(name) or name.startswith("frozen")
    return [] if own else [package for key, package in wanted.items() if key in name.replace("qdora", "qlora")]


def reads_folder(name: str) -> bool:
    """Whether a row's model comes from a folder."""
    return bool(PEER_ROW.fullmatch(name)) and name.startswith(("peft-q", "unsloth"))


def provide_folder(args: argparse.Namespace) -> str | None:
    """Makes the model's folder where there is none; why that cannot be."""
    folder = Path(args.model_folder)
    if (folder / "config.json").is_file():
        return None
    need = weight_bytes(SHAPES[args.shape], "bfloat16")
    free = shutil.disk_usage(folder.parent).free
    if free < 1.02 * need:
        return f"{folder.parent} has {free / 1e9:.1f} GB free and the model takes {need / 1e9:.1f}: give --model-folder"
    return ask("make", args).get("error")


def missing(name: str, args: argparse.Namespace) -> str | None:
    """What a row needs and is not here."""
    import torch

    here = torch.cuda.device_count() if args.device == "cuda" else gpus_of(name)
    if gpus_of(name) > here:
        return f"needs {gpus_of(name)} GPUs, and there {'is' if here == 1 else 'are'} {here}"
    absent = [package for package in packages_of(name) if importlib.util.find_spec(package) is None]
    return f"{' and '.join(absent)} not installed" if absent else None


# Tables.

COLUMNS = ["system", "tokens/s", "step s (least, most)", "allocated GB", "reserved GB", "of the GEMM ceiling", "notes"]


def line_of(row: dict) -> str:
    """A line of the table."""
    if "error" in row:
        return f"| {row['name']} | | | | | | {row['error']} |"
    memory = (f"{row[key] / 1e9:.2f}" if key in row else "" for key in ("peak_allocated_bytes", "peak_reserved_bytes"))
    cells = [
        row["name"],
        f"{row['tokens_per_s']:,.0f}",
        f"{row['step_s']:.4f} ({min(row['steps_s']):.4f}, {max(row['steps_s']):.4f})",
        *memory,
        f"{row['of_gemm_ceiling']:.1%}" if "of_gemm_ceiling" in row else "",
        "; ".join([*row.get("notes", []), *row.get("said", [])]),
    ]
    return "| " + " | ".join(cells) + " |"


def versions() -> dict[str, str]:
    """Of all that the table compares."""
    import deltaw

    found = {"deltaw": deltaw.__version__}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def output_of(*command: str) -> str | None:
    """What a command prints, where it can be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def measure(args: argparse.Namespace) -> list[dict]:
    """The card's limits, then every row as it comes."""
    limits = ask("ceilings", args)
    record = {
        "device": limits.get("gpu", "cpu"),
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "versions": versions(),
        "commit": output_of("git", "rev-parse", "HEAD"),
        "shape": args.shape,
        "batch": args.batch,
        "length": args.length,
        "warmup": args.warmup,
        "r": RANK,
        "ceilings": limits,
        "rows": [],
    }
    most = f"GEMM {limits['gemm_tflops']:.1f} TFLOP/s, copy {limits['copy_tbps']:.3f} TB/s"
    print(f"{record['device']}, {args.shape}, {args.batch} x {args.length} tokens, r {RANK}; {most}\n")
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|", flush=True)
    no_folder: str | None = None
    for name in args.systems:
        why = missing(name, args)
        if why is None and reads_folder(name):
            no_folder = no_folder or provide_folder(args)
            why = no_folder
        row = {"name": name, **({"error": why} if why else ask(name, args))}
        if "step_s" in row:
            reached = useful_flops(SHAPES[args.shape], args.batch, args.length) / row["step_s"] / 1e12
            row["of_gemm_ceiling"] = reached / limits["gemm_tflops"]
            alone = on_one_gpu(name)
            for other in record["rows"]:
                if other["name"] == alone != name and "tokens_per_s" in other:
                    row["times_one_gpu"] = row["tokens_per_s"] / other["tokens_per_s"]
                    row["notes"].append(f"x {row['times_one_gpu']:.2f} of {alone}")
        record["rows"].append(row)
        print(line_of(row), flush=True)
        if args.out:
            Path(args.out).write_text(json.dumps(record, indent=1) + "\n")
    return record["rows"]


def system_name(text: str) -> str:
    """A row's name, checked."""
    if OWN_ROW.fullmatch(text) or PEER_ROW.fullmatch(text):
        return text
    own = (
        "[q]lora or [q]dora with -ddpN or -fsdp2xN (N from 2), -fp8, -fp8-most, -fp8-backward, -flash, -general, -gc "
        "and @BUDGET"
    )
    raise argparse.ArgumentTypeError(f"{text!r} is no row: expected {own}, or one of {', '.join(PEERS)}")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-8b", choices=SHAPES)
    parser.add_argument("--batch", type=int, default=4, help="rows a step, of each GPU")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3, help="steps before the timed ones, at least 1")
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument("--systems", nargs="+", type=system_name, default=[*OWN, *PEERS], metavar="ROW")
    rows.add_argument("--gpus", type=int, metavar="N", help="LoRA and QLoRA on one and on N GPUs, in place of ROWs")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--limit", type=float, default=600, help="seconds a row")
    parser.add_argument("--model-folder", help="for peers that read a folder; made where it is missing, and kept")
    parser.add_argument("--profile", action="store_true", help="where two more steps go, by kernel")
    parser.add_argument("--out", help="JSON with every step's time")
    parser.add_argument("--roofline", action="store_true", help="print a step's arithmetic and transfers, run nothing")
    parser.add_argument("--base", default="bfloat16", choices=["bfloat16", "nf4"], help="with --roofline")
    parser.add_argument("--keep", default="all", choices=KEEPS, help="with --roofline")
    parser.add_argument("--ceilings", type=float, nargs=2, default=[750, 3.0], metavar=("TFLOPS", "TBPS"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


def main(given: list[str] | None = None) -> None:
    """Every row in turn, each in its own process."""
    parser = arguments()
    args = parser.parse_args(given)
    args.given = sys.argv[1:] if given is None else given
    if min(args.batch, args.steps, args.warmup) < 1 or args.length < 2:
        parser.error("--batch, --steps and --warmup are at least 1, --length at least 2")
    if args.worker:
        work(args.worker, args)
        return
    if args.gpus is not None:
        if args.gpus < 2:
            parser.error("--gpus is at least 2")
        args.systems = [name.format(args.gpus) for name in ON_SEVERAL]
    if args.roofline:
        tflops, tbps = args.ceilings
        options = {"keep": args.keep, "base": args.base, "tflops": tflops, "tbps": tbps}
        print(roofline(args.shape, args.batch, args.length, **options))
        if args.gpus is not None:
            print("\n" + sharded_table(args.shape, args.gpus))
        return
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device: give --device cpu, with --shape tiny, to try the command")
    with contextlib.ExitStack() as kept:
        if args.model_folder is None:
            memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
            scratch = kept.enter_context(tempfile.TemporaryDirectory(dir=memory, prefix="gpu-train-"))
            args.model_folder = str(Path(scratch) / args.shape)
        rows = measure(args)
    for row in rows:
        if "profile" in row:
            print(profile_table(row["name"], row["profile"]))


if __name__ == "__main__":
    main()
