"""Training speed and memory on one GPU: deltaw's rows and every peer that is installed, beside the card's own limits.

    python benchmarks/gpu_train.py [--batch 4] [--length 2048] [--systems ROW ...] [--profile] [--out FILE]
    python benchmarks/gpu_train.py --roofline [--base nf4] [--keep input] [--ceilings 750 3.0]

Random weights in bfloat16, rank 16 on the seven projections of every layer, no dropout, tokens drawn at random, the
median of 8 steps after 3. Every row has a process of its own and a time limit; one that fails, is not installed or
runs out of memory is a line of the table. deltaw's rows are `deltaw train`'s own loop (`deltaw.train.fit`, from the
keys that a run's YAML has) on rows that are in memory: loader, checks for NaN, clipping and logging are in its times.
Peers run forward, backward and a fused AdamW, and nothing else.

deltaw's rows are METHOD[-fp8[-but-down]][-general][-gc][@BUDGET] with METHOD lora, qlora, dora or qdora: `fp8` with
-fp8, `fast` off with -general, `gradient_checkpointing` with -gc, BUDGET the key `memory_budget`, `max` for all that
the card has (on a CPU, which has no budget, layers are fused and the row says that none was given). Peers and `frozen`
(stock transformers, forward and backward alone) recompute activations, but for -nogc; -offload is Unsloth's own way.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from gpu_profile import PROFILED_STEPS, profile_of, profile_table
from gpu_roofline import KEEPS, RANK, SHAPES, roofline, useful_flops, weight_bytes

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
#: Tokens that every tokenizer keeps for itself.
SPECIAL = 4
PACKAGES = ("torch", "triton", "transformers", "peft", "unsloth", "liger-kernel", "bitsandbytes")

OWN_ROW = re.compile(
    r"(?P<method>q?(?:lo|do)ra)(?P<fp8>-fp8(?:-but-down)?)?(?P<general>-general)?(?P<gc>-gc)?(?:@(?P<budget>.+))?"
)
PEER_ROW = re.compile(
    r"frozen(?:-nogc)?|peft-q?(?:lo|do)ra(?:-liger)?(?:-nogc)?|unsloth-q?lora(?:-nogc)?|unsloth-qlora-offload"
)
OWN = ["lora@max", "qlora@max", "qlora@10.4GB", "qlora@8GB", "dora@max", "qdora@max", "qlora-fp8@max"]
PEERS = [
    "frozen", "peft-lora", "peft-lora-nogc", "peft-lora-liger", "peft-lora-liger-nogc", "peft-qlora",
    "peft-qlora-nogc", "peft-qlora-liger", "peft-qlora-liger-nogc", "peft-dora", "peft-dora-nogc", "peft-qdora",
    "peft-qdora-nogc", "unsloth-lora", "unsloth-lora-nogc", "unsloth-qlora", "unsloth-qlora-nogc",
    "unsloth-qlora-offload",
]  # fmt: skip

# Models.


def random_model(args: argparse.Namespace, *, four_bits: bool = False):
    """A model with random weights, made on the device matrix by matrix; in 4 bits it never is there in 16."""
    import torch
    import transformers

    config = SHAPES[args.shape].config(args.length)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    packed: set[str] = set()
    if four_bits:
        from deltaw.quant import NF4, quantizable
        from deltaw.quant.model import quantized_parameter

        packed = set(quantizable(model, NF4()))
    draw = torch.Generator(args.device).manual_seed(0)
    for path, module in model.named_modules():
        for name, old in list(module._parameters.items()):
            if old is None:
                continue
            made = torch.ones(old.shape, dtype=torch.bfloat16, device=args.device)
            if old.dim() > 1:
                made.normal_(std=SHAPES[args.shape].width ** -0.5, generator=draw)
            if path in packed:
                module._parameters[name] = quantized_parameter(made, False, NF4(), f"{path}.{name}")
            else:
                module._parameters[name] = torch.nn.Parameter(made)
    # Its frequencies are computed when it is made, which a model without memory cannot.
    with torch.device(args.device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def make_folder(args: argparse.Namespace) -> None:
    """Saves a random model, and a tokenizer for it, for peers that read folders only."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = Path(args.model_folder)
    staging = folder.with_name(folder.name + ".tmp")
    random_model(args).save_pretrained(staging, max_shard_size="4GB")
    names = ["<pad>", "<s>", "</s>", "<unk>", *(f"t{i}" for i in range(SPECIAL, SHAPES[args.shape].vocab))]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(staging)
    staging.rename(folder)


