"""What organisations gain by learning together: each alone, all rows in one place, every rule, and with privacy.

    python benchmarks/fraud_study.py --device cuda --parallel 8 --seeds 0 1 2 3 4 --out results
    python benchmarks/fraud_study.py --task credit --seeds 0 1 2 3 4 --out results
    python benchmarks/fraud_study.py --task tfns --data train.jsonl --test test.jsonl --cells alone central fedavg-ab
    python benchmarks/fraud_study.py --sweep --overlap 0 0.15 0.5 1 --label-noise 0 0.05 0.2 --seeds 0 1 2 --out results

Runs go into --work, where finished ones are kept; --out gets what is small: the numbers and the tables. Where the
packages of the models are, DELTAW_PACKAGES or DELTAW_CACHE say. `--set` and `--set-private` change settings of all
trainings, or of the private ones, for tuning on seeds that nothing is reported of.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from deltaw.core.errors import DeltawError
from deltaw.studies.consortium import EXAMPLES, Study, points, run_study, tables
from deltaw.studies.consortium_data import skewed
from deltaw.studies.consortium_plan import ALL_CELLS

SWEEP_CELLS = ("alone", "central", "fedavg-ab", "tfidf")
#: What a decoder answers in words is trained as instructions, with its own batches.
DECODER = {"learning_rate": 1e-3, "batch_size": 32, "micro_batch_size": 32, "eval_batch_size": 64}


def keys(given: list[str]) -> dict[str, Any]:
    """KEY=VALUE as YAML reads the values."""
    return {name: yaml.safe_load(value) for name, _, value in (item.partition("=") for item in given)}


def study_of(args: argparse.Namespace) -> Study:
    """The study that the arguments ask for."""
    if args.task in EXAMPLES:
        example = EXAMPLES[args.task]
    else:
        if not args.data or not args.test:
            sys.exit(f"--task {args.task} needs --data FILE and --test FILE")
        example = skewed(args.data, args.test, nodes=args.nodes, concentration=args.concentration)
        example = dataclasses.replace(example, name=args.task)
    options: dict[str, Any] = {"device": args.device}
    if args.model:
        options |= {"model": args.model} | (DECODER if "smollm" in args.model.lower() else {})
    if args.rows:
        example = dataclasses.replace(example, knobs={**example.knobs, "rows_per_bank": args.rows})
    private = keys(args.set_private) | ({"unit": args.unit} if args.unit else {})
    shown = {"": {}}
    if args.sweep:
        shown = points(overlap=args.overlap, label_noise=args.label_noise)
    return Study(
        example=example,
        output=args.work or f"runs/{args.task}-{'sweep' if args.sweep else 'study'}",
        cells=args.cells or (SWEEP_CELLS if args.sweep else ALL_CELLS),
        seeds=args.seeds,
        points=shown,
        rounds=args.rounds,
        local_epochs=args.local_epochs,
        parallel=args.parallel,
        options=options | keys(args.set),
        federated=keys(args.set_federated),
        private=private,
    )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="fraud", help="fraud, credit, or a name for the rows of --data")
    parser.add_argument("--data", help="labelled training rows, to be spread over nodes")
    parser.add_argument("--test", help="shared test rows")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--concentration", type=float, default=0.3, help="of the nodes' labels; smaller is more skewed")
    parser.add_argument("--rows", type=int, help="of each bank of the fraud example")
    parser.add_argument("--cells", nargs="*", help=f"by default {' '.join(ALL_CELLS)}; with --sweep fewer")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--rounds", type=int, help="by default the example's")
    parser.add_argument("--local-epochs", type=float, default=1.0)
    parser.add_argument("--sweep", action="store_true", help="the fraud example's knobs, every combination")
    parser.add_argument("--overlap", nargs="*", type=float, default=[0.0, 0.15, 0.5, 1.0])
    parser.add_argument("--label-noise", nargs="*", type=float, default=[0.0, 0.05, 0.2])
    parser.add_argument("--unit", help="hide whole customers: customer")
    parser.add_argument("--model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--parallel", type=int, default=1, help="cells at a time")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of every training")
    parser.add_argument("--set-federated", nargs="*", default=[], metavar="KEY=VALUE", help="of every federation")
    parser.add_argument("--set-private", nargs="*", default=[], metavar="KEY=VALUE", help="of private federations")
    parser.add_argument("--work", help="the folder of the runs")
    parser.add_argument("--out", default="results", help="the folder of the numbers and tables")
    return parser.parse_args()


def main() -> None:
    """Runs the study and writes its numbers and tables."""
    args = parsed()
    command = shlex.join(["python", *sys.argv])
    try:
        results = run_study(study_of(args), command=command, say=lambda line: print(line, file=sys.stderr, flush=True))
    except DeltawError as error:
        sys.exit(f"fraud_study: {error}")
    out, name = Path(args.out), f"{args.task}-{'sweep' if args.sweep else 'study'}"
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for key, ending in (("table", "md"), ("report", "html")):
        shutil.copyfile(results[key], out / f"{name}.{ending}")
    for title, table in tables(results):
        print(f"\n{title}\n" + "\n".join(" | ".join(row) for row in table))
    if results["failed"]:
        sys.exit(f"{len(results['failed'])} of {results['cells']['all']} cells failed")


if __name__ == "__main__":
    main()
