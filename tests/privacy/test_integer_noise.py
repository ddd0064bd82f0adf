import math

import mpmath
import numpy as np
import pytest
import torch
from scipy import linalg, special, stats

from deltaw.core.errors import InputError, RunError
from deltaw.core.generators import generator
from deltaw.privacy import integer_noise
from deltaw.privacy.integer_noise import (
    discrete_gaussian,
    discrete_gaussian_rdp,
    l1_bound,
    norm_bound,
    rotated,
    rounded,
    skellam,
    skellam_rdp,
)
from deltaw.privacy.noise import SecureNoise

KEY = bytes(range(32))
#: A fresh stream fails a right sampler once in 10^9 runs.
SAFE = 1e-9
SOURCES = [lambda: SecureNoise(insecure_test_key=KEY), SecureNoise]


def gaussian_pmf(sigma, reach):
    x = np.arange(-reach, reach + 1)
    weight = np.exp(-(x**2) / (2 * sigma**2))
    return weight / weight.sum()


def skellam_pmf(variance, reach):
    """By convolving the two Poissons, in float64."""
    x = np.arange(0, int(variance) + 60 + 12 * int(math.sqrt(variance)))
    p = stats.poisson.pmf(x, variance / 2)
    both = np.convolve(p, p[::-1])
    middle = len(p) - 1
    return both[middle - reach : middle + reach + 1]


def fits(samples, pmf):
    """The chi-square test, with values of fewer than 8 expected pooled into the two tails."""
    reach = len(pmf) // 2
    expected = pmf * len(samples)
    near = np.flatnonzero(expected >= 8)
    low, high = near[0], near[-1]
    counts = np.bincount(np.clip(samples + reach, 0, 2 * reach), minlength=2 * reach + 1)
    pool = lambda v: np.concatenate([[v[: low + 1].sum()], v[low + 1 : high], [v[high:].sum()]])  # noqa: E731
    got, wanted = pool(counts), pool(expected)
    return stats.chisquare(got, wanted * got.sum() / wanted.sum()).pvalue > SAFE


@pytest.mark.parametrize("source", SOURCES, ids=["key", "fresh"])
@pytest.mark.parametrize("sigma", [0.3, 1.0, 3.7, 4.0, 60.5])
def test_the_discrete_gaussian_has_its_law(source, sigma):
    x = discrete_gaussian((300, 500), sigma=sigma, noise=source())
    assert x.shape == (300, 500) and x.dtype == torch.int64
    assert fits(x.view(-1).numpy(), gaussian_pmf(sigma, int(12 * sigma) + 12))


@pytest.mark.parametrize("source", SOURCES, ids=["key", "fresh"])
@pytest.mark.parametrize("variance", [0.02, 1.0, 9.3, 40.0, 3000.0])
def test_skellam_noise_has_its_law(source, variance):
    x = skellam((150_000,), variance=variance, noise=source())
    assert fits(x.numpy(), skellam_pmf(variance, int(10 * math.sqrt(variance)) + 20))


@pytest.mark.parametrize("mean", [0.01, 2.5, 15.9, 16.0, 31.7])
def test_poisson_numbers_have_their_law(mean):
    x = integer_noise._poisson((150_000,), mean, SecureNoise()).numpy() + math.floor(mean)
    assert x.min() >= 0
    pmf = stats.poisson.pmf(np.arange(-200, 201), mean)
    assert fits(x, pmf)


@pytest.mark.parametrize("draw", [lambda s, n: discrete_gaussian((60_000,), sigma=s, noise=n),
                                  lambda s, n: skellam((60_000,), variance=s * s, noise=n)])  # fmt: skip
@pytest.mark.parametrize("sigma", [2.0**12 + 0.4, 2.0**30])
def test_large_noise_is_nearly_normal(draw, sigma):
    x = draw(sigma, SecureNoise()).double().numpy()
    assert stats.kstest(x / sigma, "norm").pvalue > SAFE
    assert len(np.unique(x % 16)) == 16


def test_shares_of_skellam_noise_sum_to_their_whole():
    total = sum(skellam((30_000,), variance=12.5, noise=SecureNoise()) for _ in range(4))
    assert fits(total.numpy(), skellam_pmf(50.0, 120))


@pytest.mark.parametrize(
    "draw",
    [
        lambda noise: discrete_gaussian((150,), sigma=0.7, noise=noise),
        lambda noise: discrete_gaussian((150,), sigma=1234.5, noise=noise),
        lambda noise: skellam((80,), variance=5.0, noise=noise),
        lambda noise: skellam((80,), variance=100.0, noise=noise),
        lambda noise: skellam((80,), variance=1e9, noise=noise),
    ],
)
def test_decisions_in_many_digits_are_those_of_float64(monkeypatch, draw):
    """With every decision left open, exact arithmetic takes each; all but one in 10^9 have one right answer."""
    fast = draw(SecureNoise(insecure_test_key=KEY))
    original, open_ = integer_noise._accepted, []

    def all_open(log_p, error, exact, noise):
        open_.append(len(log_p))
        return original(log_p, torch.full_like(error, math.inf), exact, noise)

    monkeypatch.setattr(integer_noise, "_accepted", all_open)
    assert torch.equal(draw(SecureNoise(insecure_test_key=KEY)), fast)
    assert sum(open_) > len(fast)


