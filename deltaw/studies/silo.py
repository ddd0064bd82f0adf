"""An organisation's side of a federation: its rows, its model, the adapter that it trains, and the privacy it keeps.

On one machine the organisations share one frozen model, whose adapter is given its values anew before every use.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.checkpoint import load_tokenizer, save_adapter
from deltaw.checkpoint.model_files import model_facts
from deltaw.core.configs import to_plain
from deltaw.core.errors import InputError
from deltaw.core.generators import derived_seed
from deltaw.core.protocols import LowRank, packed_of
from deltaw.data import RowSet, label_set
from deltaw.evaluate.task import TaskEvaluator
from deltaw.federated.client import LocalResult, RefusalError
from deltaw.federated.config import FederationConfig
from deltaw.federated.state import GlobalState, Layout
from deltaw.methods import LoRA, adapt, delete_adapter, set_adapter
from deltaw.methods.host import active_method, adapter_names, book_of, parts_of
from deltaw.methods.lora_peft import as_measured
from deltaw.models.sites import kind_of
from deltaw.studies.job import add_adapter, evaluator_for, load_job_model, resolved, training_examples
from deltaw.studies.private import open_ledger
from deltaw.studies.rows import RunRows, read, run_rows
from deltaw.studies.starting import starting_points
from deltaw.train import TrainConfig
from deltaw.train.local import train_steps
from deltaw.train.private import PrivacyPlan, plan_privacy, privacy_record, rows_of_units
from deltaw.train.run_folder import versions

ADAPTER, CARRIED = "default", "carried"


def make_trainer(config: FederationConfig, name: str | None) -> Silo:
    """The trainer of the client called `name`; for None the server's, which measures and saves but has no rows."""
    return Silo(config, name)


@dataclasses.dataclass
class _Shared:
    """A model with its adapter, and what all who use it have in common."""

    model: Any
    tokenizer: Any
    base: str
    start: dict[str, Tensor]


_models: dict[str, _Shared] = {}


