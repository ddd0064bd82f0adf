"""What a run does at the events of transformers' training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import transformers

from deltaw.methods.host import set_merge_aware

if TYPE_CHECKING:
    from deltaw.train.trainer import DeltawTrainer


class Watch(transformers.TrainerCallback):  # type: ignore[misc]
    """Ties the trainer's checks to the loop's events."""

    def __init__(self, trainer: DeltawTrainer) -> None:
        self.trainer = trainer
        self.checked = False

    def _settle(self) -> None:
        """The parameters have changed, and stay as they are until the next optimizer step."""
        for part in self.trainer.steady:
            part.steady(True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The model and the optimizer are prepared."""
        self.trainer.begin()
        self._settle()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Its order of rows, and its masks."""
        collator = self.trainer.data_collator
        epoch = self.trainer.order.epoch = int(state.epoch or 0)
        if hasattr(collator, "set_epoch"):
            collator.set_epoch(epoch)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Whether it trains through the merged weights."""
        share = self.trainer.merge_aware
        if share:
            model = self.trainer.accelerator.unwrap_model(self.trainer.model)
            set_merge_aware(model, state.global_step >= round((1 - share) * state.max_steps))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The gradients are there, clipped."""
        self.trainer.check_finite()
        if not self.checked:
            self.trainer.check_moved()
            self.checked = True

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The parameters are updated, and the gradients still there."""
        if self.trainer.controller is not None:
            self.trainer.controller.after_update(state.global_step + 1)
        self._settle()
        self.trainer.fetch_ahead()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What is due after the step."""
        # What is due once an epoch is done at its last step, so that an evaluation always comes before the checkpoint
        # of its step: a run that dies in between measures again when it is resumed.
        if float(state.epoch).is_integer() or control.should_training_stop:
            control.should_evaluate |= args.eval_strategy == "epoch"
            control.should_save |= args.save_strategy == "epoch"
        # A checkpoint holds no sums of losses: what was gathered is logged first, resumed or not.
        if control.should_save or control.should_evaluate:
            control.should_log = True
        # Nothing is logged, measured or saved of a step that the optimizer skipped.
        due = control.should_log or control.should_evaluate or control.should_save
        self.trainer.stop_at_breaks(behind=0 if due or control.should_training_stop else 1)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing is: its last step has done it."""
        control.should_evaluate = control.should_save = False
