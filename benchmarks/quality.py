"""Quality of an adapter: deltaw and PEFT, the same rows, hyperparameters and measure, several seeds.

    python benchmarks/quality.py --train TRAIN.jsonl --test TEST.jsonl --transfer fpb=OTHER.jsonl --seeds 0 1 2

Rows are JSON Lines with `prompt` and `completion` (a closed set of answers). Each cell (package, method, seed) runs in
its own process: deltaw through `dw.run_training`'s job, PEFT through `get_peft_model` and transformers' own Trainer and
forward, with the same token ids and arguments. Both are measured by label likelihood. Prints a Markdown table and
writes every cell as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LEARNING = {
    "r": 8,
    "alpha": 16,
    "target_modules": "all-linear",
    "learning_rate": 1e-3,
    "epochs": 3,
    "batch_size": 32,
    "micro_batch_size": 32,
    "max_length": 256,
}
SHOWN = ("accuracy", "macro_f1", "macro_auroc")


def job_config(args: argparse.Namespace, output: str):
    from deltaw.train.config import make_config

    keys = dict(LEARNING, model=args.model, data=args.train, test_data=args.test, output=output, seed=args.seed)
    return make_config({**keys, "method": args.method, "device": args.device})


def run_deltaw(args: argparse.Namespace, output: str):
    import deltaw as dw
    from deltaw.studies.job import run_job

    config = job_config(args, output)
    run = run_job(config, command=" ".join(sys.argv), say=note)
    model = dw.load_model(args.model, device=args.device, quantize=config.quantization)
    dw.load_adapter(model, run.path / "adapter", name="trained")
    return run.record["metrics"], run.record["cost"], model


def quantized_by_bitsandbytes(args: argparse.Namespace):
    """The base as PEFT's guide to QLoRA has it."""
    import torch
    import transformers
    from peft import prepare_model_for_kbit_training

    from deltaw.models.sources import resolve

    four_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        resolve(args.model).path_or_id, dtype=torch.bfloat16, quantization_config=four_bits, device_map={"": 0}
    )
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def run_peft(args: argparse.Namespace, output: str):
    import time

    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    import deltaw as dw
    from deltaw.evaluate.task import TaskEvaluator
    from deltaw.studies.job import training_examples
    from deltaw.studies.rows import run_rows
    from deltaw.train.loop import training_arguments

    config = job_config(args, output)
    rows = run_rows(config, generative=True)
    tokenizer = dw.load_tokenizer(args.model)
    model = quantized_by_bitsandbytes(args) if args.method == "qlora" else dw.load_model(args.model, device=args.device)
    encoded, collator = training_examples(config, rows, tokenizer, model)
    examples = encoded.examples
    arguments = training_arguments(config, Path(output), len(examples), model.device, False)
    transformers.set_seed(args.seed)
    lora = LoraConfig(
        r=LEARNING["r"],
        lora_alpha=LEARNING["alpha"],
        target_modules="all-linear",
        use_rslora=args.method == "rslora",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora)
    arguments.save_strategy = transformers.trainer_utils.SaveStrategy.NO
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=examples, data_collator=collator)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    evaluator = TaskEvaluator("instruct", rows.test, tokenizer, labels=rows.labels, max_length=config.max_length)
    model = model.eval()
    found = evaluator(model.base_model.model)
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"after": found.metrics}, {"train_s": seconds, "peak_memory_bytes": memory}, model.base_model.model


def cell(args: argparse.Namespace) -> None:
    """One package, method and seed."""
    import deltaw as dw
    from deltaw.data import read_rows
    from deltaw.evaluate.task import TaskEvaluator

    with tempfile.TemporaryDirectory() as folder:
        run = {"deltaw": run_deltaw, "peft": run_peft}[args.package]
        place = Path(args.keep or folder) / f"{args.package}-{args.method}-{args.seed}"
        metrics, cost, model = run(args, str(place))
        transfer = {}
        tokenizer = dw.load_tokenizer(args.model)
        for item in args.transfer:
            name, path = item.split("=", 1)
            rows = read_rows(path)
            labels = sorted({row.completion.strip() for row in rows})
            transfer[name] = TaskEvaluator("instruct", rows, tokenizer, labels=labels, max_length=256)(model).metrics
    result = {"package": args.package, "method": args.method, "seed": args.seed, "cost": cost, "transfer": transfer}
    print(
        "RESULT " + json.dumps({**result, "metrics": {k: metrics[k] for k in metrics if k != "confusion"}}), flush=True
    )


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"


def table(cells: list[dict]) -> str:
    """Mean and standard deviation over the seeds."""
    transfers = sorted({name for c in cells for name in c["transfer"]})
    head = ["", *(f"test {m}" for m in SHOWN), *(f"{t} {m}" for t in transfers for m in SHOWN[:2]), "seeds", "train s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for key in dict.fromkeys((c["package"], c["method"]) for c in cells):
        group = [c for c in cells if (c["package"], c["method"]) == key]
        row = [f"{key[0]} {key[1]}"]
        row += [spread([c["metrics"]["after"][m] for c in group]) for m in SHOWN]
        row += [spread([c["transfer"][t][m] for c in group]) for t in transfers for m in SHOWN[:2]]
        row += [str(len(group)), f"{statistics.median(c['cost']['train_s'] for c in group):.0f}"]
        lines.append("| " + " | ".join(row) + " |")
    plain = next((c["metrics"] for c in cells if "before" in c["metrics"]), None)
    if plain:
        for name, found in {"no adapter": plain["before"], **plain.get("baselines", {})}.items():
            shown = [f"{found[m]:.3f}" if m in found else "" for m in SHOWN]
            lines.append("| " + " | ".join([name, *shown, *[""] * (2 * len(transfers) + 2)]) + " |")
    return "\n".join(lines)


def run_cell(wanted: tuple[str, str, int]) -> dict:
    """One cell in a process of its own."""
    package, method, seed = wanted
    one = ["--package", package, "--method", method, "--seed", str(seed)]
    done = subprocess.run([sys.executable, *sys.argv, *one], stdout=subprocess.PIPE, text=True)
    found = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not found:
        sys.exit(f"the cell {package} {method} {seed} failed with exit code {done.returncode}")
    result = json.loads(found[0])
    note(f"{package} {method} {seed}: {result['metrics']['after']}")
    return result


def main() -> None:
    """Runs every cell in turn, each in its own process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--transfer", nargs="*", default=[], metavar="NAME=FILE")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--packages", nargs="*", default=["deltaw", "peft"])
    parser.add_argument("--methods", nargs="*", default=["lora"], help="lora, rslora, qlora")
    parser.add_argument("--parallel", type=int, default=1, help="cells at a time; their times then say nothing")
    parser.add_argument("--keep", help="a folder to keep deltaw's run folders in")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default="quality.json")
    parser.add_argument("--package", help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.package:
        cell(args)
        return
    wanted = [(p, m, s) for m in args.methods for s in args.seeds for p in args.packages]
    cells = []
    with ThreadPoolExecutor(args.parallel) as pool:
        for one in pool.map(run_cell, wanted):
            cells.append(one)
            Path(args.out).write_text(json.dumps(cells, indent=1))
    print(table(cells))


if __name__ == "__main__":
    main()
