from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
import torch

from onlinesel import Ledger, Selector, Signals, When
from onlinesel.ledger import runs as _runs
from onlinesel.strategies import InfoBatch
from onlinesel.strategies.info_batch import prune_weights

GOLDEN = Path(__file__).parents[1] / "golden" / "loss_reweight.json"
NAN = float("nan")


def seen(strategy: InfoBatch, losses: list[float], seed: int = 0) -> Selector:
    selector = Selector(strategy, seed=seed)
    selector.observe(Signals(ids=torch.arange(len(losses)), loss=torch.tensor(losses)))
    return selector


def test_a_flipped_comparison_would_drop_the_hard_rows() -> None:
    draws = torch.tensor([0.1, 0.9, 0.1, 0.9, 0.1])
    loss = torch.tensor([1.0, 1.0, 5.0, 5.0, NAN])
    found = prune_weights(loss, torch.tensor(3.0), draws, 0.75)
    assert found.tolist() == [0.0, 4.0, 1.0, 1.0, 1.0]


def test_a_loss_equal_to_the_mean_is_not_below_it() -> None:
    draws = torch.zeros(2)
    assert prune_weights(torch.tensor([3.0, 2.9]), torch.tensor(3.0), draws, 0.5).tolist() == [1, 0]


def test_an_empty_ledger_drops_nothing() -> None:
    for initial in (None, 3.0):
        selector = Selector(InfoBatch(prune=0.99, initial_loss=initial))
        assert selector.select(Signals(ids=torch.arange(9))).weights.tolist() == [1.0] * 9


def test_a_row_never_seen_trains_unless_it_has_an_initial_loss() -> None:
    ids = torch.arange(100, 140)
    assert seen(InfoBatch(), [5.0]).select(Signals(ids=ids)).weights.tolist() == [1.0] * 40
    below = seen(InfoBatch(initial_loss=3.0), [5.0]).select(Signals(ids=ids)).weights
    assert set(below.tolist()) == {0.0, 2.0}
    above = seen(InfoBatch(initial_loss=5.0), [5.0]).select(Signals(ids=ids)).weights
    assert above.tolist() == [1.0] * 40


def test_the_last_loss_counts_and_a_skipped_row_keeps_its_own() -> None:
    selector = seen(InfoBatch(prune=0.9), [1.0, 9.0])
    selector.observe(Signals(ids=torch.tensor([1]), loss=torch.tensor([0.5])))
    # Losses are now 1.0 and 0.5, with mean 0.75.
    for _ in range(20):
        weights = selector.select(Signals(ids=torch.tensor([0, 1]))).weights
        assert weights[0] == 1.0 and weights[1] != 1.0


def test_a_loss_that_is_not_finite_leaves_the_row_unseen() -> None:
    selector = seen(InfoBatch(prune=0.9), [1.0, NAN, 9.0])
    for _ in range(20):
        assert selector.select(Signals(ids=torch.arange(3))).weights[1:].tolist() == [1.0, 1.0]


def test_every_row_has_the_expected_weight_one() -> None:
    losses, ids, draws = [1.0, 2.0, 3.0, 10.0], torch.arange(4), 4000
    selector = seen(InfoBatch(prune=0.3), losses)
    weights = torch.stack([selector.select(Signals(ids=ids)).weights for _ in range(draws)])
    assert weights[:, 3].tolist() == [1.0] * draws
    error = weights[:, :3].std(dim=0) / draws**0.5
    assert bool(((weights[:, :3].mean(dim=0) - 1).abs() < 4 * error).all())
    share = (weights[:, :3] == 0).float().mean().item()
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / (3 * draws)) ** 0.5


def test_annealing_is_a_window() -> None:
    selector = Selector(When(InfoBatch(prune=0.9), stop=10))
    signals = Signals(ids=torch.arange(30), loss=torch.arange(30.0))
    selector.observe(signals)
    assert selector.select(signals, step=9).weights.min() == 0.0
    assert selector.select(signals, step=10).weights.tolist() == [1.0] * 30


def test_a_window_that_keeps_old_keys_changes_nothing() -> None:
    """Runs of the ledger come and go; a combinator may keep the keys of those that went."""
    with mock.patch.object(_runs, "SMALL", 1):
        plain, inside = Selector(InfoBatch()), Selector(When(InfoBatch(), stop=10**6))
        for step in range(60):
            ids = torch.arange(step % 7, step % 7 + 1 + step % 5)
            signals = Signals(ids=ids, loss=torch.full(ids.shape, 1.0 + step % 3))
            weights = [selector.select(signals).weights for selector in (plain, inside)]
            assert torch.equal(*weights)
            for selector in (plain, inside):
                selector.observe(signals)


def test_ranks_that_decided_alone_are_united() -> None:
    """Row 1 was seen twice on the first rank, row 2 once on each: the later rank counts."""
    first = seen(InfoBatch(), [9.0, 9.0, 9.0])
    first.observe(Signals(ids=torch.tensor([1]), loss=torch.tensor([5.0])))
    second = Selector(InfoBatch())
    second.observe(Signals(ids=torch.tensor([1, 2, 7]), loss=torch.tensor([4.0, 3.0, 1.0])))
    states = [
        {k.removeprefix("state."): v for k, v in s.state_dict()["tensors"].items()}
        for s in (first, second)
    ]
    ledger = Ledger.from_state(InfoBatch().merge(states))
    assert ledger.table["ids"].tolist() == [0, 1, 2, 7]
    assert ledger.table["loss"].tolist() == [9.0, 5.0, 3.0, 1.0] and float(ledger.mean) == 4.5


def test_observing_without_ids_is_refused() -> None:
    with pytest.raises(ValueError, match=r"InfoBatch: signals must hold 'ids', got \['loss'\]\."):
        Selector(InfoBatch()).observe(Signals(loss=torch.ones(2)))


def test_golden_vectors() -> None:
    golden = json.loads(GOLDEN.read_text("utf-8"))
    wanted = golden["baselines_on_spread8"]
    losses = golden["cases"]["spread8"]["losses"]
    touched: set[int] = set()
    values: set[float] = set()
    for seed in range(20):
        selector = seen(InfoBatch(), losses, seed)
        weights = selector.select(Signals(ids=torch.arange(8))).weights
        touched |= set((weights != 1).nonzero().flatten().tolist())
        values |= set(weights.tolist())
    assert sorted(touched) == wanted["infobatch_prunable"]
    assert values == {0.0, 1.0, wanted["infobatch_rescale_prune_ratio_0.5"]}
    assert sum(losses) / 8 == wanted["infobatch_scores_mean"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prune": 1.0}, r"InfoBatch: prune must be in \[0, 1\), got 1\.0\. Use the paper's 0\.5"),
        ({"prune": -0.1}, r"InfoBatch: prune must be in \[0, 1\), got -0\.1\. "),
        ({"divide_by": "tokens"}, r"InfoBatch: divide_by must be 'weights' or 'rows', got 'tok"),
        ({"initial_loss": NAN}, r"InfoBatch: initial_loss must be finite or None, got nan\. Use"),
    ],
)
def test_errors(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InfoBatch(**arguments)