def recompute(model) -> None:
    """Turns recomputation of activations on, under either of its names."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def unsloth_model(name: str, args: argparse.Namespace):
    from unsloth import FastLanguageModel  # before transformers, which it rewrites
    import torch  # isort: skip

    model, _ = FastLanguageModel.from_pretrained(
        args.model_folder,
        max_seq_length=args.length,
        dtype=torch.bfloat16,
        load_in_4bit="qlora" in name,
        local_files_only=True,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=0,
        bias="none",
        target_modules=TARGETS,
        use_gradient_checkpointing={"nogc": False, "offload": "unsloth"}.get(name.split("-")[-1], True),
    )
    FastLanguageModel.for_training(model)
    return model


def stock_model(name: str, args: argparse.Namespace):
    """PEFT's rows, with or without Liger's kernels, and the frozen model."""
    import torch
    import transformers

    keeps, method = name.endswith("-nogc"), name.removeprefix("peft-").split("-")[0]
    if "liger" in name:
        import liger_kernel.transformers as liger

        getattr(liger, f"apply_liger_kernel_to_{SHAPES[args.shape].family}")()
    if method.startswith("q"):
        from peft import prepare_model_for_kbit_training

        four_bits = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            args.model_folder,
            dtype=torch.bfloat16,
            quantization_config=four_bits,
            attn_implementation="sdpa",
            device_map={"": 0 if args.device == "cuda" else "cpu"},
        )
        model.config.use_cache = False
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=not keeps, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    else:
        model = random_model(args)
        if not keeps:
            recompute(model)
    model.enable_input_require_grads()
    if name.startswith("frozen"):
        return model.requires_grad_(False).train()
    from peft import LoraConfig, get_peft_model

    dora = method.endswith("dora")
    adapter = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, use_dora=dora, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, adapter).train()


# Rows: each in its own process.


class Clock:
    """Times and peaks of steps, waiting for the device at the end of each, and a profile of two steps after them."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        self.torch, self.args, self.cuda = torch, args, args.device == "cuda"
        self.steps = args.warmup + args.steps
        self.all_steps = self.steps + (PROFILED_STEPS if args.profile else 0)
        self.times: list[float] = []
        self.loss = float("nan")
        self.row: dict = {}

    def now(self) -> float:
        """Seconds, once everything asked for is done."""
        if self.cuda:
            self.torch.cuda.synchronize()
        return time.perf_counter()

    def start(self) -> None:
        """What building took is not the steps'."""
        if self.cuda:
            self.torch.cuda.reset_peak_memory_stats()
        self.last = self.now()

    def tick(self, loss: float) -> None:
        """A step has ended."""
        self.times.append(self.now() - self.last)
        self.loss = loss
        if len(self.times) == self.steps:
            self.row |= self.peaks()
            if self.args.profile:
                kinds = self.torch.profiler.ProfilerActivity
                self.profiler = self.torch.profiler.profile(activities=[kinds.CUDA if self.cuda else kinds.CPU])
                self.profiler.start()
        elif len(self.times) == self.all_steps:
            self.profiler.stop()
            self.row["profile"] = profile_of(self.profiler, sum(self.times[self.steps :]), self.cuda)
        self.last = self.now()

    def peaks(self) -> dict:
        """The most memory in use so far."""
        if not self.cuda:
            return {"peak_allocated_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        cuda = self.torch.cuda
        return {
            "peak_allocated_bytes": cuda.max_memory_allocated(),
            "peak_reserved_bytes": cuda.max_memory_reserved(),
        }

    def results(self) -> dict:
        """The row's figures."""
        if self.loss != self.loss:
            raise ValueError("the loss is NaN")
        timed = self.times[self.args.warmup : self.steps]
        return {
            **self.row,
            "tokens_per_s": self.args.batch * self.args.length / statistics.median(timed),
            "step_s": statistics.median(timed),
            "steps_s": timed,
            "loss": self.loss,
        }


def own_keys(parsed: dict[str, str | None], args: argparse.Namespace) -> dict:
    """A run's configuration keys."""
    keys: dict = {
        "method": parsed["method"],
        "r": RANK,
        "alpha": 2 * RANK,
        "target_modules": TARGETS,
        "max_length": args.length,
        "batch_size": args.batch,
        "micro_batch_size": args.batch,
        "log_every": 1,
        "gradient_checkpointing": parsed["gc"] is not None,
        "fast": "off" if parsed["general"] else "on",
        "fp8": {None: "none", "-fp8": "all"}.get(parsed["fp8"], "all-but-down"),
    }
    if parsed["budget"] not in (None, "max") and args.device == "cuda":
        keys["memory_budget"] = parsed["budget"]
    return keys


def own_row(name: str, args: argparse.Namespace, clock: Clock) -> dict:
    """`deltaw train`'s loop on random rows."""
    import torch

    import deltaw as dw
    from deltaw.data import Collator
    from deltaw.train import RunFolder, fit
    from deltaw.train.config import bytes_of, make_config

    class TimedRun(RunFolder):
        """Every step writes its line here when it is over."""

        def log(self, line) -> None:
            super().log(line)
            if "loss" in line:
                clock.tick(line["loss"])

    parsed = OWN_ROW.fullmatch(name)
    assert parsed is not None
    config = make_config({**own_keys(parsed.groupdict(), args), "max_steps": clock.all_steps})
    model = random_model(args, four_bits=config.quantize == "nf4")
    dw.adapt(model, config.method_config, name="default", seed=config.seed)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(
        SPECIAL, SHAPES[args.shape].vocab, (clock.all_steps * args.batch, args.length), generator=draw
    ).tolist()
    rows = [{"input_ids": one, "labels": one} for one in ids]
    said: list[str] = []
    clock.start()
    with tempfile.TemporaryDirectory() as folder:
        run = TimedRun(Path(folder), {})
        fit(model, "default", rows, Collator("causal-lm", 0), config, run, say=said.append)
    row = clock.results() | {"said": [line for line in said if not line.startswith("step ")]}
    notes = []
    if parsed["budget"] not in (None, "max"):
        over = row["peak_allocated_bytes"] > bytes_of(parsed["budget"])
        notes = ["no budget on a CPU"] if args.device == "cpu" else ["over its budget"] if over else []
    return row | {"notes": notes}


def peer_row(name: str, args: argparse.Namespace, clock: Clock) -> dict:
    """Forward, backward, AdamW."""
    model = (unsloth_model if name.startswith("unsloth") else stock_model)(name, args)
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=clock.cuda) if trained else None
    # PEFT's factors are float32: it is trained under autocast, as Trainer does.
    autocast = torch.autocast(args.device, torch.bfloat16) if name.startswith("peft") else contextlib.nullcontext()
    draw = torch.Generator(args.device).manual_seed(1)
    shape = (args.batch, args.length)
    clock.start()
    for _ in range(clock.all_steps):
        ids = torch.randint(SPECIAL, SHAPES[args.shape].vocab, shape, device=args.device, generator=draw)
        with autocast:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        clock.tick(float(loss.detach()))
    return clock.results()


