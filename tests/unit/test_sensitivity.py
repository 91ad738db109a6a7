import numpy as np
import pytest
import torch

from ardtrain.arena import ArenaLayout, Shard
from ardtrain.methods.elalora import ElaLora
from ardtrain.methods.sensitivity import component_scores, row_sums, update_averages
from ardtrain.ranks import RankTable
from tests.tiny import ELALORA, equal_bits, sites_of


def test_averages_by_hand():
    """methods.md 2.9.1, I = 0.1 then 0.2."""
    mean, spread = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    wanted = [(0.015, 0.01275, 0.00019125), (0.04275, 0.034425, 0.00147166875)]
    for importance, (m, s, score) in zip((0.1, 0.2), wanted, strict=True):
        # I = |w g|: the sign of neither counts.
        update_averages(
            mean,
            spread,
            torch.tensor([-2.0], dtype=torch.float64),
            torch.tensor([importance / 2], dtype=torch.float64),
            beta1=0.85,
            beta2=0.85,
        )
        assert mean.item() == pytest.approx(m, rel=1e-14)
        assert spread.item() == pytest.approx(s, rel=1e-14)
        assert (mean * spread).item() == pytest.approx(score, rel=1e-14)


def test_averages_against_numpy():
    numbers = np.random.default_rng(0)
    mean, spread = torch.zeros(50), torch.zeros(50)
    mean_np, spread_np = np.zeros(50), np.zeros(50)
    for _ in range(20):
        w, g = numbers.normal(size=(2, 50)).astype(np.float32)
        update_averages(mean, spread, torch.from_numpy(w), torch.from_numpy(g), beta1=0.85, beta2=0.7)
        importance = np.abs(w.astype(np.float64) * g)
        mean_np = 0.85 * mean_np + (1 - 0.85) * importance
        spread_np = 0.7 * spread_np + (1 - 0.7) * np.abs(importance - mean_np)
    np.testing.assert_allclose(mean.numpy(), mean_np, rtol=1e-5)
    np.testing.assert_allclose(spread.numpy(), spread_np, rtol=1e-4)


def test_averages_leave_their_inputs_alone():
    w, g = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 4.0])
    update_averages(torch.zeros(2), torch.zeros(2), w, g, beta1=0.5, beta2=0.5)
    assert (w.tolist(), g.tolist()) == ([1.0, -2.0], [3.0, 4.0])


@pytest.mark.parametrize("columns", [1, 2, 3, 7, 8, 100])
def test_row_sums_add_every_column_once(columns):
    values = torch.arange(3 * columns, dtype=torch.float64).view(3, columns)
    assert torch.equal(row_sums(values), values.sum(dim=1))


def test_row_sum_does_not_depend_on_the_other_rows():
    values = torch.randn(17, 333, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = row_sums(values)
    for start, stop in ((0, 1), (3, 10), (16, 17)):
        assert equal_bits(row_sums(values[start:stop]), whole[start:stop])


def test_component_score_is_diagonal_plus_row_means():
    """S_i = score(E_i) + mean_j score(B[i, j]) + mean_j score(A[i, j]), methods.md 2.2."""
    layout = ArenaLayout(RankTable.start(sites_of((3, 4), (2, 2)), [2, 1]), ElaLora(ELALORA).entries)
    generator = torch.Generator().manual_seed(1)
    mean = torch.rand(layout.size, generator=generator)
    spread = torch.rand(layout.size, generator=generator)
    scores = component_scores(Shard(layout, 0, 1), mean, spread, 3)
    wanted = []
    for site, rank in ((0, 2), (1, 1)):
        m, s = layout.site_rows(mean.double(), site), layout.site_rows(spread.double(), site)
        wanted += [sum(float((m[part][i] * s[part][i]).mean()) for part in m) for i in range(rank)]
    assert scores.tolist() == pytest.approx(wanted, rel=1e-14)
