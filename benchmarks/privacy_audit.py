"""An attack on a private training that bounds its epsilon from below; the statement bounds it from above.

    python benchmarks/privacy_audit.py [--noise 6 3 2] [--canaries 2000] [--steps 40] [--sampling-rate 0.25]

Steinke, Nasr and Jagielski, "Privacy auditing with one (1) training run", arXiv 2305.08846. Of m canaries each is in
the data by a coin's toss. After one training, from all noised sums that it let out, an attacker guesses for r of the
canaries whether they were in, and gets v right. Under (epsilon, delta)-privacy of each canary, theorem 5.2:

    P(v or more right) <= P(W >= v) + 2 m delta max_i (P(v - i <= W < v) / i)     W ~ Binomial(r, e^eps / (1 + e^eps))

so that an epsilon for which this is below 5 % is refuted. r is tried at several values, with the 5 % shared out.

The attacker is as strong as the statement allows: it sees every step's noised sum, knows everything but the coins, and
makes the canaries' gradients itself. Each has a direction of its own, with one coordinate in an A and one in a B, and
is 100 times longer than the bound: only if a canary is clipped, its tensors jointly, it moves a sum by no more than
the bound. All else is the training of `deltaw train --dp`: draws, passes, clipping, noise, optimizer.

The second half of the table states the same noise and draws none, which the audit has to find out. What m canaries can
show at most is near log(m / 4).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
import transformers

import deltaw as dw
import deltaw.train.private
from deltaw.core.generators import generator
from deltaw.methods import adapter_parameters
from deltaw.privacy.accounting import PrivacySpec, epsilon
from deltaw.privacy.clipping import ExampleGradients
from deltaw.privacy.noise import SecureNoise
from deltaw.train.losses import SummedLoss
from deltaw.train.private import PoissonBatches, PrivacyPlan, PrivateGradients

CONFIDENCE = 0.95
#: Shares of the canaries for which a guess is made.
GUESSED = (0.02, 0.1, 0.4, 1.0)
#: Canaries' gradients over the clipping bound.
LENGTH = 100.0
TOKENS, VOCAB, REAL_ROWS, CLIP = 8, 64, 32, 0.5


@dataclass(frozen=True)
class Setting:
    """One audited training; the noise that is drawn may be another than what is stated."""

    stated: float
    drawn: float
    canaries: int
    steps: int
    sampling_rate: float
    delta: float = 1e-5
    seed: int = 0


@dataclass(frozen=True)
class Audit:
    """What came of it: the statement, the bound from below, and guesses with how many of them were right."""

    stated_epsilon: float
    lower_bound: float
    guesses: int
    right: int


def p_value(canaries: int, guesses: int, right: int, eps: float, delta: float) -> float:
    """The chance that (eps, delta)-privacy leaves an attacker to be right so often, at most."""
    from scipy.stats import binom

    chance = 1 / (1 + math.exp(-eps))
    below = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, chance))
    worst = float(np.max(below / np.arange(1, right + 1), initial=0.0))
    return min(1.0, float(binom.sf(right - 1, guesses, chance)) + 2 * canaries * delta * worst)


def lower_bound(canaries: int, guesses: int, right: int, delta: float, confidence: float) -> float:
    """The largest epsilon that is refuted at this confidence; 0 where none is."""
    low, high = 0.0, 50.0
    if p_value(canaries, guesses, right, low, delta) > 1 - confidence:
        return 0.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        if p_value(canaries, guesses, right, middle, delta) <= 1 - confidence:
            low = middle
        else:
            high = middle
    return low


class PlantedSink(ExampleGradients):
    """Clips gradients of which some rows are the attacker's."""

    #: Of each row of the micro-batch, its canary, or -1; the coordinates of each canary, (canaries, 2).
    planted = torch.zeros(0, dtype=torch.long)
    coordinates = torch.zeros(0, 2, dtype=torch.long)

    def end(self) -> None:
        """Puts the attacker's gradients in first."""
        rows = self.planted.ge(0).nonzero().flatten()
        sizes = [p.numel() for p in self.parameters.values()]
        flat = torch.zeros(len(rows), sum(sizes))
        at = self.coordinates[self.planted[rows]]
        flat.scatter_(1, at, LENGTH * self.max_grad_norm / math.sqrt(at.shape[1]))
        for (name, p), part in zip(self.parameters.items(), flat.split(sizes, 1), strict=True):
            self._held[name][rows] = part.view(len(rows), *p.shape)
        super().end()


class PlantedGradients(PrivateGradients):
    """Tells its sink which rows are canaries."""

    def _one(self, sink, micro, *rest) -> None:
        sink.planted = torch.tensor(micro.rows) - REAL_ROWS
        super()._one(sink, micro, *rest)


def tiny_model(seed: int):
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        use_cache=False,
    )
    draw = generator(seed, "audit", "weights")
    with torch.random.fork_rng(devices=[]):
        model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape, generator=draw) * 0.1)
    return dw.adapt(model, dw.LoRA(r=8, alpha=16, target_modules="all-linear"), seed=seed).train()