class Silo:
    """Implements `federated.client.Trainer`.

    Args:
        config: of the federation.
        name: of the client; None for the server.
    """

    def __init__(self, config: FederationConfig, name: str | None) -> None:
        self.config, self.name = config, name
        labels = _labels(config)
        own = {} if name is None else config.clients[name]
        data = config.train.test_data if name is None else own.get("data")
        if not data and name is not None:
            raise InputError(f"{name} has no data: expected clients: {{{name}: {{data: FILE}}}}")
        asked = dataclasses.replace(
            config.train,
            data=data or "",
            test_data=data if name is None else own.get("test_data"),
            eval_data=None,
            held_out=0,
            labels=labels,
            unit=None if name is None else config.train.unit,
        )
        facts = model_facts(asked.model)
        self.rows = run_rows(asked, generative=facts.generative) if data else _no_rows(asked)
        self.train_config = resolved(asked, self.rows, facts)
        self.shared = _shared(self.train_config, self.rows, apart=name if config.merge_every else None)
        self._evaluator = self._measures()
        self.plan: PrivacyPlan | None = None
        if name is not None:
            encoded, self.collator = training_examples(
                self.train_config, self.rows, self.shared.tokenizer, self.shared.model
            )
            self.examples = encoded.examples
            if self.train_config.dp:
                groups = self.rows.train.groups
                units = rows_of_units([groups[i] for i in encoded.kept] if groups else None, len(self.examples))
                self._plan(units)

    # What the protocol asks.

    def describe(self) -> dict[str, Any]:
        """The base's hash, the rows, versions, the task, and what is promised about privacy."""
        model = self.shared.model
        described: dict[str, Any] = {
            "base": self.shared.base,
            "examples": len(self.examples) if self.name is not None else 0,
            "versions": versions(),
            "task": self.rows.task,
            "model": {"family": model.config.model_type, "class": type(model).__name__},
        }
        if self.rows.labels is not None:
            described["labels"] = list(self.rows.labels)
        if self.plan is not None:
            described["privacy"] = self._privacy(self.plan)
        return described

    def initial(self) -> tuple[GlobalState, Layout]:
        """The adapter at its start."""
        return GlobalState(self.shared.start), layout_of_adapter(self.shared.model)

    def train(
        self, start: GlobalState, *, trained: frozenset[str], round_: int, rounds: int, run: str = ""
    ) -> LocalResult:
        """Local steps on the organisation's rows, from the round's start."""
        model, config = self.shared.model, self.train_config
        if self.plan is not None and max(round_ + 1, rounds) > self.config.rounds:
            # What the noise promises is for so many rounds and no more.
            raise RefusalError(
                f"round {round_ + 1} of {rounds}: this client's noise is for {self.config.rounds} rounds"
            )
        steps = self._steps(len(self.examples) if self.plan is None else len(self.plan.units))
        if self.plan is not None:
            self._charge(self.plan, f"{run}/{round_}", steps)
        with _with_state(model, start):
            wanted = dict(tensors_of_adapter(model))
            for key, tensor in wanted.items():
                if isinstance(tensor, nn.Parameter):
                    tensor.requires_grad_(key in trained)
            try:
                loss = train_steps(
                    model,
                    ADAPTER,
                    self.examples,
                    self.collator,
                    config,
                    steps=steps,
                    first_step=round_ * steps,
                    all_steps=rounds * steps,
                    seed=derived_seed(config.seed, "client", str(self.name), round_),
                    private=self.plan,
                    proximal_mu=self.config.proximal_mu,
                )
            finally:
                for tensor in wanted.values():
                    if isinstance(tensor, nn.Parameter):
                        tensor.requires_grad_(True)
            result = {key: value for key, value in state_of_adapter(model).items() if key in trained}
        facts = {} if loss is None else {"loss": loss}
        if self.plan is not None and self.plan.noise_multiplier:
            facts["epsilon"] = self._spent((round_ + 1) * steps)
        return LocalResult(result, len(self.examples), facts)

    def evaluate(self, state: GlobalState) -> dict[str, float]:
        """Metrics on the organisation's own test rows, or the server's; {} where there are none."""
        if self._evaluator is None:
            return {}
        with _with_state(self.shared.model, state):
            found = self._evaluator(self.shared.model).metrics
        return {name: float(value) for name, value in found.items() if math.isfinite(value)}

    def fold(self, carried: Mapping[str, LowRank]) -> None:
        """Adds updates to the frozen weights."""
        for path, low in carried.items():
            module = self.shared.model.get_submodule(path)
            weight: Any = module.weight
            if packed_of(weight) is not None:
                raise InputError(f"{path} is held in 4 bits: updates cannot be folded into it; leave merge_every out")
            kind = kind_of(module)
            assert kind is not None
            delta = (low.B.double() @ low.A.double()).mul_(low.scale)
            own = delta if kind == "linear" else delta.t()
            with torch.no_grad():
                weight.copy_((weight.double() + own.to(weight.device)).to(weight.dtype))

    def save(self, state: GlobalState, folder: Path) -> None:
        """Writes a state's adapter in PEFT's layout, without what is carried beside it."""
        with _with_state(self.shared.model, GlobalState(state.tensors)):
            save_adapter(self.shared.model, folder, name=ADAPTER, base_model=self.train_config.model)

    # Parts of it.

    def _measures(self) -> TaskEvaluator | None:
        if self.rows.test is None:
            return None
        model = self.shared.model
        return evaluator_for(
            self.train_config,
            self.rows,
            self.rows.test,
            self.shared.tokenizer,
            encoder_decoder=model.config.is_encoder_decoder,
        )

    def _steps(self, units: int) -> int:
        """Optimizer steps of a round over so many rows, or units of private training."""
        if self.config.local_steps is not None:
            return self.config.local_steps
        assert self.config.local_epochs is not None
        return max(1, round(self.config.local_epochs * units / self.train_config.batch_size))

    def _plan(self, units: list[list[int]]) -> None:
        config = self.train_config
        if config.ledger is not None:
            folder = Path(config.ledger)
            if folder.is_file() or folder.suffix:
                raise InputError(
                    f"ledger is {config.ledger}: expected a folder, in which every organisation has a file of its own"
                )
            config = dataclasses.replace(config, ledger=str(folder / f"{self.name}.jsonl"))
        self.ledger = open_ledger(config, len(units))
        self.plan = plan_privacy(config, units, steps=self.config.rounds * self._steps(len(units)))

    def _charge(self, plan: PrivacyPlan, key: str, steps: int) -> None:
        if self.ledger is not None:
            spec = dataclasses.replace(plan, steps=steps).spec
            self.ledger.charge(key, spec, data_sha256=self.rows.train.sha256)

    def _spent(self, steps: int) -> float:
        assert self.plan is not None
        return _epsilon(dataclasses.replace(self.plan, steps=steps).spec)

    def _privacy(self, plan: PrivacyPlan) -> dict[str, Any]:
        from deltaw.privacy.accounting import collusion

        record = privacy_record(plan, self.train_config)
        if plan.noise_multiplier:
            # Every organisation noises what it sends by itself, so nobody's silence is counted on.
            found = collusion(plan.spec, clients=len(self.config.clients), noise="own")
            record["collusion"] = {str(count): value for count, value in found.items()}
        return record


