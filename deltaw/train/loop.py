"""Fitting: one model, one adapter, encoded rows; from the first step or from the last whole checkpoint."""

from __future__ import annotations

import contextlib
import gc
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltaw.core.errors import InputError, MissingExtraError
from deltaw.core.files import explain_os_error
from deltaw.core.protocols import packed_of
from deltaw.data import Collator
from deltaw.fuse import flash
from deltaw.fuse.attention import FastCpuAttention
from deltaw.fuse.decoder import install_blocks, learn_directions, leave_checkpointing, uninstall_blocks
from deltaw.fuse.head import install_loss_head, uninstall_loss_head
from deltaw.fuse.keep import HEAD_BYTES, Keep, Room
from deltaw.methods import NEFTune, adapt, delete_adapter, method_of
from deltaw.methods.host import set_merge_aware, steady
from deltaw.train.config import TrainConfig, bytes_of
from deltaw.train.private import PrivacyPlan
from deltaw.train.run_folder import RunFolder, peak_memory_bytes
from deltaw.train.sharding import shard
from deltaw.train.trainer import DeltawTrainer, EvaluateFn

Example = dict[str, list[int]]

#: That the directions of 8-bit products are learned from.
SAMPLE_TOKENS = 4096


@dataclass(frozen=True)
class Fitted:
    """What training came to.

    Attributes:
        steps: optimizer steps, those before a resume included.
        tokens: tokens seen by all processes, without padding (but for that of packed sequences).
        seconds: of training alone.
        peak_memory_bytes: the most memory in use so far.
        best_step: the step whose weights the model has, where the best one was asked for; else None.
        stopped_early: whether early stopping ended it.
    """

    steps: int
    tokens: int
    seconds: float
    peak_memory_bytes: int
    best_step: int | None
    stopped_early: bool


