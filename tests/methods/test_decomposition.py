"""Two worked 4 x 5 matrices: rank, factors, magnitudes and directions, with every number held to four digits."""

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.checkpoint import factored
from deltaw.core.protocols import LowRank
from deltaw.methods.host import parts_of

C1, C2 = (torch.tensor(c, dtype=torch.float64) for c in ([1, 2, 3, 4], [7, 10, 15, 12]))
#: Columns c1, c2, 2 c1, c1 + c2, c1 + 2 c2.
TWO = torch.stack([C1, C2, 2 * C1, C1 + C2, C1 + 2 * C2], dim=1)
#: What some texts print as of rank 2: c4 = c1 + c2 and c5 = c1 + 2 c3, but c3 is no multiple of c1.
THREE = torch.tensor(
    [[1, 7, 2, 8, 5], [2, 10, 4, 12, 10], [3, 15, 12, 18, 27], [4, 12, 16, 16, 36]], dtype=torch.float64
)
NORMS = {"two": [5.4772, 22.7596, 10.9545, 28.0713, 50.8134], "three": [5.4772, 22.7596, 20.4939, 28.0713, 46.3681]}
DIRECTIONS_OF_THREE = [
    [0.1826, 0.3076, 0.0976, 0.2850, 0.1078],
    [0.3651, 0.4394, 0.1952, 0.4275, 0.2157],
    [0.5477, 0.6591, 0.5855, 0.6412, 0.5823],
    [0.7303, 0.5272, 0.7807, 0.5700, 0.7764],
]
MATRICES = {"two": (TWO, 2), "three": (THREE, 3)}


def product(low):
    return low.scale * low.B.double() @ low.A.double()


@pytest.mark.parametrize("name", MATRICES)
def test_the_ranks(name):
    W, rank = MATRICES[name]
    assert factored.rank(factored.of_matrix(W)) == rank == int(torch.linalg.matrix_rank(W))
    s = factored.singular_values(factored.of_matrix(W))
    assert factored.rank_for_energy(s, 1 - 1e-14) == rank


def test_the_first_is_two_columns_and_their_multiples():
    by_hand = LowRank(torch.tensor([[1.0, 0, 2, 1, 1], [0, 1, 0, 1, 2]]), torch.stack([C1, C2], dim=1), 1.0)
    assert torch.equal(product(by_hand), TWO)
    assert (tuple(by_hand.B.shape), tuple(by_hand.A.shape)) == ((4, 2), (2, 5))
    assert (by_hand.B.numel() + by_hand.A.numel(), TWO.numel()) == (18, 20)
    for found in (factored.truncated(factored.of_matrix(TWO), 2), factored.truncated_matrix(TWO, 2)):
        assert (found.B.shape, found.A.shape) == (by_hand.B.shape, by_hand.A.shape)
        torch.testing.assert_close(product(found), TWO, rtol=0, atol=1e-12)
        assert factored.distance(found, by_hand) < 1e-12


def test_the_second_needs_a_third_direction():
    assert torch.equal(THREE[:, 3], THREE[:, 0] + THREE[:, 1]) and torch.equal(
        THREE[:, 4], THREE[:, 0] + 2 * THREE[:, 2]
    )
    whole = factored.of_matrix(THREE)
    s = factored.singular_values(whole)
    assert s.tolist() == pytest.approx([61.5269, 10.9522, 0.7008, 0], abs=5e-5)
    third = float(s[2])
    assert factored.distance(factored.truncated(whole, 2), whole) == pytest.approx(third, rel=1e-9)
    exact = factored.truncated(whole, 3)
    torch.testing.assert_close(product(exact), THREE, rtol=0, atol=1e-12)
    # Three directions of a 4 x 5 matrix take more numbers than the matrix.
    assert exact.A.numel() + exact.B.numel() == 27 > THREE.numel()


@pytest.mark.parametrize(("name", "left"), [("two", 0.0), ("three", 0.7008)])
def test_shrinking_an_update_that_is_the_matrix(name, left):
    W, _ = MATRICES[name]
    model = dw.adapt(nn.Sequential(nn.Linear(5, 4)), dw.LoRA(r=4, alpha=8, target_modules=["0"]), dtype=torch.float64)
    ((_, _, part),) = parts_of(model, "default")
    with torch.no_grad():
        part.lora_B.copy_(torch.eye(4))
        part.lora_A[:] = W / part.scale
    report = dw.shrink(model, r=2)
    assert (part.lora_B.shape, part.lora_A.shape, part.scale) == ((4, 2), (2, 5), 2.0)
    assert report.sites["0"].distance == pytest.approx(left, abs=5e-5)
    assert report.relative_error == pytest.approx(left / float(W.norm()), abs=1e-6)
    assert float((part.delta() - W).norm()) == pytest.approx(left, abs=5e-5)


@pytest.mark.parametrize("name", MATRICES)
def test_dora_takes_the_columns_norms_as_rows_of_what_is_stored(name):
    W, _ = MATRICES[name]
    # x W with W (in 4, out 5) is a linear whose weight is stored transposed, (out 5, in 4).
    linear = nn.Linear(4, 5, bias=False, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(W.T)
    x = torch.arange(8, dtype=torch.float64).view(2, 4)
    torch.testing.assert_close(linear(x), x @ W)
    dw.adapt(nn.Sequential(linear), dw.DoRA(r=2, target_modules=["0"]), dtype=torch.float64)
    (part,) = linear.adapted.parts["default"]
    assert part.magnitude.tolist() == pytest.approx(NORMS[name], abs=5e-5)
    torch.testing.assert_close(part.magnitude.detach(), W.norm(dim=0))
    directions = linear.weight / part.magnitude[:, None]
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(5, dtype=torch.float64))
    if name == "three":
        torch.testing.assert_close(directions.T.detach(), torch.tensor(DIRECTIONS_OF_THREE).double(), atol=5e-5, rtol=0)
    # The columns of the stored matrix are the inputs: four numbers, and another parametrisation.
    assert part.magnitude.shape == (5,) and linear.weight.norm(dim=0).shape == (4,)


def test_doras_magnitude_stays_when_the_direction_moves():
    linear = nn.Linear(4, 5, bias=False, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(TWO.T)
    dw.adapt(nn.Sequential(linear), dw.DoRA(r=2, target_modules=["0"]), dtype=torch.float64)
    (part,) = linear.adapted.parts["default"]
    with torch.no_grad():
        part.lora_B.copy_(torch.arange(10.0).view(5, 2))
    moved = linear.weight + part.delta()
    assert not torch.allclose(moved, linear.weight)
    assert moved.norm(dim=1).tolist() == pytest.approx(NORMS["two"], abs=5e-5)
