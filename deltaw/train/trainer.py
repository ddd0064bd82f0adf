"""transformers' Trainer with what a run here promises: whole checkpoints, exact resuming, no step on a NaN."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from deltaw.checkpoint.adapters import adapter_state, write_state
from deltaw.core.errors import InputError, RunError
from deltaw.core.files import sync_folder
from deltaw.fuse.decoder import set_turn
from deltaw.methods import adapter_parameters
from deltaw.methods.contract import Controller
from deltaw.methods.host import active_method, parts_of, steady_parts
from deltaw.quant.paged import PagedAdamW, paged_optimizer
from deltaw.train.finite import Breaks
from deltaw.train.groups import parameter_groups, rate_ratios
from deltaw.train.losses import SummedLoss
from deltaw.train.order import StepOrder
from deltaw.train.private import MicroBatch, PoissonBatches, PrivacyPlan, PrivateGradients
from deltaw.train.run_folder import RunFolder
from deltaw.train.sharding import (
    average_gradients,
    is_sharded,
    load_adapter_weights,
    load_model_weights,
    load_optimizer,
    local_part,
    optimizer_state,
    whole_state,
)
from deltaw.train.watch import Watch

EvaluateFn = Callable[[nn.Module], dict[str, float]]


class DeltawTrainer(transformers.Trainer):
    """The loop for one adapter (or the whole model, for full fine-tuning).

    Args:
        adapter: name of the adapter that is trained.
        run: where logs and checkpoints go.
        evaluate_fn: gives the metrics of the model as it is, by plain names (`loss`, `accuracy`).
        say: takes a line of progress.
        keep_checkpoints: how many to keep besides the best.
        autocast: whether to compute in bfloat16 with weights in float32.
        optimizer_name: `adamw`, or one of the paged ones.
        merge_aware: share of the steps, the last ones, that train through the merged and rounded weights.
        turns: whether fused layers are told which step it is, by which they round 8-bit weights.
        private: how to train with differential privacy; None: without. No loss is logged then, and no count of tokens.
    """

    #: The loss is divided by the tokens of the whole step, not once more by the number of its micro-batches.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        adapter: str,
        run: RunFolder,
        evaluate_fn: EvaluateFn | None,
        say: Callable[[str], None],
        keep_checkpoints: int,
        autocast: bool,
        optimizer_name: str = "adamw",
        merge_aware: float = 0.0,
        turns: bool = False,
        private: PrivacyPlan | None = None,
        **kwargs: Any,
    ) -> None:
        self.adapter = adapter
        self.run_folder = run
        self.evaluate_fn = evaluate_fn
        self.say = say
        self.keep_checkpoints = keep_checkpoints
        self.autocast = autocast
        self.optimizer_name = optimizer_name
        self.merge_aware, self.turns = merge_aware, turns
        self.method = active_method(kwargs["model"], adapter)
        self.whole_model = self.method.trains_base
        own = {} if self.whole_model else adapter_parameters(kwargs["model"], adapter)
        #: What was trained, as it was at first, in host memory; copies of the whole model would cost too much.
        trained = {name: local_part(p).detach() for name, p in own.items() if p.requires_grad}
        self.at_first = {name: values.to("cpu", copy=True) for name, values in trained.items()}
        self.controller: Controller | None = None
        self.controller_state: dict[str, Any] | None = None
        adapted = [part for _, _, part in parts_of(kwargs["model"], adapter)]
        self.steady = steady_parts(kwargs["model"])
        self.extra_losses = [part.extra_loss for part in adapted if hasattr(part, "extra_loss")]
        # A copy that the host waits for would wait for all that the device has still to do.
        kwargs["args"].accelerator_config.non_blocking = kwargs["args"].dataloader_pin_memory
        super().__init__(*args, **kwargs)
        self.remove_callback(transformers.PrinterCallback)
        self.remove_callback(transformers.ProgressCallback)
        self.add_callback(Watch(self))
        self.model_accepts_loss_kwargs = True
        self.task: str = kwargs["data_collator"].task
        step_rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        self.lengths = [len(example["input_ids"]) for example in kwargs["train_dataset"]]
        self.order = StepOrder(self.lengths, step_rows=step_rows, seed=self.args.data_seed or 0)
        self.summed_loss = SummedLoss(kwargs["model"], self.task)
        self.private = private
        self.private_gradients: PrivateGradients | None = None
        if private is not None:
            self.private_gradients = PrivateGradients(kwargs["model"], adapter, private, self.summed_loss)
        self.tokens_seen = torch.zeros((), dtype=torch.long, device=self.args.device)
        self.tokens_before = 0
        self.finite = torch.ones((), dtype=torch.bool, device=self.args.device)
        self.breaks = Breaks(self.args.device)
        self.grad_norm: Any = None
        #: Whatever of the model is trained, for which Trainer would walk all modules several times a step.
        self.trained: list[nn.Parameter] = []
        #: Whether the base is sharded and what is trained is whole in every process.
        self.averages = is_sharded(kwargs["model"]) and not self.whole_model
        self.epoch_iterator: Any = None
        #: An epoch's iterator, and the next step's batches from it with their number of labels.
        self.ahead: tuple[Any, Any] = (None, None)
        self.seconds_before = 0.0
        self.began = time.perf_counter()

    def _get_train_sampler(self, train_dataset: Any = None) -> StepOrder:
        return self.order

    def get_train_dataloader(self) -> Any:
        """Trainer's own; of a private run, one that draws a step's units."""
        if self.private is None or self.private_gradients is None:
            return super().get_train_dataloader()
        return PoissonBatches(
            self.private,
            self.lengths,
            steps=math.ceil(1 / self.private.sampling_rate),
            micro_batch_size=self.args.per_device_train_batch_size,
            noise=self.private_gradients.noise,
        )

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not is_sharded(model):
            super()._move_model_to_device(model, device)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Trainer's own, but where parts have learning rates of their own, or states stand in host memory."""
        whole: Any = self.accelerator.unwrap_model(model or self.model)
        ratios = rate_ratios(whole, self.adapter)
        if self.optimizer is None and (self.optimizer_name != "adamw" or ratios):
            groups = parameter_groups(
                adapter_parameters(whole, self.adapter),
                ratios,
                decayed=set(self.get_decay_parameter_names(whole)),
                learning_rate=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
            )
            if self.optimizer_name == "adamw":
                kind, options = self.get_optimizer_cls_and_kwargs(self.args, whole)
                self.optimizer = kind(groups, **options)
                return super().create_optimizer(model)
            self.optimizer, line = paged_optimizer(
                self.optimizer_name,
                groups,
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                # The two backends' states are no use to each other: a resumed run keeps its own.
                backend=self.run_folder.record.get("optimizer_backend", "auto"),
            )
            own = isinstance(self.optimizer, PagedAdamW)
            # At once: a run that is killed must find it when it is resumed.
            self.run_folder.save(optimizer_backend="own" if own else "bitsandbytes")
            self.say(line)
        return super().create_optimizer(model)

    # One step.

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own, and the model afterwards as it was."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.model_wrapped.__dict__.pop("zero_grad", None)

    def begin(self) -> None:
        """Everything is prepared and the first step comes next."""
        model: Any = self.model_wrapped
        model.train()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        # Of 32 layers with 448 trained tensors, walking for this, clipping and `train` takes half of the host's time
        # between two steps.
        model.zero_grad = functools.partial(_forget_gradients, self.trained)
        self.take_control()
        self.began = time.perf_counter()

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """A step's batches and how many labels they have: what `fetch_ahead` made, where it did."""
        (source, found), self.ahead = self.ahead, (None, None)
        self.epoch_iterator = epoch_iterator
        return found if source is epoch_iterator else super().get_batch_samples(epoch_iterator, num_batches, device)

    def fetch_ahead(self) -> None:
        """Makes the next step's batches while the device is busy with this one."""
        # A private step is drawn when it is due, and the last one is followed by none.
        if self.private is None and self.state.global_step + 1 < self.state.max_steps:
            source, args = self.epoch_iterator, self.args
            # Nothing, at an epoch's end: the next one has an iterator of its own.
            self.ahead = source, super().get_batch_samples(source, args.gradient_accumulation_steps, args.device)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor:
        """Labels that carry loss, of a whole step over all processes; at least 1, so that none means a loss of 0."""
        if self.private is not None or not batch_samples:
            return torch.ones((), dtype=torch.long, device=device)
        counts = [self.summed_loss.counts(batch["labels"]).sum() for batch in batch_samples]
        count = torch.stack(counts).sum().to(device)
        return self.summed(count).clamp(min=1)

    def summed(self, value: Tensor) -> Tensor:
        """The sum over all processes, every one of which has to ask."""
        if self.args.world_size == 1:
            return value
        total: Tensor = self.accelerator.reduce(value, reduction="sum")
        return total

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss summed over labels, divided by how many the whole step has: how rows are batched changes nothing."""
        # Not accelerate's autocast, which replaces the model's forward for good.
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.summed_loss(model, inputs, over=num_items_in_batch)
        # Processes' gradients are averaged, and their labels are counted together.
        loss = loss * self.args.world_size
        if self.extra_losses:
            extra = torch.stack([one() for one in self.extra_losses]).sum() / self.current_gradient_accumulation_steps
            # Its gradient counts; logs show the loss of the task.
            loss = loss + (extra - extra.detach()).to(loss.dtype)
        return loss

    def _private_step(self, model: Any, drawn: list[MicroBatch]) -> Tensor:
        """A whole step; its loss is told to nobody."""
        assert self.private_gradients is not None
        self._train_mode(model)
        rows: Any = self.train_dataset
        batches = [(micro, self._prepare_inputs(self.data_collator([rows[i] for i in micro.rows]))) for micro in drawn]
        extra = (lambda: torch.stack([one() for one in self.extra_losses]).sum()) if self.extra_losses else None
        self.private_gradients(batches, extra=extra, autocast=self.autocast)
        return torch.zeros((), device=self.args.device)

    def floating_point_ops(self, inputs: Any) -> int:
        """Nothing reads it; of a private run's batches Trainer could not make it."""
        return 0

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """A micro-batch: counts tokens, and notes a loss that is not finite without waiting for the device."""
        if self.turns:
            assert isinstance(self.model, nn.Module)
            set_turn(self.model, self.state.global_step)
        if self.private is not None:
            return self._private_step(model, inputs)
        mask = inputs.get("attention_mask")
        count = inputs["input_ids"].numel() if mask is None else mask.sum()
        self._train_mode(model)
        loss: Tensor = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        if self.averages and self.accelerator.sync_gradients:
            average_gradients(self.trained)
        loss = loss.detach()
        self.tokens_seen += count
        self.finite &= torch.isfinite(loss)
        return loss

    def _train_mode(self, model: nn.Module) -> None:
        # Trainer's own step turns it on every time, module by module.
        within: Any = self.model
        if not within.training:
            model.train()

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return super()._clip_grad_norm(SimpleNamespace(parameters=lambda: self.trained))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(SimpleNamespace(parameters=lambda: self.trained), grad_norm=grad_norm)
        self.grad_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return self.grad_norm

    def check_finite(self) -> None:
        """Keeps an update away that a NaN in any process would spoil, and stops all of them.

        torch's fused optimizers skip it on the device: the host hears of it later, from `stop_at_breaks`, and need not
        wait for the device in every step. Whatever else would follow such a step is held up until it has heard.
        """
        found = torch.stack([~self.finite, ~torch.isfinite(self.grad_norm).to(self.finite.device)])
        self.breaks.add(self.state.global_step + 1, self.summed(found.long()))
        optimizer: Any = self.optimizer
        own = optimizer.optimizer
        # A controller changes weights after the update, skipped or not.
        if self.controller is None and getattr(own, "_step_supports_amp_scaling", False):
            own.found_inf = self.breaks.any()
        else:
            self.stop_at_breaks(behind=0)

    def stop_at_breaks(self, *, behind: int) -> None:
        """Raises at the first loss or gradient that was not finite; of the last `behind` steps nothing is asked."""
        found = self.breaks.first(behind=behind)
        if found is not None:
            raise self._not_finite(*found)

    def _not_finite(self, what: str, step: int) -> RunError:
        last = self.run_folder.last_checkpoint()
        kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        return RunError(
            f"the {what} NaN or infinite at step {step}: {kept}; lower the learning rate, or look for broken rows"
        )

    def check_moved(self) -> None:
        """After the first update: every trained tensor must have had a gradient, or it is adapted in vain."""
        model = self.accelerator.unwrap_model(self.model)
        without = [
            name for name, p in adapter_parameters(model, self.adapter).items() if p.requires_grad and p.grad is None
        ]
        if without:
            raise RunError(
                f"{len(without)} trained tensors get no gradient ({without[0]}{', ...' if len(without) > 1 else ''}): "
                "the model does not use the modules they sit on; leave those out of target_modules"
            )

    # Evaluation.

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The caller's metrics, in place of Trainer's mean over batches, which weighs short batches as long ones."""
        assert self.evaluate_fn is not None
        values = self.evaluate_fn(self.accelerator.unwrap_model(self.model))
        metrics = {f"eval_{name}": float(value) for name, value in values.items()}
        best = self.args.metric_for_best_model
        if best is not None and best not in metrics:
            raise InputError(
                f"metric {best.removeprefix('eval_')!r} is not measured: expected one of {', '.join(values)}"
            )
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Checkpoints.

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Everything under another name first; the checkpoint has its own once it is complete."""
        step = self.state.global_step
        trained = adapter_parameters(self.accelerator.unwrap_model(self.model), self.adapter).values()
        if not all(bool(torch.isfinite(local_part(p)).all()) for p in trained):
            raise self._not_finite("weights are", step)
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
        tokens = self.tokens()
        if self.args.should_save:
            self._save_states(staging, tokens)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            sync_folder(staging)
            shutil.rmtree(target, ignore_errors=True)
            os.rename(staging, target)
            self._forget_old()
        self.accelerator.wait_for_everyone()

    def _save_states(self, folder: Path, tokens: int) -> None:
        states: Any = self.state.stateful_callbacks
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, transformers.trainer_callback.ExportableState):
                states[type(callback).__name__] = callback.state()
        self.state.save_to_json(str(folder / "trainer_state.json"))
        if self.controller is not None:
            torch.save(self.controller.state_dict(), folder / "controller.pt")
        own = {"tokens": tokens, "seconds": self.seconds()}
        (folder / "deltaw.json").write_text(json.dumps(own))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        model: Any = self.model
        optimizer: Any = self.optimizer
        schedule: Any = self.lr_scheduler
        parted = self.whole_model and is_sharded(model)
        state = optimizer_state(model, optimizer) if parted else optimizer.state_dict()
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(schedule.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        model: Any = self.model
        optimizer: Any = self.optimizer
        schedule: Any = self.lr_scheduler
        state = torch.load(Path(checkpoint) / "optimizer.pt", map_location="cpu", weights_only=True)
        if self.whole_model and is_sharded(model):
            load_optimizer(model, optimizer, state)
        else:
            optimizer.load_state_dict(state)
        schedule.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))

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
            state = whole_state(model) if is_sharded(model) else None
            if self.args.should_save:
                model.save_pretrained(output_dir, state_dict=state, safe_serialization=True)
            return
        state = adapter_state(model, self.adapter)
        if self.args.should_save:
            write_state(model, self.adapter, state, Path(output_dir) / "adapter")

    def _load_weights(self, folder: Path) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if self.whole_model:
            load_model_weights(model, folder)
        else:
            load_adapter_weights(model, self.adapter, folder / "adapter")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        self._load_weights(folder)
        if (folder / "controller.pt").is_file():
            self.controller_state = torch.load(folder / "controller.pt", map_location="cpu", weights_only=True)
        own = json.loads((folder / "deltaw.json").read_text())
        self.tokens_before = own["tokens"]
        self.seconds_before = own["seconds"]

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._init_training_state(*args, **kwargs)
        self._place_best()
        return found

    def _place_best(self) -> None:
        """The recorded path is of where the run was; the folder may have been moved since."""
        best = self.state.best_global_step
        if best is not None:
            self.state.best_model_checkpoint = str(self.run_folder.checkpoints / f"checkpoint-{best}")

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            self._load_weights(Path(self.state.best_model_checkpoint))

    def take_ended(self, checkpoint: Path) -> bool:
        """Takes over the end of a training that had come to it before the process died; False where it had not.

        Trainer itself would go on from there: past `max_steps` inside an epoch, and past an early stop.
        """
        state = transformers.TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if not state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]:
            return False
        self.state = state
        self._place_best()
        self._load_from_checkpoint(str(checkpoint))
        self.take_control()
        if self.args.load_best_model_at_end:
            self._load_best_model()
        if self.args.should_save:
            self._forget_old()
        return True

    # What follows the training.

    def take_control(self) -> None:
        """Makes the method's controller, where it has one, as the checkpoint left it."""
        if self.method.control is not None:
            model = self.accelerator.unwrap_model(self.model)
            self.controller = self.method.control(model, self.adapter, self.state.max_steps)
            if self.controller_state is not None:
                self.controller.load_state_dict(self.controller_state)

    def finish(self) -> None:
        """Checks that training moved the adapter, and lets the controller bring it to its final form."""
        model = self.accelerator.unwrap_model(self.model)
        check_moved(self.at_first, adapter_parameters(model, self.adapter))
        if self.controller is None:
            return
        try:
            self.controller.finish()
        except RunError as error:
            raise RunError(f"{error}; the weights are in {self.run_folder.last_checkpoint()}") from None

    # Logs.

    def seconds(self) -> float:
        """Seconds of training, those before a resume included."""
        return self.seconds_before + time.perf_counter() - self.began

    def tokens(self) -> int:
        """Tokens seen by all processes, those before a resume included; every process has to ask."""
        return self.tokens_before + int(self.summed(self.tokens_seen.clone()))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A line of `metrics.jsonl`; Trainer's closing summary is left to `run.json`."""
        if "train_runtime" in logs:
            return
        step = self.state.global_step
        epoch = round(self.state.epoch, 6) if self.state.epoch is not None else 0.0
        if self.private is not None and logs.pop("loss", None) is not None:
            logs["elapsed_s"] = round(self.seconds(), 3)
        line: dict[str, Any] = {"step": step, "epoch": epoch, **logs}
        if "loss" in logs:
            line |= {"tokens": self.tokens(), "elapsed_s": round(self.seconds(), 3)}
        if self.args.should_save:
            self.run_folder.log(line)
            self.say(_progress(line, self.state.max_steps))
        self.state.log_history.append({**logs, "step": step})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, {**logs, "epoch": epoch})