@pytest.mark.parametrize(
    "bits, p, wanted", [(0, 1.0, True), (2**63 - 1, 1.0, True), (2**62, 0.25, False), (2**62, 0.75, True)]
)
def test_single_decisions(bits, p, wanted):
    assert integer_noise._decided(bits, lambda: mpmath.log(p)) is wanted


def test_a_decision_at_the_edge_goes_by_the_bits_that_follow():
    """0.5 exactly, and 63 bits that begin with the same: below it with the chance of what follows."""
    log_p = lambda: mpmath.log(mpmath.mpf(2) ** -1 + mpmath.mpf(2) ** -64)  # noqa: E731
    taken = sum(integer_noise._decided(2**62, log_p) for _ in range(400))
    assert stats.binomtest(taken, 400, 0.5).pvalue > SAFE


@pytest.mark.parametrize("mean", [0.3, 15.5, 16.5, 100.25, 1e6 + 0.3, 2.0**40 + 0.5, 2.0**59])
def test_the_error_bound_of_poisson_weights_holds(mean):
    centre, width = math.floor(mean), math.floor(math.sqrt(mean)) + 1
    y = torch.randint(-30 * width, 30 * width + 1, (300,), generator=generator(5, str(mean)))
    y = torch.cat(
        [torch.arange(-centre, -centre + 20) if centre < 1e6 else y[:0], y[y >= -centre], torch.tensor([0, 1])]
    )
    got = integer_noise._log_poisson(y, centre, mean) + y.abs().double() / width
    bound = integer_noise._poisson_error(y, width)
    with mpmath.workprec(300):
        for k, value, error in zip(y.tolist(), got.tolist(), bound.tolist(), strict=True):
            ratio = k * mpmath.log(mpmath.mpf(mean)) - mpmath.loggamma(centre + k + 1) + mpmath.loggamma(centre + 1)
            assert abs(ratio + mpmath.mpf(abs(k)) / width - mpmath.mpf(value)) < error / 4


def test_zero_noise_and_empty_shapes():
    noise = SecureNoise()
    assert torch.equal(discrete_gaussian((3,), sigma=0.0, noise=noise), torch.zeros(3, dtype=torch.int64))
    assert torch.equal(skellam((3,), variance=0.0, noise=noise), torch.zeros(3, dtype=torch.int64))
    assert discrete_gaussian((0,), sigma=1.0, noise=noise).shape == (0,)
    assert skellam((), variance=2.0, noise=noise).shape == ()


@pytest.mark.parametrize("size", [1, 2, 3, 64, 100, 1000])
def test_the_rotation_is_the_dense_hadamard_product(size):
    v = torch.randn(size, dtype=torch.float64, generator=generator(0, "v"))
    padded = 1 << (size - 1).bit_length()
    matrix = torch.from_numpy(linalg.hadamard(padded).astype(np.float64)) / math.sqrt(padded)
    signs = rotated(torch.ones(padded, dtype=torch.float64), seed=7)
    signs = matrix @ signs
    assert torch.equal(signs.round().abs(), torch.ones(padded)) and torch.allclose(signs, signs.round())
    whole = torch.zeros(padded, dtype=torch.float64)
    whole[:size] = v
    got = rotated(v, seed=7)
    torch.testing.assert_close(got, matrix @ (signs.round() * whole), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rotated(got, seed=7, inverse_size=size), v, rtol=1e-12, atol=1e-12)
    if size > 64:
        assert not torch.allclose(rotated(v, seed=8), got)
    kept = v.clone()
    rotated(v, seed=7)
    assert torch.equal(v, kept)


@pytest.mark.parametrize("clip, granularity, dim", [(1.0, 1e-4, 500), (0.3, 0.1, 40), (1.0, 1.0, 7), (5.0, 100.0, 3)])
def test_rounded_vectors_are_clipped_short_and_right_on_average(clip, granularity, dim):
    v = torch.randn(dim, generator=generator(dim, "v")) * clip
    inside = v.double() * min(1.0, clip / float(v.double().norm())) / granularity
    bound = norm_bound(clip=clip, granularity=granularity, dim=dim)
    assert bound == pytest.approx(
        min(
            clip / granularity + math.sqrt(dim),
            math.sqrt((clip / granularity) ** 2 + dim / 4 + (clip / granularity + math.sqrt(dim) / 2)),
        )
    )
    noise, total, count = SecureNoise(), torch.zeros(dim, dtype=torch.float64), 500
    # Rounding again what is too long biases the mean where steps are coarse: a beta near 0 leaves that out.
    for _ in range(count):
        one = rounded(v, granularity=granularity, clip=clip, noise=noise, beta=1e-9)
        assert one.dtype == torch.int64 and ((one - inside).abs() < 1).all()
        total += one
        tight = rounded(v, granularity=granularity, clip=clip, noise=noise)
        assert float(tight.double().norm()) <= bound
    share = inside - inside.floor()
    spread = (share * (1 - share) / count).sqrt()
    assert ((total / count - inside).abs() <= 7 * spread + 1e-9).all()


