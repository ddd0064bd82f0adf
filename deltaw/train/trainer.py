"""transformers' Trainer with what a run here promises: whole checkpoints, exact resuming, no step on a NaN."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from deltaw.checkpoint.adapters import adapter_state, load_state, write_state
from deltaw.core.errors import RunError
from deltaw.core.files import sync_folder
from deltaw.methods import adapter_parameters
from deltaw.methods.host import active_method
from deltaw.train.run_folder import RunFolder

EvaluateFn = Callable[[nn.Module], dict[str, float]]


class DeltawTrainer(transformers.Trainer):
    """The loop for one adapter (or the whole model, for full fine-tuning).

    Args:
        adapter: name of the adapter that is trained.
        run: where logs and checkpoints go.
        evaluate_fn: gives the metrics of the model as it is, by plain names (`loss`, `accuracy`).
        say: takes a line of progress.
    """

    def __init__(
        self,
        *args: Any,
        adapter: str,
        run: RunFolder,
        evaluate_fn: EvaluateFn | None,
        say: Callable[[str], None],
        keep_checkpoints: int,
        **kwargs: Any,
    ) -> None:
        self.adapter = adapter
        self.run_folder = run
        self.evaluate_fn = evaluate_fn
        self.say = say
        self.keep_checkpoints = keep_checkpoints
        self.whole_model = active_method(kwargs["model"], adapter).trains_base
        super().__init__(*args, **kwargs)
        self.remove_callback(transformers.PrinterCallback)
        self.remove_callback(transformers.ProgressCallback)
        self.add_callback(_Watch(self))
        self.tokens_seen = torch.zeros((), dtype=torch.long, device=self.args.device)
        self.finite = torch.ones((), dtype=torch.bool, device=self.args.device)
        self.seconds_before = 0.0
        self.began = time.perf_counter()

    # One step.

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """A micro-batch: counts tokens, and notes a loss that is not finite without waiting for the device."""
        mask = inputs.get("attention_mask")
        count = inputs["input_ids"].numel() if mask is None else mask.sum()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.tokens_seen += count
        self.finite &= torch.isfinite(loss)
        return loss

    def check_finite(self) -> None:
        """Stops before an update that a NaN would spoil."""
        if bool(self.finite):
            return
        last = self.run_folder.last_checkpoint()
        kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        raise RunError(
            f"the loss is NaN or infinite at step {self.state.global_step + 1}: {kept}; "
            "lower the learning rate, or look for broken rows"
        )

    def check_moved(self) -> None:
        """After the first update: every trained tensor must have had a gradient, or it is adapted in vain."""
        model = self.accelerator.unwrap_model(self.model)
        without = [
            name for name, p in adapter_parameters(model, self.adapter).items() if p.requires_grad and p.grad is None
        ]
        if without:
            raise RunError(
                f"{len(without)} trained tensors get no gradient ({without[0]}, ...): the model does not use the modules "
                "they sit on; leave those out of target_modules"
            )

    # Evaluation.

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The caller's metrics, in place of Trainer's mean over batches, which weighs short batches as long ones."""
        assert self.evaluate_fn is not None
        values = self.evaluate_fn(self.accelerator.unwrap_model(self.model))
        metrics = {f"eval_{name}": float(value) for name, value in values.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Checkpoints.

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Everything under another name first; the checkpoint has its own once it is complete."""
        step = self.state.global_step
        target = self.run_folder.checkpoints / f"checkpoint-{step}"
        staging = self.run_folder.checkpoints / f".checkpoint-{step}.tmp"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        if self.state.best_global_step == step:
            self.state.best_model_checkpoint = str(target)
        self.save_model(str(staging), _internal_call=True)
        self._save_optimizer_and_scheduler(str(staging))
        self._save_scaler(str(staging))
        self._save_rng_state(str(staging))
        if self.args.should_save:
            self._save_states(staging)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            sync_folder(staging)
            shutil.rmtree(target, ignore_errors=True)
            os.rename(staging, target)
            self._forget_old()
        self.accelerator.wait_for_everyone()

    def _save_states(self, folder: Path) -> None:
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, transformers.trainer_callback.ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()
        self.state.save_to_json(str(folder / "trainer_state.json"))
        own = {"tokens": int(self.tokens_seen), "seconds": self.seconds()}
        (folder / "deltaw.json").write_text(json.dumps(own))

    def _forget_old(self) -> None:
        found = []
        for child in self.run_folder.checkpoints.iterdir():
            match = re.fullmatch(r"checkpoint-(\d+)", child.name)
            if match:
                found.append((int(match[1]), child))
            elif child.name.startswith(".checkpoint-"):
                shutil.rmtree(child, ignore_errors=True)
        best = self.state.best_model_checkpoint
        for _, child in sorted(found)[: -self.keep_checkpoints]:
            if best is None or child.name != Path(best).name:
                shutil.rmtree(child, ignore_errors=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What is trained, and nothing of a frozen base."""
        assert output_dir is not None
        model = self.accelerator.unwrap_model(self.model)
        if self.whole_model:
            if self.args.should_save:
                model.save_pretrained(output_dir, safe_serialization=True)
            return
        state = adapter_state(model, self.adapter)
        if self.args.should_save:
            write_state(model, self.adapter, state, Path(output_dir) / "adapter")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.accelerator.unwrap_model(self.model if model is None else model)
        folder = Path(resume_from_checkpoint)
        if self.whole_model:
            _load_whole(target, folder)
        else:
            load_state(target, self.adapter, folder / "adapter")
        if model is None:
            own = json.loads((folder / "deltaw.json").read_text())
            self.tokens_seen += own["tokens"]
            self.seconds_before = own["seconds"]

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is not None:
            # The recorded path is of where the run was; the folder may have been moved since.
            self._load_from_checkpoint(str(self.run_folder.checkpoints / Path(best).name), self.model)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        best = self.state.best_model_checkpoint
        if best is not None:
            self.state.best_model_checkpoint = str(self.run_folder.checkpoints / Path(best).name)
        return super()._finalize_training(trial, num_train_samples, start_time)

    # Logs.

    def seconds(self) -> float:
        """Seconds of training, those before a resume included."""
        return self.seconds_before + time.perf_counter() - self.began

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A line of `metrics.jsonl`; Trainer's closing summary is left to `run.json`."""
        if "train_runtime" in logs:
            return
        step = self.state.global_step
        epoch = round(self.state.epoch, 6) if self.state.epoch is not None else 0.0
        line: dict[str, Any] = {"step": step, "epoch": epoch, **logs}
        if "loss" in logs:
            line |= {"tokens": int(self.tokens_seen), "elapsed_s": round(self.seconds(), 3)}
        if self.args.should_save:
            self.run_folder.log(line)
            self.say(_progress(line, self.state.max_steps))
        self.state.log_history.append({**logs, "step": step})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, {**logs, "epoch": epoch})


