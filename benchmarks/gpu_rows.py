"""What a row of `gpu_train.py` does in its own process: makes its model, trains it, times its steps."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

from gpu_profile import PROFILED_STEPS, profile_of
from gpu_roofline import RANK, SHAPES

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
#: Tokens that every tokenizer keeps for itself.
SPECIAL = 4

OWN_ROW = re.compile(
    r"(?P<method>q?(?:lo|do)ra)(?P<parallel>-(?P<kind>ddp|fsdp2x)(?P<gpus>[2-9]|[1-9]\d+))?"
    r"(?P<fp8>-fp8(?:-(?P<part>most|backward))?)?(?P<flash>-flash)?(?P<general>-general)?(?P<gc>-gc)?(?:@(?P<budget>.+))?"
)


def gpus_of(name: str) -> int:
    """How many processes a row has, each with a GPU of its own."""
    parsed = OWN_ROW.fullmatch(name)
    return int(parsed["gpus"] or 1) if parsed else 1


def on_one_gpu(name: str) -> str:
    """The row that one on several GPUs is compared with; any other row itself."""
    parsed = OWN_ROW.fullmatch(name)
    return name.replace(parsed["parallel"], "", 1) if parsed and parsed["parallel"] else name


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

    def __init__(self, args: argparse.Namespace, processes: int = 1) -> None:
        import torch

        self.torch, self.args, self.processes, self.cuda = torch, args, processes, args.device != "cpu"
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
            "tokens_per_s": self.processes * self.args.batch * self.args.length / statistics.median(timed),
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
        "batch_size": args.batch * int(parsed["gpus"] or 1),
        "micro_batch_size": args.batch,
        "log_every": 1,
        "gradient_checkpointing": parsed["gc"] is not None,
        "fast": "off" if parsed["general"] else "on",
        "attention": "flash" if parsed["flash"] else "sdpa",
        "fp8": parsed["part"] or ("all" if parsed["fp8"] else "none"),
        "sharding": "fsdp2" if parsed["kind"] == "fsdp2x" else "none",
    }
    if parsed["budget"] not in (None, "max") and args.device != "cpu":
        keys["memory_budget"] = parsed["budget"]
    return keys


def own_row(name: str, args: argparse.Namespace) -> dict:
    """`deltaw train`'s loop on random rows; under torchrun what the first process has to say, nothing of the others."""
    from deltaw.core.allocator import use_expandable_segments

    # As the `deltaw` command does, before packages are imported that may use the GPU.
    use_expandable_segments()
    import torch

    import deltaw as dw
    from deltaw.data import Collator
    from deltaw.train import RunFolder, fit
    from deltaw.train.config import bytes_of, make_config
    from deltaw.train.loop import is_first_process, local_device, world_size

    processes, args.device = world_size(), local_device(args.device)
    clock = Clock(args, processes)

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
    count = clock.all_steps * args.batch * processes
    ids = torch.randint(SPECIAL, SHAPES[args.shape].vocab, (count, args.length), generator=draw).tolist()
    rows = [{"input_ids": one, "labels": one} for one in ids]
    said: list[str] = []
    clock.start()
    with tempfile.TemporaryDirectory() as folder:
        run = TimedRun(Path(folder), {}, writes=is_first_process())
        fit(model, "default", rows, Collator("causal-lm", 0), config, run, say=said.append)
    peaks = largest(clock.peaks(), args.device) if processes > 1 else {}
    if not is_first_process():
        return {}
    row = clock.results() | peaks | {"said": [line for line in said if not line.startswith("step ")]}
    notes = []
    if parsed["budget"] not in (None, "max"):
        over = row["peak_allocated_bytes"] > bytes_of(parsed["budget"])
        notes = ["no budget on a CPU"] if args.device == "cpu" else ["over its budget"] if over else []
    if clock.cuda and not all(segment["is_expandable"] for segment in torch.cuda.memory_snapshot()):
        notes.append("segments of fixed sizes")
    return row | {"notes": notes}


def largest(peaks: dict[str, int], device: str) -> dict[str, int]:
    """Each figure of the process that has the largest; every process has to ask."""
    import torch

    values = torch.tensor(list(peaks.values()), device=device)
    torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
    return dict(zip(peaks, values.tolist(), strict=True))


def peer_row(name: str, args: argparse.Namespace) -> dict:
    """Forward, backward, AdamW."""
    clock = Clock(args)
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
    """What one process has to say."""
    try:
        if name == "ceilings":
            return ceilings(args)
        if name == "make":
            make_folder(args)
            return {}
        # Unsloth wants to be imported before all that it rewrites.
        if name.startswith("unsloth"):
            importlib.import_module("unsloth")
        return (own_row if OWN_ROW.fullmatch(name) else peer_row)(name, args)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            return {"error": "out of memory"}
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:200]}


def work(name: str, args: argparse.Namespace) -> None:
    """One process: says what it has to say as a line of output, and ends."""
    found = worker(name, args)
    if found or gpus_of(name) == 1:
        print("\nRESULT " + json.dumps(found), flush=True)
    if gpus_of(name) == 1:
        return
    if "error" in found:
        # The others wait for this process, and torchrun ends them once it is gone: it must not wait for them.
        sys.stderr.flush()
        os._exit(1)
    import torch

    torch.distributed.destroy_process_group()