def test_whole_numbers_stay_as_they_are():
    v = torch.tensor([3.0, -4.0, 0.0])
    assert rounded(v, granularity=0.5, clip=5.0, noise=SecureNoise()).tolist() == [6, -8, 0]
    assert rounded(torch.zeros(0), granularity=0.5, clip=5.0, noise=SecureNoise()).tolist() == []


def renyi(p, q, order):
    """Of two laws on the integers, over where float64 has both well."""
    keep = (p > 1e-200) & (q > 1e-200)
    return float(special.logsumexp(order * np.log(p[keep]) + (1 - order) * np.log(q[keep]))) / (order - 1)


@pytest.mark.parametrize("order", [2, 5, 16])
@pytest.mark.parametrize("variance, shift", [(4.0, 1), (50.0, 3), (50.0, 1)])
def test_the_skellam_bound_is_above_the_divergence_and_near(order, variance, shift):
    pmf = skellam_pmf(variance, int(9 * math.sqrt(variance)))
    true = renyi(pmf[shift:], pmf[:-shift], order)
    bound = skellam_rdp(order, l2=shift, l1=shift, variance=variance)
    assert true <= bound * (1 + 1e-9)
    assert order * shift**2 / (2 * variance) <= bound
    if variance > 20:
        assert bound < 1.35 * true


@pytest.mark.parametrize("clients", [1, 2, 5])
@pytest.mark.parametrize("sigma", [0.4, 0.8, 2.0])
def test_the_discrete_gaussian_bound_is_above_the_divergence_of_the_sum(clients, sigma):
    one = gaussian_pmf(sigma, 60)
    total = one
    for _ in range(clients - 1):
        total = np.convolve(total, one)
    for order in (2, 8):
        true = renyi(total[1:], total[:-1], order)
        bound = discrete_gaussian_rdp(order, l2=1.0, dim=1, sigma=sigma, clients=clients)
        assert true <= bound * (1 + 1e-9)
        if sigma == 2.0:
            assert bound == pytest.approx(order / (2 * clients * sigma**2), rel=1e-6)


def test_tau_counts_where_the_noise_is_fine():
    sigma, clients, dim, order = 0.6, 4, 100, 8
    tau = 10 * sum(math.exp(-2 * math.pi**2 * sigma**2 * k / (k + 1)) for k in (1, 2, 3))
    wanted = min(
        order / (2 * clients * sigma**2) * 9 + 2 * tau * dim,
        order / 2 * (3 / (sigma * 2) + tau * math.sqrt(dim)) ** 2,
    )
    assert discrete_gaussian_rdp(order, l2=3.0, dim=dim, sigma=sigma, clients=clients) == pytest.approx(wanted)


def test_the_l1_bound_holds_for_integer_vectors():
    v = torch.randint(-2, 3, (50,), generator=generator(1, "v"))
    l2 = float(v.double().norm())
    assert int(v.abs().sum()) <= l1_bound(l2, 50)
    assert l1_bound(2.0, 100) == 4.0 and l1_bound(50.0, 4) == 100.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: discrete_gaussian((3,), sigma=-1.0, noise=SecureNoise()),
        lambda: discrete_gaussian((3,), sigma=2.0**31, noise=SecureNoise()),
        lambda: skellam((3,), variance=-1.0, noise=SecureNoise()),
        lambda: skellam((3,), variance=math.nan, noise=SecureNoise()),
        lambda: rounded(torch.tensor([math.nan]), granularity=1.0, clip=1.0, noise=SecureNoise()),
        lambda: rounded(torch.ones(3), granularity=1e-12, clip=1.0, noise=SecureNoise()),
        lambda: rounded(torch.ones(3), granularity=0.0, clip=1.0, noise=SecureNoise()),
        lambda: norm_bound(clip=1.0, granularity=1.0, dim=3, beta=1.0),
    ],
)
def test_wrong_arguments_are_refused(call):
    with pytest.raises(InputError):
        call()


def test_a_bound_that_no_rounding_meets_ends(monkeypatch):
    monkeypatch.setattr(integer_noise, "norm_bound", lambda **_: 0.5)
    with pytest.raises(RunError, match="choose a beta"):
        rounded(torch.ones(3), granularity=1.0, clip=10.0, noise=SecureNoise())
