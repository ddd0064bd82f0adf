"""Methods on equal terms: every cell of a grid in a process of its own, then tables, intervals and one page.

The whole story is `compare`. What is on the disk is the state: a comparison that was cut short, changed or extended is
gone on with by the same command.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deltaw.core.errors import InputError, near
from deltaw.core.files import explain_os_error, write_json
from deltaw.models.packages import Progress
from deltaw.report.comparison import write_comparison
from deltaw.studies.compare_cells import PLAN, cell_record, general_documents, missing_measurements, read_plan_file
from deltaw.studies.compare_plan import Cell, Plan, read_plan
from deltaw.studies.compare_results import RESULTS, collect, earlier_failures
from deltaw.train import RunFolder

Say = Callable[[str], None]

#: How a cell's process is started; the comparison's folder and the cell's name follow.
WORKER = (sys.executable, "-c", "from deltaw.cli.main import run; run()", "compare", "--cell")
#: Seconds that a cell gets to record that it was stopped.
_GRACE_S = 30.0


def compare(
    file: str | Path,
    *,
    output: str | None = None,
    parallel: int | None = None,
    only: Sequence[str] = (),
    fresh: bool = False,
    report_only: bool = False,
    data_root: str | None = None,
    command: str = "",
    say: Say = lambda line: None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Runs a comparison's unfinished cells and writes `table.md`, `results.json` and `report.html`.

    Args:
        file: the comparison's YAML file.
        output: its folder, in place of the file's `output`.
        parallel: cells at a time, in place of the file's.
        only: patterns of cells to run (`lora/*`, `tfns/lora/seed-0`); () runs all. The tables have whatever is done.
        fresh: begin the chosen cells anew.
        report_only: run nothing; write the tables of what is there.
        data_root: the folder that relative paths of rows start from; None means the file's own.
        command: what was typed, for the record.
        say: takes lines of progress.
        progress: told of downloads.

    Returns:
        What `results.json` has: `groups`, `significance`, `failed`, `missing` cells, notes.

    Raises:
        InputError: a configuration that is wrong, before any cell runs; cells that were made with another one.
    """
    plan = read_plan(file, output=output, parallel=parallel, data_root=data_root, command=command, progress=progress)
    with _locked(Path(plan.output)):
        told = earlier_failures(Path(plan.output))
        failed = {name: found for name, found in told.items() if name in plan.cells}
        if not report_only:
            chosen = chosen_cells(plan, only)
            settle(plan, chosen, fresh=fresh)
            if plan.text is not None:
                # Fetched once, and missed before any cell runs.
                general_documents(plan.text["text"])
            waiting = [name for name in chosen if not is_done(plan, plan.cells[name])]
            say(f"{len(plan.cells)} cells, {len(waiting)} to run, {plan.parallel} at a time, in {plan.output}")
            for name in chosen:
                failed.pop(name, None)
            failed |= run_cells(plan, waiting, say=say)
        results = collect(plan, failed, is_done=is_done)
        write_json(Path(plan.output) / RESULTS, results)
        write_comparison(plan.output, results)
    return results


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two comparisons in one folder would train each cell twice at once."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = [entry.name for entry in folder.iterdir() if entry.name not in (".lock", PLAN)]
        if others and not (folder / PLAN).is_file():
            raise InputError(f"{folder} is not empty and holds no comparison: choose another output")
        with open(folder / ".lock", "w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"another process is at the comparison in {folder}: wait for it, or end it") from None
            yield
    except OSError as error:
        raise explain_os_error(error, error.filename or folder) from error


def chosen_cells(plan: Plan, only: Sequence[str]) -> list[str]:
    """The cells whose name, with or without its data set, matches one of the patterns; all where there are none.

    Raises:
        InputError: a pattern that matches nothing.
    """
    if not only:
        return list(plan.cells)
    found: set[str] = set()
    for pattern in only:
        names = [
            name
            for name in plan.cells
            if any(
                fnmatch.fnmatchcase(part, pattern)
                for part in (name, name.partition("/")[2], name.rpartition("/")[0], name.split("/")[1])
            )
        ]
        if not names:
            close = near(pattern, plan.cells) or list(plan.cells)[:3]
            raise InputError(f"--only {pattern} matches no cell: there are {', '.join(close)}, ...")
        found.update(names)
    return [name for name in plan.cells if name in found]


def settle(plan: Plan, chosen: Sequence[str], *, fresh: bool) -> None:
    """Checks that cells on the disk are those of this plan, and writes the plan for the cells' processes.

    Raises:
        InputError: a cell that was made with another configuration.
    """
    folder = Path(plan.output)
    known: dict[str, dict[str, Any]] = {}
    if (folder / PLAN).is_file():
        cells = read_plan_file(folder).cells
        # Cells that the file no longer has stay on the disk, to be found should it have them again.
        known = json.loads((folder / PLAN).read_text(encoding="utf-8"))["retired"]
        known |= {name: cell.setup for name, cell in cells.items()}
    for name in chosen if fresh else ():
        shutil.rmtree(plan.folder(plan.cells[name]), ignore_errors=True)
    for name, cell in plan.cells.items():
        difference = differing(known[name], cell.setup) if name in known and plan.folder(cell).exists() else ""
        if difference:
            raise InputError(
                f"cell {name} was made with {difference}: choose another --output, or begin it anew with "
                f"--fresh --only {shlex.quote(name)}"
            )
    retired = {name: setup for name, setup in known.items() if name not in plan.cells}
    write_json(folder / PLAN, {**plan.record(), "retired": retired})


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first key in which two setups differ, in words; "" where they agree."""
    for key in [*new, *(key for key in old if key not in new)]:
        if old.get(key) != new.get(key):
            if str(old.get(key)).startswith("sha256 ") and str(new.get(key)).startswith("sha256 "):
                return f"other rows in {key} than the file now has"
            return f"{key} {old.get(key)!r}, and the comparison now says {new.get(key)!r}"
    return ""


def is_done(plan: Plan, cell: Cell) -> bool:
    """Whether a cell has its run and every measurement."""
    folder = plan.folder(cell)
    record = cell_record(folder)
    if record is None or missing_measurements(plan, cell, record):
        return False
    return cell.bare or RunFolder.open(folder, writes=False).record.get("status") == "done"


# Processes.


class _Worker:
    """A cell's process and its log, which is read while it grows."""

    def __init__(self, name: str, slot: int, process: subprocess.Popen[bytes], log: Path, begin: int) -> None:
        self.name = name
        self.slot = slot
        self.process = process
        self.log = log
        self.began = time.perf_counter()
        self.error = ""
        self._place = begin

    def follow(self, tell: Say | None) -> None:
        """Takes note of the whole lines that the process has written since."""
        with open(self.log, "rb") as log:
            log.seek(self._place)
            whole, end, _ = log.read().rpartition(b"\n")
        self._place += len(whole) + len(end)
        for line in whole.decode("utf-8", errors="replace").splitlines():
            if line.startswith("deltaw: "):
                self.error = line.removeprefix("deltaw: ").strip()
            elif tell is not None:
                tell(line)

    def close(self) -> int:
        """Waits for the end; the exit code."""
        code = self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        return code


def run_cells(
    plan: Plan, names: Sequence[str], *, say: Say = lambda line: None, worker: Sequence[str] = WORKER
) -> dict[str, dict[str, Any]]:
    """Runs cells, each in a process of its own, `plan.parallel` at a time; a failed one does not stop the others.

    Args:
        plan: the comparison, as its `plan.json` has it.
        names: the cells, in this order.
        say: takes lines of progress.
        worker: the command of a cell's process, without the folder and the name.

    Returns:
        What failed: its `error` and `exit_code` by name.
    """
    queue, running, failed = deque(names), list[_Worker](), dict[str, dict[str, Any]]()
    finished = 0
    try:
        while queue or running:
            while queue and len(running) < plan.parallel:
                slot = min(set(range(plan.parallel)) - {one.slot for one in running})
                running.append(_start(plan, queue.popleft(), slot, worker, say))
            tell = say if plan.parallel == 1 else None
            for one in list(running):
                ended = one.process.poll() is not None
                one.follow(tell)
                if not ended:
                    continue
                running.remove(one)
                code = one.close()
                finished += 1
                outcome = f"done in {time.perf_counter() - one.began:.0f} s"
                if code:
                    failed[one.name] = {"error": one.error or _ended(code), "exit_code": code}
                    outcome = f"failed: {failed[one.name]['error']} (log: {one.log})"
                say(f"[{finished}/{len(names)}] {one.name}: {outcome}")
            time.sleep(0.05)
    finally:
        _stop(running)
    return failed


def _start(plan: Plan, name: str, slot: int, worker: Sequence[str], say: Say) -> _Worker:
    log = Path(plan.output) / "logs" / f"{name.replace('/', '--')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        begin = file.tell()
        process = subprocess.Popen(
            [*worker, name, plan.output],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=file,
            env={**os.environ, **_environment(plan.parallel, slot)},
            # Ctrl-C is for this process, which then ends the cells one by one.
            start_new_session=True,
        )
    say(f"{name}: started")
    return _Worker(name, slot, process, log, begin)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _environment(parallel: int, slot: int) -> dict[str, str]:
    """Cells at one time divide the cores, and of several GPUs each takes one."""
    if parallel == 1:
        return {}
    import torch

    found = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // parallel)))}
    gpus = torch.cuda.device_count()
    if gpus > 1:
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = given.split(",") if given else [str(index) for index in range(gpus)]
        found["CUDA_VISIBLE_DEVICES"] = names[slot % len(names)]
    return found


def _ended(code: int) -> str:
    if code < 0:
        hint = " (the system ends processes so where memory is short)" if code == -9 else ""
        return f"ended by signal {-code}{hint}"
    return f"ended with exit code {code}"


def _stop(running: Sequence[_Worker]) -> None:
    """Ends processes so that they record it, and those that do not end, for good."""
    for one in running:
        one.process.terminate()
    deadline = time.monotonic() + _GRACE_S
    for one in running:
        try:
            one.process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            one.process.kill()
        one.close()