def _forget_gradients(parameters: Sequence[nn.Parameter], set_to_none: bool = True) -> None:
    for p in parameters:
        p.grad = None


def check_moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """Fails a training that left all of its tensors where they were (a wrapper that swallowed every gradient).

    Raises:
        RunError: every tensor equals its start to the last bit.
    """
    if before and all(
        name in after and torch.equal(tensor, local_part(after[name]).to(tensor.device))
        for name, tensor in before.items()
    ):
        raise RunError(
            f"training has not moved any of the {len(before)} trained tensors, so its result is worth nothing: raise "
            "the learning rate or the number of steps, and look for what keeps gradients from the adapter"
        )


def _progress(line: Mapping[str, Any], max_steps: int) -> str:
    parts = [f"step {line['step']}/{max_steps}"]
    names = {"loss": "loss", "learning_rate": "lr", "grad_norm": "grad norm"}
    for key, value in line.items():
        if key in names:
            parts.append(f"{names[key]} {value:.4g}")
        elif key.startswith("eval_"):
            parts.append(f"{key.removeprefix('eval_')} {value:.4g}")
    if "tokens" in line and line["elapsed_s"] > 0:
        parts.append(f"{line['tokens'] / line['elapsed_s']:.0f} tokens/s")
    return "  ".join(parts)
