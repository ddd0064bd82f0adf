"""What torchrun starts in the tests of distributed training: jobs from a JSON file, one after another.

A job is a dictionary: `keys` of a run or the folder to `resume`; `stop_at` a step before which every process stops;
`poison` a process whose loss becomes NaN at a step; `fused` AdamW, as on GPUs. What the processes wrote, said and
raised goes into `log`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


class Stopped(BaseException):
    """Stands for the death of the processes."""


def main(file: str) -> None:
    from transformers.training_args import OptimizerNames

    from deltaw.core.errors import DeltawError
    from deltaw.studies.job import resume
    from deltaw.studies.job import run_training as train
    from deltaw.train import loop
    from deltaw.train.sharding import local_part
    from deltaw.train.trainer import DeltawTrainer

    spec = json.loads(Path(file).read_text())
    rank = int(os.environ["RANK"])
    own, arguments = DeltawTrainer.training_step, loop.training_arguments
    written: set[str] = set()
    watch(spec["root"], written)
    log = []
    for job in spec["jobs"]:
        written.clear()

        entry: dict[str, Any] = {"said": []}

        def step(self: Any, *args: Any, job: Any = job, entry: Any = entry, **kwargs: Any) -> Any:
            # Of the base, or of all where all is trained.
            counted = [p for p in self.model.parameters() if not p.requires_grad or self.whole_model]
            entry["share"] = sum(local_part(p).numel() for p in counted) / sum(p.numel() for p in counted)
            trained = [p for p in self.model.parameters() if p.requires_grad]
            entry["trained share"] = sum(local_part(p).numel() for p in trained) / sum(p.numel() for p in trained)
            entry["steps"] = self.state.global_step + 1
            if self.state.global_step == job.get("stop_at"):
                raise Stopped
            loss = own(self, *args, **kwargs)
            if [rank, self.state.global_step] == job.get("poison"):
                self.finite &= False
            return loss

        def optimizer(*args: Any, job: Any = job, **kwargs: Any) -> Any:
            made = arguments(*args, **kwargs)
            if job.get("fused"):
                made.optim = OptimizerNames.ADAMW_TORCH_FUSED
            return made

        DeltawTrainer.training_step, loop.training_arguments = step, optimizer
        say = entry["said"].append
        try:
            if "resume" in job:
                resume(job["resume"], say=say)
            else:
                train(say=say, **job["keys"])
        except (DeltawError, Stopped) as error:
            entry["error"] = f"{type(error).__name__}: {error}"
        log.append(entry | {"written": sorted(written)})
    (Path(spec["root"]) / f"log-{rank}.json").write_text(json.dumps(log))


def watch(root: str, written: set[str]) -> None:
    """Notes what this process opens to write, renames or removes below `root`."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = args
            writes = any(c in mode for c in "wax+") if isinstance(mode, str) else flags & (os.O_WRONLY | os.O_RDWR)
        else:
            path, writes = args[0] if args else None, event in ("os.rename", "os.remove", "shutil.rmtree")
        if writes and isinstance(path, str | os.PathLike) and os.fspath(path).startswith(root):
            written.add(os.path.relpath(path, root))

    sys.addaudithook(hook)


if __name__ == "__main__":
    main(sys.argv[1])
