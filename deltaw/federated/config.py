"""What a federation is made of: its own keys beside those of a training run, flat in one YAML file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaw.core.configs import aliases_of, to_plain
from deltaw.core.errors import InputError, unknown_name
from deltaw.federated import compression, server_optimizer
from deltaw.federated.rules import make_rule
from deltaw.federated.rules.contract import Rule
from deltaw.methods import METHODS
from deltaw.train.config import SHORTHANDS, TrainConfig, _number, make_config, read_yaml

WEIGHTINGS = ("examples", "equal")

#: Keys of a training run that a federation has another key for.
_ELSEWHERE = {
    "data": "every client has its own: clients: {NAME: {data: FILE}}",
    "eval_data": "every client has its own rows: clients: {NAME: {data: FILE, test_data: FILE}}",
    "max_steps": "say local_steps, the optimizer steps of a round",
    "epochs": "say local_epochs, the passes over a client's rows in a round",
}


@dataclass(frozen=True, kw_only=True)
class FederationConfig:
    """A federation, fully resolved.

    Attributes:
        clients: by name, `data` (training rows) and `test_data` (the client's own test rows, where it has any) of each.
            Over a network each client's own file names its data, and the others' and the server's only the names.
        rounds: how many.
        local_steps: optimizer steps of a client in a round.
        local_epochs: passes over a client's rows in a round, in place of steps; 1 where neither is given.
        rule: how updates are aggregated: `fedavg-ab`, `product`, ...
        rule_options: the rule's own options.
        weighting: `examples` (a client counts by its rows) or `equal`.
        sample: a share (float) or number (int) of the clients that take part in a round; None for all.
        min_clients: updates that a round needs; None means half of the sampled ones, at least two where there are two.
        deadline_s: seconds that clients have for each request; None: as long as it takes.
        attempts: how often a round with too few updates is begun before the run stops.
        wait_s: how long to wait for clients to be there.
        max_update_norm: updates of a larger norm are refused, by clients and by the server; None: any.
        compression: of uploads: `none`, `bfloat16`, `int8`, `nf4` (4 bits) or `topk`.
        compression_share: share of the values that `topk` sends.
        secure: whether updates are masked, so that the server sees their sum only.
        threshold: clients that must stay to the end of a secure round; None means more than two thirds.
        secure_weight_bound: the most examples that a client may count for in a secure round; near the true number, as
            it costs precision. Of no matter where all weigh the same.
        secure_clip: the largest magnitude of a value that a secure round can carry; a smaller one makes a finer grid.
        proximal_mu: FedProx: weight of (mu/2) ||w - w_start||^2 in the local loss; 0: none.
        server_optimizer: what is done with the aggregated change: `none` (added as it is), `momentum` or `adam`.
        server_learning_rate: of the server optimizer; None means 1 for momentum and 0.01 for adam.
        server_momentum: its (first) momentum.
        server_beta2: Adam's second momentum.
        server_tau: Adam's adaptivity, added to the root of the second moment.
        merge_every: rounds after which what is carried beside the adapter is folded into 16-bit bases; 0: never.
        evaluate_every: rounds between evaluations; 0: only before and after.
        evaluate_clients: whether clients are measured on their own test rows too.
        parallel: worker processes for the clients of a run on one machine; 0: one after another in this process.
        update_dp: differential privacy by update: a client's whole change of a round is clipped and noised, by itself
            or, with `secure`, by shares of the sum's noise. It hides a client, where `dp` hides examples or customers.
        update_noise_multiplier: standard deviation of the noise over `update_clip`: of each upload, or of the sum.
        update_target_epsilon: in place of the multiplier: the least noise that keeps all rounds within this epsilon.
        update_clip: the norm that a client's whole change is clipped to; None means 1.
        update_delta: of the statement; None means 1e-5, or a tenth of one over the clients where that is less.
        update_ledger: a file, each client's own, that sums up what all runs cost the organisation, and refuses what
            would exceed its budget; on one machine a folder with a file for each client.
        update_budget_epsilon: of a new ledger.
        train: everything else: model, method, optimizer, privacy by example.
    """

    clients: Mapping[str, Mapping[str, str | None]]
    rounds: int = 10
    local_steps: int | None = None
    local_epochs: float | None = None
    rule: str = "fedavg-ab"
    rule_options: Mapping[str, Any] = field(default_factory=dict)
    weighting: str = "examples"
    sample: float | int | None = None
    min_clients: int | None = None
    deadline_s: float | None = None
    attempts: int = 3
    wait_s: float = 600.0
    max_update_norm: float | None = None
    compression: str = "none"
    compression_share: float = 0.01
    secure: bool = False
    threshold: int | None = None
    secure_weight_bound: int = 16384
    secure_clip: float = 16.0
    proximal_mu: float = 0.0
    server_optimizer: str = "none"
    server_learning_rate: float | None = None
    server_momentum: float = 0.9
    server_beta2: float = 0.99
    server_tau: float = 1e-3
    merge_every: int = 0
    evaluate_every: int = 1
    evaluate_clients: bool = True
    parallel: int = 0
    update_dp: bool = False
    update_noise_multiplier: float | None = None
    update_target_epsilon: float | None = None
    update_clip: float | None = None
    update_delta: float | None = None
    update_ledger: str | None = None
    update_budget_epsilon: float | None = None
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "clients", _named(self.clients))
        _check_numbers(self)
        for key, known in _CHOICES.items():
            if getattr(self, key) not in known:
                raise unknown_name(key, str(getattr(self, key)), known)
        if self.local_steps is not None and self.local_epochs is not None:
            raise InputError("both local_steps and local_epochs are given: leave one of them out")
        if self.local_steps is None and self.local_epochs is None:
            object.__setattr__(self, "local_epochs", 1.0)
        if self.min_clients is None:
            floor = max(
                min(2, self.sampled),
                math.ceil(self.sampled / 2),
                make_rule(self.rule, **self.rule_options).least_uploads,
            )
            object.__setattr__(self, "min_clients", floor)
        problems = [*_secure_problems(self), *_rule_problems(self), *_count_problems(self), *_update_problems(self)]
        if self.update_dp:
            object.__setattr__(self, "update_clip", 1.0 if self.update_clip is None else self.update_clip)
            delta = min(1e-5, 0.1 / len(self.clients)) if self.update_delta is None else self.update_delta
            object.__setattr__(self, "update_delta", delta)
        if problems:
            raise InputError("; ".join(problems))

    @property
    def sampled(self) -> int:
        """How many clients a round asks when all are there."""
        return self.sampled_of(len(self.clients))

    def sampled_of(self, there: int) -> int:
        """How many of the clients that are there a round asks."""
        if self.sample is None:
            return there
        return min(there, self.sample) if isinstance(self.sample, int) else max(1, round(self.sample * there))

    @property
    def stay(self) -> int:
        """The fewest clients that the sum of a secure round has under `update_dp`, as its noise is counted on."""
        return 2 * self.sampled // 3 + 1 if self.threshold is None else self.threshold

    @property
    def least(self) -> int:
        """Updates that a round needs."""
        assert self.min_clients is not None
        return self.min_clients

    def plain(self) -> dict[str, Any]:
        """Every key with its value, the training's beside the federation's, as `config.yaml` has them."""
        keys = to_plain(self)
        del keys["train"]
        theirs = {key: value for key, value in self.train.plain().items() if key not in _ELSEWHERE}
        return {**keys, **theirs}


_CHOICES = {"compression": compression.KINDS, "server_optimizer": server_optimizer.KINDS, "weighting": WEIGHTINGS}
_CLIENT_KEYS = ("data", "test_data")


def _named(clients: Any) -> dict[str, dict[str, str | None]]:
    """Clients by name, from a mapping or from a list of names alone."""
    if isinstance(clients, list | tuple):
        clients = {name: {} for name in clients}
    if not isinstance(clients, Mapping) or not clients:
        raise InputError("no clients: expected clients: {bank-a: {data: FILE}, bank-b: {data: FILE}}")
    for name, own in clients.items():
        # A name is a folder and a field of signed messages.
        if not isinstance(name, str) or not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
            raise InputError(f"a client's name is {name!r}: expected letters, digits, - and _")
        if not isinstance(own or {}, Mapping):
            raise InputError(f"client {name} is {own!r}: expected {name}: {{data: FILE}}")
        for key, value in (own or {}).items():
            if key not in _CLIENT_KEYS:
                raise unknown_name(f"key of client {name}", str(key), _CLIENT_KEYS)
            if value is not None and not isinstance(value, str):
                raise InputError(f"{key} of client {name} is {value!r}: expected a file's name")
    return {name: dict(own or {}) for name, own in clients.items()}


def _check_numbers(config: FederationConfig) -> None:
    problems = []
    whole = {"rounds": 1, "local_steps": 1, "min_clients": 1, "attempts": 1, "threshold": 1, "secure_weight_bound": 1}
    whole |= {"merge_every": 0, "evaluate_every": 0, "parallel": 0}
    for key, least in whole.items():
        value = getattr(config, key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            problems.append(f"{key} is {value!r}: expected a whole number of at least {least}")
    # Whether zero itself is allowed.
    reals = {"local_epochs": False, "deadline_s": False, "wait_s": True, "max_update_norm": False, "secure_clip": False}
    reals |= {"compression_share": False, "proximal_mu": True, "server_learning_rate": False, "server_tau": False}
    reals |= {"server_momentum": True, "server_beta2": True, "sample": False, "update_noise_multiplier": True}
    reals |= dict.fromkeys(("update_target_epsilon", "update_clip", "update_delta", "update_budget_epsilon"), False)
    for key, zero in reals.items():
        value = getattr(config, key)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if value is not None and not (number and (value > 0 or (zero and value == 0))):
            problems.append(f"{key} is {value!r}: expected a number {'of at least' if zero else 'above'} 0")
    for key in ("compression_share", "server_momentum", "server_beta2", "sample"):
        value = getattr(config, key)
        if isinstance(value, float) and value > 1:
            problems.append(f"{key} is {value!r}: expected at most 1")
    for key in ("secure", "evaluate_clients", "update_dp"):
        if not isinstance(getattr(config, key), bool):
            problems.append(f"{key} is {getattr(config, key)!r}: expected true or false")
    if not isinstance(config.rule_options, Mapping):
        problems.append(f"rule_options is {config.rule_options!r}: expected options and values")
    if problems:
        raise InputError("; ".join(problems))


def _secure_problems(config: FederationConfig) -> list[str]:
    rule = make_rule(config.rule, **config.rule_options)
    problems = []
    if config.secure:
        if not rule.secure:
            problems.append(
                f"rule {config.rule} does not go with secure: it needs each client's update, and under secure "
                "aggregation the server sees their sum only; use fedavg-ab, ffa, rolora or sketch"
            )
        if config.compression != "none":
            problems.append(
                f"compression {config.compression} does not go with secure: masked words are uniform and sums of "
                "compressed updates are not compressed; leave one of them out"
            )
        if config.sampled < 3:
            problems.append(
                f"secure with {config.sampled} clients a round hides nothing: each of two subtracts its own update "
                "from the sum; expected at least 3"
            )
    elif config.threshold is not None:
        problems.append("threshold is given and secure is false: it counts the clients of secure aggregation")
    if config.threshold is not None and config.threshold > config.sampled:
        problems.append(f"threshold is {config.threshold} and {config.sampled} clients are in a round")
    return problems


def _rule_problems(config: FederationConfig) -> list[str]:
    rule: Rule = make_rule(config.rule, **config.rule_options)
    problems = []
    if config.server_optimizer != "none" and not rule.additive:
        problems.append(
            f"server_optimizer {config.server_optimizer} does not go with rule {config.rule}, whose result is not the "
            "state plus a mean change; use fedavg-ab, ffa or rolora"
        )
    if config.server_optimizer == "none" and config.server_learning_rate is not None:
        problems.append("server_learning_rate is given and server_optimizer is none: name one")
    if config.merge_every and config.rule not in ("product", "fedex"):
        problems.append(f"merge_every does not go with rule {config.rule}, which carries nothing beside the adapter")
    if config.merge_every and config.train.quantize != "none":
        problems.append(
            f"merge_every does not go with quantize {config.train.quantize}: a base in 4 bits would round the update "
            "away, and differently on each client; leave one of them out"
        )
    if config.compression != "topk" and config.compression_share != 0.01:
        problems.append(f"compression_share is given and compression is {config.compression}: it belongs to topk")
    return problems


def _count_problems(config: FederationConfig) -> list[str]:
    problems = []
    if isinstance(config.sample, int) and config.sample > len(config.clients):
        problems.append(f"sample is {config.sample} and there are {len(config.clients)} clients")
    if config.least > config.sampled:
        problems.append(f"min_clients is {config.least} and sample {config.sample} asks {config.sampled} in a round")
    least = make_rule(config.rule, **config.rule_options).least_uploads
    if config.least < least:
        problems.append(f"min_clients is {config.least} and rule {config.rule} needs {least} updates")
    if config.train.sharding != "none":
        problems.append(f"sharding {config.train.sharding} does not go with a federation: leave it at none")
    return problems


#: Why noise on what these rules send is of no use.
_NOT_NOISED = {
    "sketch": "it sends two uploads a round, of which each would be a release, and takes its directions from noise",
    "product": "it multiplies the factors that clients send, and with them the noise of A by the noise of B",
    "fedex": "it multiplies the factors that clients send, and with them the noise of A by the noise of B",
}


def _update_problems(config: FederationConfig) -> list[str]:
    given = [item.name for item in dataclasses.fields(config) if item.name.startswith("update_")][1:]
    given = [name for name in given if getattr(config, name) is not None]
    if not config.update_dp:
        return [f"{given[0]} is given and update_dp is false: turn it on, or leave {given[0]} out"] if given else []
    problems = []
    if config.train.dp:
        problems.append(
            "dp and update_dp are both on: dp noises every step and hides an example or a customer, update_dp noises "
            "the whole change and hides a client; choose one"
        )
    if (config.update_noise_multiplier is None) == (config.update_target_epsilon is None):
        problems.append("update_dp needs update_noise_multiplier or update_target_epsilon: give one of them")
    if config.update_delta is not None and config.update_delta * len(config.clients) >= 1:
        problems.append(
            f"update_delta is {config.update_delta:g} with {len(config.clients)} clients: expected less than one over "
            "their number"
        )
    if config.rule in _NOT_NOISED:
        problems.append(
            f"rule {config.rule} does not go with update_dp: {_NOT_NOISED[config.rule]}; use fedavg-ab, ffa or rolora"
        )
    if config.max_update_norm is not None:
        problems.append(
            "max_update_norm does not go with update_dp: a refusal would tell a change's norm, and update_clip makes "
            "every change short enough"
        )
    if config.secure and config.weighting != "equal":
        problems.append(
            f"weighting {config.weighting} does not go with update_dp and secure: a client of many rows would move the "
            "sum by more than its noise is for; set weighting equal"
        )
    if config.update_budget_epsilon is not None and config.update_ledger is None:
        problems.append("update_budget_epsilon is that of a ledger: name its file with update_ledger")
    return problems


def _check_levels(keys: Mapping[str, Any]) -> None:
    """Names the key that was meant where one of privacy by example is given for privacy by update."""
    if keys.get("update_dp") is not True or keys.get("dp"):
        return
    for name in ("noise_multiplier", "target_epsilon", "delta", "ledger", "budget_epsilon"):
        if keys.get(name) is not None:
            raise InputError(f"{name} is given and belongs to dp: with update_dp say update_{name}")
    if keys.get("unit") is not None:
        raise InputError("unit is given and belongs to dp: the unit of update_dp is a client; leave it out")


def make_federation_config(keys: Mapping[str, Any]) -> FederationConfig:
    """A configuration from flat keys, the federation's and the training's together.

    Raises:
        InputError: an unknown key, with near ones, a value out of range, or keys that contradict each other.
    """
    own = {item.name for item in dataclasses.fields(FederationConfig)} - {"train"}
    method = str(keys.get("method", "lora"))
    method = str(SHORTHANDS.get(method, {}).get("method", method))
    theirs = {item.name for item in dataclasses.fields(TrainConfig)} - {"method_config"} | set(aliases_of(TrainConfig))
    if method in METHODS:
        config_type = METHODS[method].config
        theirs |= {item.name for item in dataclasses.fields(config_type)} | set(aliases_of(config_type))
    for name in keys:
        if name in _ELSEWHERE:
            raise InputError(f"{name} is no key of a federation: {_ELSEWHERE[name]}")
        if name not in own | theirs:
            raise unknown_name("configuration key", str(name), own | theirs - set(_ELSEWHERE))
    if "clients" not in keys:
        _named(None)
    _check_levels(keys)
    train = make_config({name: value for name, value in keys.items() if name not in own})
    mine = {name: _number(value) if name != "clients" else value for name, value in keys.items() if name in own}
    return FederationConfig(**mine, train=train)


def read_federation_config(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> FederationConfig:
    """A configuration from a YAML file, `overrides` (the flags) winning.

    Raises:
        InputError: no such file, not a mapping of keys, an unknown key.
    """
    keys = {} if path is None else read_yaml(path)
    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    return make_federation_config({**keys, **given})