def world_size() -> int:
    """Processes of this run, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this process writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def local_device(device: str) -> str:
    """The device of this process: under torchrun each has its own GPU, which becomes the current one."""
    if world_size() == 1 or device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    index = int(os.environ.get("LOCAL_RANK", "0"))
    # Triton launches on the current device, whatever its tensors' one is.
    if torch.backends.cuda.is_built():
        torch.cuda.set_device(index)
    return f"cuda:{index}"


def fit(
    model: Any,
    adapter: str,
    examples: Sequence[Example],
    collator: Collator,
    config: TrainConfig,
    run: RunFolder,
    *,
    evaluate: EvaluateFn | None = None,
    private: PrivacyPlan | None = None,
    resume: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Fitted:
    """Trains the active adapter of `model`, in place.

    AdamW, the rate rising linearly over `warmup_ratio` of the steps, then by the schedule; gradients accumulated to
    `batch_size` rows over all processes; the loss a mean over the tokens of the whole step. Where the rows of an epoch
    do not divide over the processes, some are taken twice to fill up its last micro-batches.

    Args:
        model: an adapted transformers model on its device.
        adapter: the adapter to train.
        examples: encoded rows, as `deltaw.data.encode` or `pack` gives them.
        collator: for them.
        config: the run.
        run: where logs and checkpoints go.
        evaluate: gives metrics of the model during training; None: no evaluation.
        private: how to train with differential privacy; None: without.
        resume: go on from the run's last checkpoint, exactly, where it has one.
        say: takes lines of progress.

    Raises:
        RunError: a loss that is not finite, trained tensors without gradient, a full disk.
    """
    last = run.last_checkpoint() if resume else None
    step = 0 if last is None else int(last.name.removeprefix("checkpoint-"))
    device = next(model.parameters()).device
    whole = method_of(config.method_config).trains_base
    try:
        with prepared(model, config, collator.task, say):
            units = len(examples) if private is None else len(private.units)
            arguments = training_arguments(
                config, run.path, units, device, evaluate is not None, private=private is not None
            )
            if config.fp8 != "none" and private is None:
                # The same rows whether the run begins or resumes.
                learn_directions(model, **_sample(examples, collator, device))
            if config.sharding == "fsdp2":
                shard(model, device, whole=() if whole else [p for p in model.parameters() if p.requires_grad])
            trainer = DeltawTrainer(
                model=model,
                args=arguments,
                train_dataset=list(examples),
                # Asked for by Trainer's checks and never read: `evaluate_fn` has its own rows.
                eval_dataset=None if evaluate is None else list(examples[:1]),
                data_collator=collator,
                adapter=adapter,
                run=run,
                evaluate_fn=evaluate,
                say=say,
                keep_checkpoints=config.keep_checkpoints,
                autocast=whole and config.dtype == "auto" and _autocasts(device),
                optimizer_name=config.optimizer,
                merge_aware=config.merge_aware,
                turns=config.fp8 != "none",
                private=private,
                callbacks=_callbacks(config, run, evaluate is not None, step),
            )
            if resume:
                run.cut_log(step)
            if last is not None and trainer.take_ended(last):
                say(f"training had ended at step {step}")
            else:
                if last is not None:
                    say(f"resuming from step {step}")
                with _settled():
                    trainer.train(resume_from_checkpoint=str(last) if last else None)
            trainer.finish()
    except OSError as error:
        raise explain_os_error(error, error.filename or run.path) from error
    return Fitted(
        steps=trainer.state.global_step,
        tokens=trainer.tokens(),
        seconds=trainer.seconds(),
        peak_memory_bytes=peak_memory_bytes(device),
        best_step=trainer.state.best_global_step if config.early_stopping else None,
        stopped_early=trainer.state.global_step < trainer.state.max_steps,
    )


def _sample(examples: Sequence[Any], collator: Any, device: torch.device) -> dict[str, torch.Tensor]:
    """Token ids and mask of the first rows."""
    rows: list[Any] = []
    longest = 0
    for row in examples:
        longest = max(longest, min(len(row["input_ids"]), SAMPLE_TOKENS))
        if rows and (len(rows) + 1) * longest > SAMPLE_TOKENS:
            break
        rows.append(row)
    inputs = collator(rows)
    names = [name for name in ("input_ids", "attention_mask") if name in inputs]
    return {name: inputs[name][:, :SAMPLE_TOKENS].to(device) for name in names}


@contextlib.contextmanager
def _settled() -> Iterator[None]:
    """What is alive by now is left out of garbage collections.

    One of all objects takes a quarter of a second among those of transformers and a model, every dozen steps.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def prepared(
    model: Any, config: TrainConfig, task: str, say: Callable[[str], None] = lambda line: None
) -> Iterator[None]:
    """The model as training wants it, and afterwards as it was: noise, its loss head, recomputation, its cache."""
    packed = [name for name, parameter in model.named_parameters() if packed_of(parameter) is not None]
    if config.merge_aware and not packed:
        raise InputError("merge_aware trains through 4-bit weights, and the base has none: give quantize nf4")
    head = model.get_output_embeddings() if config.dp else None
    # The fast head sees tokens of all rows in one list, where a trained one would have to tell them apart.
    learns = head is not None and any(p.requires_grad for p in head.parameters())
    objection = "its head is trained under dp" if learns else install_loss_head(model)
    if objection is not None and task in ("causal-lm", "instruct"):
        say(f"loss computed from the logits of every position ({objection})")
    caches = getattr(model.config, "use_cache", None)
    with contextlib.ExitStack() as undone:
        # In this order backwards; what fails does not keep the others from being undone.
        undone.callback(_put_cache_back, model, caches)
        if config.gradient_checkpointing:
            undone.callback(_checkpointing, model, on=False)
            _checkpointing(model, on=True)
        undone.callback(uninstall_loss_head, model)
        undone.callback(uninstall_blocks, model)
        _fuse(model, config, say)
        if config.neftune_alpha:
            adapt(model, NEFTune(config.neftune_alpha), name="neftune")
            undone.callback(delete_adapter, model, "neftune")
        undone.callback(set_merge_aware, model, False)
        # DDP would broadcast every parameter first, and 4-bit ones are no plain tensors. All processes read the same.
        model._ddp_params_and_buffers_to_ignore = packed
        undone.callback(delattr, model, "_ddp_params_and_buffers_to_ignore")
        with FastCpuAttention() if model.device.type == "cpu" else contextlib.nullcontext(), steady(model):
            yield