@functools.cache
def _epsilon(spec: Any) -> float:
    """Accounting takes most of a second, and organisations of one size ask for the same."""
    from deltaw.privacy.accounting import epsilon

    return epsilon(spec).epsilon


def _labels(config: FederationConfig) -> list[str] | None:
    """The labels that all organisations use: those given, or those of all rows that are at hand."""
    if config.train.labels is not None:
        return list(config.train.labels)
    sources = [file for own in config.clients.values() for key in ("data", "test_data") if (file := own.get(key))]
    away = [name for name, own in config.clients.items() if not own.get("data")]
    # At an organisation of its own the server's rows are not at hand, whatever a file that both share says.
    if config.train.test_data and not (away and sources):
        sources.insert(0, config.train.test_data)
    found: set[str] = set()
    for source in dict.fromkeys(sources):
        labels = label_set(read(dataclasses.replace(config.train, unit=None), source))
        if labels is None:
            return None
        found |= set(labels)
    if away and found:
        raise InputError(f"labels are not given, and the rows of {away[0]} are elsewhere: name all labels in the file")
    return sorted(found) or None


def _no_rows(config: TrainConfig) -> RunRows:
    """What a server goes by that has no rows: the task and the labels that the configuration names."""
    if config.task is None or (config.task.endswith("classification") and config.labels is None):
        raise InputError(
            "the server has no test_data to tell the task by: give test_data, or task (and labels of its classes)"
        )
    return RunRows(
        config.task, RowSet((), "text", ""), None, None, None if config.labels is None else list(config.labels)
    )


def _shared(config: TrainConfig, rows: RunRows, *, apart: str | None) -> _Shared:
    """The model with a fresh adapter on it; the same one for all on this machine who want the same."""
    keys = {
        name: value
        for name, value in config.plain().items()
        if name not in ("data", "test_data", "eval_data", "output", "ledger", "unit")
    }
    key = repr(sorted(keys.items(), key=lambda item: item[0])) + repr((rows.task, rows.labels, apart))
    if key not in _models:
        model = load_job_model(config, rows)
        tokenizer = load_tokenizer(config.model)
        if getattr(config.method_config, "init", None) == "eva":
            raise InputError("init eva looks at one organisation's rows, and all start alike: choose another start")
        base = base_digest(model, rows.labels)
        add_adapter(model, config, **starting_points(config, model, [], None))  # type: ignore[arg-type]
        _models[key] = _Shared(model, tokenizer, base, state_of_adapter(model))
    return _models[key]


