"""`deltaw merge`: adapters into the weights of their base."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from deltaw.cli.console import Say, print_facts, print_json, print_table
from deltaw.cli.pages import EPILOG, Page, new_app
from deltaw.core.errors import InputError

app = new_app()


@app.command(name="merge", epilog=EPILOG, cls=Page)
def merge(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="a run folder: its base and its adapter.", show_default=False)
    ] = None,
    output: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="the folder to write: new, or empty.", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="the base; by default the one the run was trained on.", show_default=False),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER[=WEIGHT]",
            help="an adapter (or a run folder) and its weight, 1 by default; give it again for several",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="float32, bfloat16 or float16; by default the base's own.", show_default=False
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="what the model is for; by default what the run or the adapter says, else language modelling",
            show_default=False,
        ),
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(metavar="A,B,...", help="the classes of a classification model, in order.", show_default=False),
    ] = None,
    into: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="nf4 (4 bits), bf16, float16 or float32; by default as --dtype says, in 16 bits or more.",
            show_default=False,
        ),
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="into 4 bits: retain (keep what the layers compute) or requantize (the nearest codes).",
        ),
    ] = "retain",
    calibrate: Annotated[
        str,
        typer.Option(metavar="N", help="training rows that retain looks at; 0: it goes by the weights alone."),
    ] = "256",
    measure: Annotated[
        bool,
        typer.Option(
            "--measure/--no-measure",
            help="with 4 bits: measure base, adapter and merged model on the run's held-out rows. [default: yes]",
            show_default=False,
        ),
    ] = True,
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="nf4 where the adapters were trained on the base in 4 bits; by default as in their run.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(metavar="TEXT", help="auto, cpu or cuda, with 4 bits.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="print one JSON object.")] = False,
) -> None:
    """Write adapters into the weights of their base: a folder that plain transformers loads.

    deltaw merge runs/x --output merged
    deltaw merge runs/x --into nf4 --output merged-4bit
    deltaw merge --model M --adapter A --adapter B=0.3 --output merged

    Sums are taken in float32 and rounded once. A base that was trained on in 4 bits is merged as it was then.
    """
    from deltaw.cli.options import adapter_weight, split_commas, typed_number

    named = [adapter_weight(run)] if run is not None else []
    named += [adapter_weight(text) for text in adapter or ()]
    if not named:
        raise InputError("nothing to merge: give a run folder, or --model with --adapter")
    if output is None:
        raise InputError("no output: name the folder to write with --output")
    names = [part.strip() for text in labels for part in split_commas(text)] if labels else None
    rows = typed_number("--calibrate", calibrate, "int")
    assert isinstance(rows, int)
    from deltaw.studies.catalogue import fetch_model
    from deltaw.studies.merged import merge_into

    with Say() as say:
        if model is not None:
            fetch_model(model, progress=say.bytes)
        done = merge_into(
            output,
            adapters=named,
            model=model,
            task=task,
            labels=names,
            dtype=dtype,
            into=into,
            mode=mode,
            calibrate=rows,
            measure=measure,
            quantize=quantize,
            device=device,
            say=say,
        )
    if json:
        print_json(done)
    else:
        show(done)


def show(done: dict[str, Any]) -> None:
    """What was merged, and with 4 bits what of the adapter's effect is left."""
    from deltaw.report.tables import format_bytes

    rows = [["Adapter", "Weight", "Modules", "Parameters"]]
    rows += [[a["path"], f"{a['weight']:g}", f"{a['sites']:,}", f"{a['parameters']:,}"] for a in done["adapters"]]
    print_table("Merged", rows)
    print_facts(
        [
            ("Base", done["model"]),
            ("Class", done["class"]),
            ("Held in", done["into"]),
            ("Output", done["output"]),
            ("Size", format_bytes(done["output_bytes"])),
        ]
    )
    if "retention" in done:
        found = done["metrics"]
        head = ["Held-out metric", "Base", "Adapter", "Merged", "Retention"]
        figures = [
            [
                name.replace("_", " "),
                *(f"{found[when][name]:.4g}" for when in ("base", "adapter", "merged")),
                f"{kept:.3f}",
            ]
            for name, kept in done["retention"].items()
        ]
        print_table("What was kept: (merged - base) / (adapter - base)", [head, *figures])
    elif "layers" in done:
        print_facts([("Retention", "not measured: no held-out rows")])
    if "layers" in done:
        _show_layers(done)


def _show_layers(done: dict[str, Any], count: int = 5) -> None:
    layers = sorted(done["layers"].items(), key=lambda item: -(item[1]["update"] or 0.0))
    looked = done["calibration_tokens"]
    inputs = f"for the inputs of {looked:,} training tokens" if looked else "for inputs of all directions alike"
    head = ["Layer", "Error of output", "Error over update", "Update kept"]

    def row(name: str, errors: Mapping[str, float | None]) -> list[str]:
        return [name, *("" if value is None else f"{value:.3f}" for value in errors.values())]

    middle = {
        key: statistics.median(values) if (values := [e[key] for _, e in layers if e[key] is not None]) else None
        for key in ("relative", "update", "kept")
    }
    rows = [row(f"median of {len(layers)}", middle), *(row(name, errors) for name, errors in layers[:count])]
    print_table(f"Layers' outputs after {done['mode']}, {inputs}; the worst {min(count, len(layers))}", [head, *rows])