def _put_cache_back(model: Any, caches: Any) -> None:
    """Trainer turns it off, and a saved model would keep that."""
    if caches is not None:
        model.config.use_cache = caches
    else:
        model.config.__dict__.pop("use_cache", None)


def _fuse(model: Any, config: TrainConfig, say: Callable[[str], None]) -> None:
    """Fused decoder layers, where the configuration asks for them and the model has some."""
    cuda = model.device.type == "cuda"
    if config.memory_budget is not None and not cuda:
        raise InputError(f"memory_budget is a GPU's, and the model is on {model.device.type}: leave it out")
    if config.fp8 != "none" and config.fast == "auto" and not cuda:
        raise InputError(
            f"fp8 is for GPUs, and the model is on {model.device.type}: give fast on too, to try it slowly"
        )
    if config.attention == "flash" and (objection := flash.objection(model.device)) is not None:
        raise InputError(f"attention flash: {objection}, or leave it out")
    if config.fast == "off" or (config.fast == "auto" and not cuda):
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    states = 0 if config.optimizer.startswith("paged") else 2
    room = Room(
        budget_bytes=None if config.memory_budget is None else bytes_of(config.memory_budget),
        later_bytes=sum(p.numel() * p.element_size() for p in trained) * (1 + states),
        head_bytes=HEAD_BYTES,
        # Pointless where each process has a part of the base.
        holds=config.sharding == "none",
    )
    keep: Keep | None = "input" if config.gradient_checkpointing else None
    joins = None if config.sharding == "none" else False
    fused, layers, reason = install_blocks(
        model,
        keep=keep,
        room=room,
        fp8=config.fp8,  # type: ignore[arg-type]
        by_flash=config.attention == "flash",
        joins=joins,
        say=say,
    )
    if fused:
        # With gradients by example, and once weights are merged, layers run their own forward.
        if config.gradient_checkpointing and not config.dp and not config.merge_aware:
            leave_checkpointing(model)
        say(f"{fused} of {layers} layers fused" + (f" ({reason})" if reason else ""))
        return
    asked_for = {
        "fast on": config.fast == "on", "memory_budget": config.memory_budget is not None, "fp8": config.fp8 != "none",
        "attention flash": config.attention == "flash",
    }  # fmt: skip
    for key, asked in asked_for.items():
        if asked:
            raise InputError(f"{key} needs layers that can be fused, and none can: {reason}; leave it out")
    say(f"no layer fused ({reason})")


def _checkpointing(model: Any, *, on: bool) -> None:
    """Recomputation of activations; transformers has renamed the switch, and warns of the old name."""
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        options: dict[str, Any] = {"use_reentrant": False}
        if model.device.type == "cpu":
            # What is computed again runs outside of the mode that the forward pass was in.
            options["context_fn"] = lambda: (contextlib.nullcontext(), FastCpuAttention())
        getattr(model, f"{word}_checkpointing_enable")(**{f"{word}_checkpointing_kwargs": options})
    else:
        getattr(model, f"{word}_checkpointing_disable")()


