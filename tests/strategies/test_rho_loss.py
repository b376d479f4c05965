from __future__ import annotations

import json
from pathlib import Path

import torch

from onlinesel import Selector, Signals
from onlinesel.strategies import RHOLoss
from onlinesel.strategies.rho_loss import reducible_loss

GOLDEN = Path(__file__).parents[1] / "golden" / "loss_reweight.json"
NAN, INF = float("nan"), float("inf")


def keep(loss: list[float], reference: list[float], count: int) -> list[int]:
    signals = Signals(loss=torch.tensor(loss), reference_loss=torch.tensor(reference))
    return Selector(RHOLoss()).select(signals, keep=count).rows.tolist()


def test_a_flipped_sign_would_keep_what_the_reference_cannot_learn() -> None:
    # Row 0 is noise (hard for both), row 1 is known, row 2 is worth learning, row 3 was forgotten.
    assert keep([9.0, 0.5, 4.0, 1.0], [8.75, 0.5, 1.0, 2.0], 1) == [2]
    assert keep([9.0, 0.5, 4.0, 1.0], [8.75, 0.5, 1.0, 2.0], 3) == [0, 1, 2]


def test_ties_go_to_the_lower_row() -> None:
    assert keep([3.0, 2.0, 5.0], [2.0, 1.0, 4.0], 2) == [0, 1]


def test_a_row_needs_both_losses() -> None:
    loss, reference = [1.0, NAN, 9.0, INF, 2.0], [0.5, 0.0, -INF, INF, NAN]
    assert keep(loss, reference, 5) == [0]
    scores = reducible_loss(torch.tensor(loss), torch.tensor(reference))
    assert scores[0] == 0.5 and bool(torch.isnan(scores[1:]).all())


def test_golden_vectors() -> None:
    golden = json.loads(GOLDEN.read_text("utf-8"))
    wanted = golden["baselines_on_spread8"]
    loss, reference = golden["cases"]["spread8"]["losses"], wanted["rho_reference_losses"]
    scores = reducible_loss(torch.tensor(loss), torch.tensor(reference))
    assert scores.tolist() == wanted["rho_scores"]
    assert keep(loss, reference, 3) == wanted["rho_topk3"]
