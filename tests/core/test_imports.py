"""Imports point to strictly lower floors, as docs/architecture.md has it; importing the package is light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "deltaw"
FILES = sorted(PACKAGE.rglob("*.py"))


def documented_floors():
    """{room: floor} from the page's drawing, whose last line is the ground."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    lines = re.search(r"```\n(.*?)```", page, re.DOTALL)[1].strip().splitlines()
    # Prose about a room stands after the names, apart by more than the names are.
    rooms = [re.split(r"\s{12,}", line)[0].split() for line in lines]
    return {room: len(rooms) - floor for floor, names in enumerate(rooms) for room in names}


FLOORS = documented_floors()


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(source, path):
    """(line, room) of every import of deltaw in a file, wherever in it; relative ones are resolved."""
    package = ["deltaw", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (start, node.module) if part)
            modules = [f"{module}.{alias.name}" for alias in node.names] if module == "deltaw" else [module]
        else:
            continue
        for module in modules:
            if module.split(".")[0] == "deltaw":
                yield node.lineno, [*module.split("."), "deltaw"][1]


def violations(source, path, floors=FLOORS):
    own = room_of(path)
    for line, room in imported_rooms(source, path):
        if room in (own, "__version__") or own == "__init__":
            continue
        if room not in floors:
            yield f"{path}:{line} imports deltaw.{room}, which is no room"
        elif floors[room] >= floors[own]:
            yield f"{path}:{line}: {own} (floor {floors[own]}) imports {room} (floor {floors[room]})"


def test_the_page_names_every_room_and_no_other():
    rooms = {room_of(path) for path in FILES} - {"__init__", "__main__"}
    assert rooms <= set(FLOORS)
    assert {"core", "kernels", "models", "methods", "checkpoint"} <= rooms
    assert FLOORS["core"] < FLOORS["kernels"] == FLOORS["models"] < FLOORS["methods"] == FLOORS["data"]
    assert FLOORS["methods"] == FLOORS["report"] < FLOORS["checkpoint"] == FLOORS["fuse"] < FLOORS["train"]
    assert FLOORS["train"] == FLOORS["evaluate"] < FLOORS["studies"] < FLOORS["cli"]


def test_imports_point_downward_only():
    assert len(FILES) > 20
    assert [each for path in FILES for each in violations(path.read_text(encoding="utf-8"), path)] == []


@pytest.mark.parametrize(
    "source",
    [
        "from deltaw.methods import LoRA",
        "import deltaw.methods.host",
        "from deltaw import methods",
        "from ..methods import LoRA",
        "def f():\n    from deltaw.methods.host import adapt",
        "from deltaw.kernels.lora_linear import lora_linear",
        "from deltaw import LoRA",
    ],
)
def test_upward_and_sideways_imports_are_found(source):
    assert list(violations(source, PACKAGE / "models" / "sites.py"))


@pytest.mark.parametrize(
    "source",
    ["from deltaw.core.errors import InputError", "from . import targets", "import torch", "from .sites import x"],
)
def test_downward_imports_pass(source):
    assert not list(violations(source, PACKAGE / "models" / "sites.py"))


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout.strip()


def test_importing_the_package_loads_no_heavy_library():
    heavy = "torch transformers datasets sklearn matplotlib numpy peft accelerate typer safetensors gguf yaml"
    code = f"import sys, deltaw; print([name for name in '{heavy}'.split() if name in sys.modules])"
    assert run_python(code) == "[]"


def test_importing_after_torch_takes_under_300_ms():
    code = (
        "import torch, time; began = time.perf_counter(); import deltaw; "
        "from deltaw import InputError; print(time.perf_counter() - began)"
    )
    assert min(float(run_python(code)) for _ in range(2)) < 0.3


def test_every_public_name_is_there_and_an_unknown_one_is_not():
    import deltaw

    names = [name for name in deltaw.__all__ if not name.startswith("__")]
    assert len(names) > 20 and [name for name in names if not hasattr(deltaw, name)] == []
    assert set(deltaw.__all__) <= set(dir(deltaw))
    with pytest.raises(AttributeError, match="no attribute 'lora'"):
        _ = deltaw.lora


def test_no_public_name_is_a_room_too():
    import deltaw

    assert set(deltaw.__all__) & {room_of(path) for path in FILES} <= {"__init__"}
