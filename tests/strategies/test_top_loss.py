from __future__ import annotations

import json
from pathlib import Path

import torch

from onlinesel import Selector, Signals
from onlinesel.strategies import TopLoss
from onlinesel.strategies.top_loss import loss_rows

GOLDEN = Path(__file__).parents[1] / "golden" / "loss_reweight.json"
LOSS = torch.tensor([0.5, 3.0, 3.0, 9.0, 0.25])


def keep(strategy: TopLoss, loss: torch.Tensor, count: int) -> list[int]:
    return Selector(strategy).select(Signals(loss=loss), keep=count).rows.tolist()


def test_a_flipped_sign_would_keep_the_smallest() -> None:
    assert keep(TopLoss(), LOSS, 1) == [3]
    assert keep(TopLoss(lowest=True), LOSS, 1) == [4]


def test_ties_go_to_the_lower_id_at_both_ends() -> None:
    ids = torch.tensor([4, 8, 6, 2, 0])
    assert loss_rows(LOSS, 2, ids).tolist() == [0, 0, 1, 1, 0]
    tied = torch.tensor([2.0, 1.0, 1.0, 5.0, 5.0])
    assert loss_rows(tied, 1, ids, lowest=True).tolist() == [0, 0, 1, 0, 0]


def test_a_loss_of_infinity_is_not_the_largest_loss() -> None:
    loss = torch.tensor([1.0, float("inf"), 2.0, float("nan"), float("-inf")])
    assert keep(TopLoss(), loss, 1) == [2]
    assert keep(TopLoss(lowest=True), loss, 1) == [0]
    assert keep(TopLoss(), loss, 5) == [0, 2]


def test_the_scores_in_the_report_are_the_losses() -> None:
    selector = Selector(TopLoss())
    assert torch.equal(selector.select(Signals(loss=LOSS), keep=2).scores, LOSS)
    assert selector.metrics()["score_kept"] == 6.0


def test_golden_vectors() -> None:
    golden = json.loads(GOLDEN.read_text("utf-8"))
    loss = torch.tensor(golden["cases"]["spread8"]["losses"])
    wanted = golden["baselines_on_spread8"]
    assert keep(TopLoss(), loss, 3) == wanted["max_loss_topk3"]
    assert keep(TopLoss(lowest=True), loss, 3) == wanted["min_loss_topk3"]