def ceilings(args: argparse.Namespace) -> dict:
    """What the device reaches at a square product in bfloat16, and at a copy."""
    import torch

    clock = Clock(args)
    size, numbers = (8192, 2**30) if clock.cuda else (512, 2**22)
    draw = torch.Generator(args.device).manual_seed(0)
    a, b = (torch.randn(size, size, device=args.device, generator=draw).bfloat16() for _ in range(2))
    x = torch.zeros(numbers, device=args.device)
    y = torch.empty_like(x)

    def median_s(work) -> float:
        taken = []
        for _ in range(8):
            begun = clock.now()
            for _ in range(5):
                work()
            taken.append((clock.now() - begun) / 5)
        return statistics.median(taken[2:])

    found: dict = {
        "gemm_tflops": 2 * size**3 / median_s(lambda: a @ b) / 1e12,
        "copy_tbps": 8 * numbers / median_s(lambda: y.copy_(x)) / 1e12,
    }
    if clock.cuda:
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def worker(name: str, args: argparse.Namespace) -> dict:
    """What one process has to say; its last line of output."""
    try:
        if name == "ceilings":
            return ceilings(args)
        if name == "make":
            make_folder(args)
            return {}
        # Unsloth wants to be imported before all that it rewrites.
        if name.startswith("unsloth"):
            importlib.import_module("unsloth")
        return (own_row if OWN_ROW.fullmatch(name) else peer_row)(name, args, Clock(args))
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            return {"error": "out of memory"}
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:200]}


