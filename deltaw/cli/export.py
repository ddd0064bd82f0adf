"""`deltaw export`: a run into the form that another program takes."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from deltaw.cli.console import Say, print_facts, print_json
from deltaw.cli.pages import EPILOG, Page, new_app
from deltaw.core.errors import InputError

app = new_app()


@app.command(name="export", epilog=EPILOG, cls=Page)
def export(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="a run folder: its base and its adapter.", show_default=False)
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="FORM",
            help="hf: the merged model for transformers; bnb: the same in 4 bits for bitsandbytes; "
            "vllm: the adapter as vLLM serves it beside its base; lora: the adapter as plain LoRA",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="the folder to write: new, or empty.", show_default=False)
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="an adapter (PEFT's too), in place of a run.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="the base; by default the one the run was trained on.", show_default=False),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="what vLLM's requests call the adapter; by default as its folder is called",
            show_default=False,
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print one JSON object.")] = False,
) -> None:
    """Write a run for transformers (hf), vLLM or bitsandbytes (bnb), or its adapter as LoRA for all else (lora).

    deltaw export runs/x --to hf --output merged
    deltaw export runs/x --to vllm --output served
    deltaw export --adapter A --model M --to bnb --output merged-nf4
    deltaw export runs/adalora --to lora --output plain

    For vLLM every module gets one rank and one scale, as it reads no others; what the adapter computes stays the same.
    """
    if to is None:
        raise InputError("no form to export to: give --to hf, --to vllm, --to bnb or --to lora")
    if output is None:
        raise InputError("no output: name the folder to write with --output")
    if run is not None and adapter is not None:
        raise InputError(f"both the run {run} and --adapter {adapter} were given: give one")
    from deltaw.studies.catalogue import fetch_model
    from deltaw.studies.export import export_into

    with Say() as say:
        if model is not None:
            fetch_model(model, progress=say.bytes)
        done = export_into(output, to=to, run=run, adapter=adapter, model=model, name=name, say=say)
    if json:
        print_json(done)
    elif to == "vllm":
        _show_served(done)
    elif to == "lora":
        _show_plain(done)
    elif "matrices" in done:
        from deltaw.cli.quantize import show as show_quantized

        show_quantized(done)
    elif done["adapters"]:
        from deltaw.cli.merge import show as show_merged

        show_merged(done)
    else:
        _show_copied(done)


def _show_served(done: dict[str, Any]) -> None:
    from deltaw.report.tables import format_bytes

    changed = [
        f"{done[key]:,} {what}"
        for key, what in (("padded", "filled up with zeros"), ("rescaled", "with another scale, now in B"))
        if done[key]
    ]
    facts = [
        ("Adapter", done["adapter"]),
        ("Base", done["model"]),
        ("Rank", str(done["r"])),
        ("Alpha", f"{done['alpha']:g}"),
        ("Modules", ", ".join([f"{done['sites']:,}", *changed])),
        ("Dtype", done["dtype"]),
        ("Output", done["output"]),
        ("Size", format_bytes(done["output_bytes"])),
        ("Model in requests", done["name"]),
        ("Serve with", done["command"]),
        ("Note", done.get("note", "")),
    ]
    print_facts([(name, value) for name, value in facts if value])


def _show_plain(done: dict[str, Any]) -> None:
    from deltaw.report.tables import format_bytes

    low, high = done["ranks"]
    dropped = [f"{done['dropped']:,} of rank 0 left out"] if done["dropped"] else []
    facts = [
        ("Adapter", f"{done['adapter']} ({done['method']})"),
        ("Base", done["model"]),
        ("Modules", ", ".join([f"{done['sites']:,}", *dropped])),
        ("Rank", str(low) if low == high else f"{low} to {high}"),
        ("Parameters", f"{done['parameters']:,}"),
        ("Output", done["output"]),
        ("Size", format_bytes(done["output_bytes"])),
    ]
    print_facts(facts)


def _show_copied(done: dict[str, Any]) -> None:
    from deltaw.report.tables import format_bytes

    print_facts(
        [
            ("Copied", f"{done['model']}, as the run trained the whole model"),
            ("Dtype", done["dtype"]),
            ("Output", done["output"]),
            ("Size", format_bytes(done["output_bytes"])),
        ]
    )