def optimizer_steps(config: TrainConfig, rows: int) -> int:
    """Optimizer steps of a run over `rows` encoded rows, as Trainer counts them."""
    side_by_side = config.micro_batch_size * world_size()
    per_epoch = max(1, math.ceil(math.ceil(rows / side_by_side) / (config.batch_size // side_by_side)))
    return config.max_steps or math.ceil(config.epochs * per_epoch)


def warmup_steps(config: TrainConfig, steps: int) -> int:
    """Steps of a rising rate, the first of which has rate 0: never all of them."""
    return min(math.ceil(config.warmup_ratio * steps), steps - 1)


def training_arguments(
    config: TrainConfig, output: Path, rows: int, device: torch.device, evaluates: bool, *, private: bool = False
) -> Any:
    """Trainer's arguments for a run over so many rows, or units of a private one."""
    import transformers

    assert config.learning_rate is not None
    check_setting(config)
    accumulation = config.batch_size // (config.micro_batch_size * world_size())
    steps: dict[str, Any] = {}
    evaluation = "no" if not evaluates else ("steps" if config.eval_every else "epoch")
    saving = "steps" if config.save_every else "epoch"
    if config.early_stopping:
        # The best weights can only be gone back to where they were kept.
        saving = evaluation
        steps |= {
            "load_best_model_at_end": True,
            "metric_for_best_model": f"eval_{config.metric}",
            "greater_is_better": config.metric not in ("loss", "perplexity"),
            "save_steps": config.eval_every or 500,
        }
    elif config.save_every:
        steps |= {"save_steps": config.save_every}
    made = transformers.TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=config.micro_batch_size,
        # A private step is drawn whole, and clipped by unit before the noise.
        gradient_accumulation_steps=1 if private else accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or (optimizer_steps(config, rows) if private else -1),
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=0.0 if private else config.max_grad_norm,
        # Its draws cannot be repeated, so there is nothing to skip.
        ignore_data_skip=private,
        lr_scheduler_type={"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}[config.schedule],
        warmup_steps=warmup_steps(config, optimizer_steps(config, rows)),
        optim="adamw_torch_fused" if device.type == "cuda" else "adamw_torch",
        seed=config.seed,
        data_seed=config.seed,
        # Early stopping counts on where it was.
        restore_callback_states_from_checkpoint=True,
        use_cpu=device.type == "cpu",
        logging_strategy="steps",
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        eval_strategy=evaluation,
        eval_steps=config.eval_every or None,
        save_strategy=saving,
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        dataloader_num_workers=0,
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        # What is not trained is alike everywhere from the start: frozen factors need not be sent before every pass.
        ddp_broadcast_buffers=False,
        **steps,
    )
    # One process drives one device; of several visible ones Trainer would make a DataParallel.
    if made.n_gpu > 1:
        made._n_gpu = 1
    return made


def check_setting(config: TrainConfig) -> None:
    """What can be known to be wrong before a model is loaded: the processes, and what is not installed.

    Raises:
        InputError: rows that do not divide over the processes, sharding without several of them.
        MissingExtraError: TensorBoard is asked for and absent.
    """
    processes = world_size()
    if config.batch_size % (config.micro_batch_size * processes):
        raise InputError(
            f"batch_size {config.batch_size} is no multiple of micro_batch_size {config.micro_batch_size} x "
            f"{processes} processes: choose one that is"
        )
    if config.dp and processes > 1:
        raise InputError(f"dp runs in one process, and there are {processes}: start it without torchrun")
    if config.sharding != "none" and processes == 1:
        raise InputError(
            f"sharding is {config.sharding} and there is one process: start several with torchrun, or leave it at none"
        )
    if config.tensorboard:
        _summary_writer()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtraError("tensorboard is not installed: pip install 'deltaw[tensorboard]'") from None
    return SummaryWriter


def _autocasts(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _callbacks(config: TrainConfig, run: RunFolder, evaluates: bool, step: int) -> list[Any]:
    import transformers
    from transformers.integrations.integration_utils import TensorBoardCallback

    found: list[Any] = []
    if config.early_stopping:
        if not evaluates:
            raise InputError("early_stopping needs evaluation rows: give eval_data, or hold some out with held_out")
        found.append(transformers.EarlyStoppingCallback(early_stopping_patience=config.early_stopping))
    if config.tensorboard and run.writes:
        writer = _summary_writer()(str(run.path / "tensorboard"), purge_step=step + 1 if step else None)
        found.append(TensorBoardCallback(writer))
    return found