def forget_models() -> None:
    """Lets go of the models that this process shares among organisations."""
    _models.clear()


def base_digest(model: nn.Module, labels: list[str] | None) -> str:
    """SHA-256 of the frozen base as it is stored and of the names of the classes, hexadecimal."""
    digest = hashlib.sha256(repr((type(model).__name__, labels)).encode())
    for name, parameter in sorted(model.named_parameters(remove_duplicate=False)):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        packed: Any = packed_of(parameter)
        for tensor in [parameter] if packed is None else _stored(packed):
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _stored(packed: Any) -> Iterator[Tensor]:
    """Everything that a packed weight holds, the scales' own scales among it."""
    for field in dataclasses.fields(packed):
        value = getattr(packed, field.name)
        if isinstance(value, Tensor):
            yield value
        elif dataclasses.is_dataclass(value):
            yield from _stored(value)


def _bytes(tensor: Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else b""


# The adapter as a state.


def tensors_of_adapter(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of everything that the adapter is made of, the tensors themselves."""
    if active_method(model, ADAPTER).trains_base:
        for name, parameter in model.named_parameters():
            path, _, own = name.rpartition(".")
            yield f"{path}:{own}", parameter
        return
    seen: set[int] = set()
    for path, _, part in parts_of(model, ADAPTER):
        held = [
            *part.named_parameters(),
            *((n, b) for n, b in part.named_buffers() if n.startswith(("lora_", "start_"))),
        ]
        for name, tensor in held:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{path}:{name}", tensor


def state_of_adapter(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the adapter's tensors by key, float32 on the CPU."""
    return {key: tensor.detach().to("cpu", torch.float32, copy=True) for key, tensor in tensors_of_adapter(model)}


def layout_of_adapter(model: nn.Module) -> Layout:
    """What the tensors are."""
    held = dict(tensors_of_adapter(model))
    scales = {
        path: float(part.scale)
        for path, _, part in parts_of(model, ADAPTER)
        if f"{path}:lora_A" in held and hasattr(part, "scale")
    }
    config = book_of(model).configs[ADAPTER]
    return Layout(
        shapes={key: tuple(tensor.shape) for key, tensor in held.items()},
        scales=scales,
        method=active_method(model, ADAPTER).name,
        config=to_plain(config),
        frozen=frozenset(key for key, tensor in held.items() if not isinstance(tensor, nn.Parameter)),
    )


class _with_state:
    """The model computing with a state, while a block lasts."""

    def __init__(self, model: nn.Module, state: GlobalState) -> None:
        self.model, self.state = model, state

    def __enter__(self) -> None:
        model = self.model
        with torch.no_grad():
            for key, tensor in tensors_of_adapter(model):
                tensor.copy_(self.state.tensors[key])
        if self.state.carried:
            carry(model, self.state.carried)
            set_adapter(model, [ADAPTER, CARRIED])
        elif not active_method(model, ADAPTER).trains_base:
            set_adapter(model, ADAPTER)

    def __exit__(self, *_: Any) -> None:
        if CARRIED in adapter_names(self.model):
            delete_adapter(self.model, CARRIED)
            set_adapter(self.model, ADAPTER)


def carry(model: nn.Module, carried: Mapping[str, LowRank]) -> None:
    """Puts updates on the model as an adapter that is not trained."""
    measured = {path: (low.A.shape[0], 1.0) for path, low in carried.items()}
    config = as_measured(LoRA(target_modules=sorted(carried)), measured)
    adapt(model, config, name=CARRIED, trainable=False)
    for path, _, part in parts_of(model, CARRIED):
        low = carried[path]
        with torch.no_grad():
            part.lora_A.copy_(low.A)
            part.lora_B.copy_(low.B * low.scale)