def pairs_of_coordinates(parameters, count: int, seed: int) -> torch.Tensor:
    """A coordinate in an A and one in a B for each canary, no two alike: (count, 2) into all parameters in a row."""
    sides, start = {"lora_A": [], "lora_B": []}, 0
    for name, p in parameters.items():
        sides["lora_A" if "lora_A" in name else "lora_B"] += range(start, start + p.numel())
        start += p.numel()
    assert count <= min(map(len, sides.values())), f"{count} canaries are more than the model has coordinates for"
    draw = generator(seed, "audit", "coordinates")
    return torch.stack(
        [torch.tensor(own)[torch.randperm(len(own), generator=draw)[:count]] for own in sides.values()], 1
    )


def observed(setting: Setting, noise: SecureNoise) -> tuple[torch.Tensor, torch.Tensor]:
    """Which canaries were in, and every noised sum along every canary in units of the bound: (steps, canaries)."""
    model, m = tiny_model(setting.seed), setting.canaries
    parameters = adapter_parameters(model, "default")
    coins = torch.rand(m, generator=generator(setting.seed, "audit", "coins")) < 0.5
    ids = torch.randint(VOCAB, (REAL_ROWS + m, TOKENS), generator=generator(setting.seed, "audit", "rows"))
    units = [[row] for row in range(REAL_ROWS)] + [[REAL_ROWS + i] for i in coins.nonzero().flatten().tolist()]
    plan = PrivacyPlan(setting.drawn, CLIP, setting.sampling_rate, setting.steps, setting.delta, "example", units)
    gradients = PlantedGradients(model, "default", plan, SummedLoss(model, "causal-lm"), noise=noise)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
    at = PlantedSink.coordinates = pairs_of_coordinates(parameters, m, setting.seed)
    batches = PoissonBatches(plan, [TOKENS] * len(ids), steps=setting.steps, micro_batch_size=64, noise=noise)
    seen = []
    for step in batches:
        gradients([(micro, {"input_ids": ids[micro.rows], "labels": ids[micro.rows]}) for micro in step])
        flat = torch.cat([p.grad.flatten() for p in parameters.values()]) * plan.expected_units / CLIP
        seen.append(flat[at].sum(1) / math.sqrt(at.shape[1]))
        optimizer.step()
    return coins, torch.stack(seen)


def scores(seen: torch.Tensor, setting: Setting) -> torch.Tensor:
    """The log-likelihood ratio of in to out for each canary, with what a real row adds taken as noise."""
    sigma, rate = max(setting.drawn, 0.1), setting.sampling_rate
    ratio = (2 * seen.double() - 1) / (2 * sigma**2)
    if rate < 1:
        ratio = torch.logaddexp(torch.tensor(math.log1p(-rate)), math.log(rate) + ratio)
    return ratio.sum(0)


def audit(setting: Setting, *, noise: SecureNoise | None = None) -> Audit:
    """Trains, attacks, and bounds."""
    own = deltaw.train.private.ExampleGradients
    deltaw.train.private.ExampleGradients = PlantedSink
    try:
        coins, seen = observed(setting, noise or SecureNoise())
    finally:
        deltaw.train.private.ExampleGradients = own
    ratios = scores(seen, setting)
    # The surest first.
    hits = ((ratios > 0) == coins)[ratios.abs().argsort(descending=True)]
    confidence = 1 - (1 - CONFIDENCE) / len(GUESSED)
    best = (-1.0, 0, 0)
    for share in GUESSED:
        guesses = round(share * setting.canaries)
        right = int(hits[:guesses].sum())
        best = max(best, (lower_bound(setting.canaries, guesses, right, setting.delta, confidence), guesses, right))
    spec = PrivacySpec(
        unit="example",
        sampling_rate=setting.sampling_rate,
        noise_multiplier=setting.stated,
        steps=setting.steps,
        delta=setting.delta,
        sampling="poisson" if setting.sampling_rate < 1 else "full",
    )
    return Audit(epsilon(spec).epsilon, *best)


def main() -> None:
    """Prints the table, writes JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", nargs="*", type=float, default=[6.0, 3.0, 2.0, 1.5])
    parser.add_argument("--canaries", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--sampling-rate", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.canaries} canaries, {args.steps} steps at rate {args.sampling_rate:g}, delta 1e-5\n")
    print("| noise stated | drawn | epsilon stated | epsilon at least, 95 % | guesses right | s |")
    print("|---|---|---|---|---|---|")
    rows, wrong = [], False
    for off in (False, True):
        for stated in args.noise:
            began = time.perf_counter()
            drawn = 0.0 if off else stated
            setting = Setting(stated, drawn, args.canaries, args.steps, args.sampling_rate, seed=args.seed)
            found = audit(setting)
            rows.append(asdict(setting) | asdict(found))
            wrong |= not off and found.lower_bound > found.stated_epsilon
            seconds = time.perf_counter() - began
            right = f"{found.right} of {found.guesses}"
            print(
                f"| {stated:g} | {drawn:g} | {found.stated_epsilon:.3f} | {found.lower_bound:.3f} | {right} | "
                f"{seconds:.1f} |",
                flush=True,
            )
    if args.out:
        with open(args.out, "w") as file:
            json.dump(rows, file, indent=1)
    if wrong:
        sys.exit("a bound lies above what was stated: run it again, and if it stays there, the statement is wrong")


if __name__ == "__main__":
    main()