def ask(name: str, args: argparse.Namespace) -> dict:
    """A row from a process of its own, ended with all that it started when its time is over."""
    command = [sys.executable, __file__, *args.given, "--model-folder", args.model_folder, "--worker", name]
    # Unsloth writes what it compiles into the working directory unless told otherwise.
    compiled = str(Path(tempfile.gettempdir()) / "unsloth_compiled_cache")
    defaults = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "UNSLOTH_COMPILE_LOCATION": compiled}
    environment = {**defaults, **os.environ}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment, start_new_session=True, **pipes) as process:
        try:
            said, complained = process.communicate(timeout=args.limit)
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {args.limit:g} s"}
        finally:
            # Compilers that it started may outlive it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    found = [line[7:] for line in said.splitlines() if line.startswith("RESULT ")]
    if found:
        return json.loads(found[-1])
    last = (complained.strip().splitlines() or ["no word"])[-1]
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
        absent = [package for package in packages_of(name) if importlib.util.find_spec(package) is None]
        why = f"{' and '.join(absent)} not installed" if absent else None
        if why is None and reads_folder(name):
            no_folder = no_folder or provide_folder(args)
            why = no_folder
        row = {"name": name, **({"error": why} if why else ask(name, args))}
        if "step_s" in row:
            reached = useful_flops(SHAPES[args.shape], args.batch, args.length) / row["step_s"] / 1e12
            row["of_gemm_ceiling"] = reached / limits["gemm_tflops"]
        record["rows"].append(row)
        print(line_of(row), flush=True)
        if args.out:
            Path(args.out).write_text(json.dumps(record, indent=1) + "\n")
    return record["rows"]


def system_name(text: str) -> str:
    """A row's name, checked."""
    if OWN_ROW.fullmatch(text) or PEER_ROW.fullmatch(text):
        return text
    own = "[q]lora or [q]dora with -fp8, -fp8-but-down, -general, -gc and @BUDGET"
    raise argparse.ArgumentTypeError(f"{text!r} is no row: expected {own}, or one of {', '.join(PEERS)}")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-8b", choices=SHAPES)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3, help="steps before the timed ones, at least 1")
    parser.add_argument("--systems", nargs="+", type=system_name, default=[*OWN, *PEERS], metavar="ROW")
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
        print("\nRESULT " + json.dumps(worker(args.worker, args)), flush=True)
        return
    if args.roofline:
        tflops, tbps = args.ceilings
        options = {"keep": args.keep, "base": args.base, "tflops": tflops, "tbps": tbps}
        print(roofline(args.shape, args.batch, args.length, **options))
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