class _Watch(transformers.TrainerCallback):  # type: ignore[misc]
    """Ties the trainer's checks to the loop's events."""

    def __init__(self, trainer: DeltawTrainer) -> None:
        self.trainer = trainer
        self.checked = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.began = time.perf_counter()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        collator = self.trainer.data_collator
        if hasattr(collator, "set_epoch"):
            collator.set_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.check_finite()
        if not self.checked:
            self.trainer.check_moved()
            self.checked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A checkpoint holds no sums of losses: what was gathered is logged first, resumed or not.
        if control.should_save or control.should_evaluate:
            control.should_log = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save or control.should_evaluate:
            control.should_log = True


def _load_whole(model: nn.Module, folder: Path) -> None:
    from safetensors.torch import load_file

    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        state |= load_file(file)
    missing, unexpected = model.load_state_dict(state, strict=False)
    own = dict(model.named_parameters())
    lost = [key for key in missing if key in own]
    if lost or unexpected:
        raise RunError(f"{folder} does not hold this model: {[*lost, *unexpected][0]} is missing or unexpected")


def _progress(line: Mapping[str, Any], max_steps: int) -> str:
    parts = [f"step {line['step']}/{max_steps}"]
    names = {"loss": "loss", "learning_rate": "lr", "grad_norm": "grad norm"}
    for key, value in line.items():
        if key in names:
            parts.append(f"{names[key]} {value:.4g}")
        elif key.startswith("eval_"):
            parts.append(f"{key.removeprefix('eval_')} {value:.4g}")
    if "elapsed_s" in line and line["elapsed_s"] > 0:
        parts.append(f"{line['tokens'] / line['elapsed_s']:.0f} tokens/s")
    return "  ".join(parts)
