"""`deltaw quantize`: a model into a folder in 4 bits."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from deltaw.cli.console import Say, print_facts, print_json, print_table
from deltaw.cli.pages import EPILOG, Page, new_app
from deltaw.core.errors import InputError

app = new_app()


@app.command(name="quantize", epilog=EPILOG, cls=Page)
def quantize(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="an embedded name, a folder, a .gguf file or a hub id; or a run folder, which is merged.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="the folder to write: new, or empty.", show_default=False)
    ] = None,
    double_quant: Annotated[
        bool,
        typer.Option(
            "--double-quant/--no-double-quant",
            help="store the scales in 8 bits: 4.127 bits a parameter instead of 4.5 [default: on]",
        ),
    ] = True,
    block_size: Annotated[
        int, typer.Option("--block-size", metavar="N", help="values that share a scale [default: 64]")
    ] = 64,
    head: Annotated[bool, typer.Option("--head", help="quantise the output head too.")] = False,
    skip_modules: Annotated[
        list[str] | None,
        typer.Option(metavar="A,B,...", help="modules to leave as they are, by the ends of paths", show_default=False),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="of what stays: float32, bfloat16 or float16; auto: as stored, bfloat16 for float32 [default: auto]",
        ),
    ] = "auto",
    device: Annotated[
        str, typer.Option(metavar="TEXT", help="auto, cpu, cuda or cuda:N, to compute the codes [default: auto]")
    ] = "auto",
    task: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="what the model is for; by default what its architecture says", show_default=False
        ),
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(metavar="A,B,...", help="the classes of a classification model, in order.", show_default=False),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print one JSON object.")] = False,
) -> None:
    """Write a model in 4 bits (NF4): a folder that transformers with bitsandbytes loads, and vLLM, and deltaw.

    deltaw quantize smollm2-135m --output smollm2-nf4
    deltaw quantize M --output F --no-double-quant --skip-modules down_proj
    deltaw quantize runs/x --output F

    A run is written merged into its base, as deltaw export --to bnb does. A model's tensors are read and quantised one
    by one: it needs less memory here than its 16-bit weights take.
    """
    from deltaw.cli.options import split_commas

    if model is None:
        raise InputError("nothing to quantise: give a model (an embedded name, a folder, a .gguf file or a hub id)")
    if output is None:
        raise InputError("no output: name the folder to write with --output")
    skipped, names = (
        [part.strip() for text in given or () for part in split_commas(text)] for given in (skip_modules, labels)
    )
    from deltaw.quant import NF4
    from deltaw.studies.catalogue import fetch_model
    from deltaw.studies.export import export_into, quantize_into
    from deltaw.studies.ship import run_of_adapter

    if run_of_adapter(model) is not None:
        plain = (
            double_quant and block_size == 64 and not (head or skipped or names or task) and dtype == device == "auto"
        )
        if not plain:
            raise InputError(f"{model} is a run, whose base and task are known: give --output and --json alone")
        from deltaw.cli.merge import show as show_merge

        with Say() as say:
            done = export_into(output, to="bnb", run=model, say=say)
        if json:
            print_json(done)
        else:
            show_merge(done)
        return
    config = NF4(double_quant=double_quant, block_size=block_size, head=head, skip_modules=skipped)
    with Say() as say:
        fetch_model(model, progress=say.bytes)
        done = quantize_into(
            output,
            model=model,
            quantize=config,
            task=task,
            labels=names or None,
            dtype=dtype,
            device=device,
            say=say,
        )
    if json:
        print_json(done)
    else:
        show(done)


def show(done: dict[str, Any]) -> None:
    """What a model became, on stdout."""
    from deltaw.report.tables import format_bytes

    rows = [["What", "Held in", "Tensors", "Parameters", "Bytes", "Bits a parameter"]]
    packed = {"tensors": done["matrices"], "parameters": done["parameters"], "bytes": done["bytes"]}
    parts = [("matrices", "NF4", packed), *((name, done["dtype"], part) for name, part in done["kept"].items())]
    for name, held, part in parts:
        bits = f"{8 * part['bytes'] / part['parameters']:.3f}"
        counts = [f"{part['tensors']:,}", f"{part['parameters']:,}", format_bytes(part["bytes"])]
        rows.append([name.capitalize(), held, *counts, bits])
    print_table("Quantised", rows)
    scales = "8 bits" if done["double_quant"] else "32 bits"
    before, after = (format_bytes(done[key]) for key in ("source_bytes", "weights_bytes"))
    print_facts(
        [
            ("Model", done["model"]),
            ("Class", done["class"]),
            ("Blocks", f"{done['block_size']} values, scales in {scales}"),
            ("Output", done["output"]),
            ("Weights", f"{after}, before {before}"),
            ("Peak memory", format_bytes(done["peak_memory_bytes"])),
        ]
    )
