from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onlinesel import Chain, Selector, Signals, Strategy, When
from onlinesel.quotas import PerGroup
from onlinesel.step import StepPlanner
from onlinesel.strategies import InfoBatch, LossReweight, TopLoss
from onlinesel.strategies.loss_reweight import cap_weights, loss_weights
from onlinesel.weights import weighted_mean

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = json.loads((FOLDER / "loss_reweight.json").read_text("utf-8"))
PAIRS = [name for name in GOLDEN["distributed"]["results"] if "uniform" not in name]
KINDS = ("linupper", "quadratic", "extremes", "linear")
NAN = float("nan")
OUTLIER = [2.0, 2.125, 2.25, 2.375, 2.5, 2.625, 2.75, 2.875, 12.0]

each_kind = pytest.mark.parametrize("kind", KINDS)


def weigh(strategy: LossReweight, losses: list[float], **signals: Any) -> torch.Tensor:
    return Selector(strategy).select(Signals(loss=torch.tensor(losses), **signals)).weights


@each_kind
@pytest.mark.parametrize("r", ["0.2", "0.4", "1.0", "100.0"])
@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_golden_vectors(case: str, r: str, kind: str) -> None:
    golden = GOLDEN["cases"][case]
    loss = torch.tensor(golden["losses"], dtype=torch.float64)
    want = torch.tensor(golden["weights"][kind][r], dtype=torch.float64)
    found = loss_weights(loss, kind=kind, temperature=float(r))
    torch.testing.assert_close(found / len(loss), want, rtol=1e-8, atol=0)
    most = golden["max_weight_over_uniform"][kind][r]
    assert found.max().item() == pytest.approx(most, rel=1e-8)
    # Through the class, in float32.
    weights = weigh(LossReweight.paper(kind, float(r)), golden["losses"])
    torch.testing.assert_close(weights.double() / len(loss), want, rtol=2e-5, atol=0)


@pytest.mark.parametrize("name", PAIRS)
def test_golden_vectors_of_two_ranks(name: str) -> None:
    golden = GOLDEN["distributed"]
    kind, r = name.split("|r=")
    losses = [loss for rank in golden["losses_per_rank"] for loss in rank]
    weights = weigh(LossReweight.paper(kind, float(r)), losses)
    want = golden["results"][name]
    torch.testing.assert_close(weights / 8, torch.tensor(want["weights_global"]), rtol=2e-5, atol=0)
    # The rows as tokens of equal loss, counted as in the golden vectors.
    tokens = [count for rank in golden["num_active_per_rank"] for count in rank]
    mask = torch.arange(max(tokens)) < torch.tensor(tokens)[:, None]
    token_loss = torch.tensor(losses)[:, None] * mask
    found = weighted_mean(token_loss, mask, weights, normalize=LossReweight.normalize)
    assert found.item() == pytest.approx(want["global_weighted_loss"], rel=2e-5)
    # trainer.py of the release weighs by the share of tokens too; the card says by what it differs.
    found = weighted_mean(token_loss, mask, weights, normalize="tokens")
    factor = (weights * torch.tensor(tokens)).sum() / sum(tokens)
    assert (found * factor).item() == pytest.approx(want["trainer_ddp_mean_loss"], rel=2e-5)


def test_the_ranks_alone_would_give_other_weights() -> None:
    golden = GOLDEN["distributed"]
    for losses, want in zip(
        golden["losses_per_rank"], golden["naive_local_weights_linupper_r0.4"], strict=True
    ):
        weights = weigh(LossReweight.paper(), losses) / 4
        torch.testing.assert_close(weights, torch.tensor(want), rtol=2e-5, atol=0)


@each_kind
def test_golden_vectors_with_an_empty_row(kind: str) -> None:
    golden = GOLDEN["token_level"]
    want = golden["results"][kind]
    losses = [NAN if loss is None else loss for loss in golden["per_sample_loss"]]
    expected = torch.tensor(want["weights_invalid_sample_zeroed"])
    strategy = LossReweight.paper(kind, want["r"])
    found = [weigh(strategy, losses)]
    # A scorer that gives an empty row some loss does not matter if the row is known to be empty.
    tokens = torch.tensor(golden["num_active"])
    found.append(weigh(strategy, [*losses[:3], 99.0], tokens=tokens))
    for weights in found:
        torch.testing.assert_close(weights / 3, expected, rtol=2e-5, atol=0)


@each_kind
def test_golden_loss_and_gradient(kind: str) -> None:
    golden = GOLDEN["token_level"]
    want = golden["results"][kind]
    logits = torch.tensor(golden["logits"], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor(golden["labels"])[:, 1:]
    mask = labels != -100
    token_loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels, reduction="none", ignore_index=-100
    )
    row_loss = token_loss.detach().sum(1) / mask.sum(1)
    strategy = LossReweight.paper(kind, want["r"])
    weights = Selector(strategy).select(Signals(loss=row_loss, tokens=mask.sum(1))).weights
    loss = weighted_mean(token_loss, mask, weights, normalize=strategy.normalize)
    assert loss.item() == pytest.approx(want["loss"], rel=2e-5)
    (gradient,) = torch.autograd.grad(loss, logits)
    norms = gradient.flatten(1).norm(dim=1)
    assert norms.tolist() == pytest.approx(want["grad_logits_l2_per_sample"], rel=1e-4)
    assert gradient[0, 3].tolist() == pytest.approx(want["grad_logits_row_b0_t3"], rel=1e-4)


def test_a_flipped_sign_would_favour_small_losses() -> None:
    losses = [float(i) for i in range(9)]
    for kind in ("linupper", "linear"):
        weights = weigh(LossReweight(kind), losses)
        assert bool((weights.diff() >= 0).all()) and weights[0] < 0.5 < 1.1 < weights[8]
    middle = weigh(LossReweight("quadratic"), losses)
    assert middle[4] == middle.max() and middle[0] < 0.5
    ends = weigh(LossReweight("extremes"), losses)
    assert ends[4] == ends.min() and ends[4] < 0.5


def test_inner_quantiles_by_hand() -> None:
    # Nine rows: the quantiles leave out one at each end, so 2.125 -> -1 and 2.875 -> 1.
    found = loss_weights(torch.tensor(OUTLIER), kind="linear", quantiles=(0.05, 0.95))
    f = torch.tensor([0, 0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 1], dtype=torch.float64)
    want = (f / 0.4).exp()
    torch.testing.assert_close(found, 9 * want / want.sum(), rtol=1e-12, atol=0)


def test_one_outlier_flattens_the_paper_and_not_the_default() -> None:
    paper, robust = weigh(LossReweight.paper(), OUTLIER), weigh(LossReweight(), OUTLIER)
    assert paper[8] > 4.9 and paper[:8].max() / paper[:8].min() < 1.6
    assert robust[8] <= 2 and robust[:8].max() / robust[:8].min() > 8


def test_quantiles_that_coincide_fall_back_to_the_extremes() -> None:
    loss = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(loss_weights(loss, quantiles=(0.05, 0.95)), loss_weights(loss))


def test_the_cap_by_hand() -> None:
    # 4.0 is cut to 2.0; the rest shares 3 in proportion to 0.2 : 0.3 : 0.5.
    weights = torch.tensor([0.2, 0.3, 0.5, 4.0], dtype=torch.float64) * 0.8
    want = [2 * 0.2, 2 * 0.3, 2 * 0.5, 2.0]
    assert cap_weights(weights, 2.0).tolist() == pytest.approx(want, rel=1e-12)
    # Cutting one row lifts the next above the cap as well: 0.1 : 1.4 : 2.5 at 1.5.
    weights = torch.tensor([0.1, 0.1, 1.4, 2.4], dtype=torch.float64)
    assert cap_weights(weights, 1.5).tolist() == pytest.approx([0.5, 0.5, 1.5, 1.5], rel=1e-12)


@given(weights=st.lists(st.floats(1e-6, 100.0), min_size=1, max_size=20), cap=st.floats(1.0, 30.0))
def test_capped_weights_keep_mean_and_order(weights: list[float], cap: float) -> None:
    before = torch.tensor(weights, dtype=torch.float64).sort().values
    before = before / before.mean()
    after = cap_weights(before, cap)
    assert after.mean().item() == pytest.approx(1.0, rel=1e-9)
    assert after.max() <= cap and bool((after.diff() >= -1e-12).all())
    free = after < cap * (1 - 1e-9)
    if int(free.sum()) > 1:
        ratio = after[free] / before[free]
        assert ratio.max().item() == pytest.approx(ratio.min().item(), rel=1e-9)
        assert ratio.min() >= 1 - 1e-9


@given(
    losses=st.lists(st.floats(0, 20, width=32), min_size=1, max_size=30),
    kind=st.sampled_from(KINDS),
    temperature=st.sampled_from([1e-3, 0.05, 0.4, 100.0]),
    robust=st.booleans(),
)
def test_the_mean_weight_is_one(
    losses: list[float], kind: str, temperature: float, robust: bool
) -> None:
    quantiles, cap = ((0.05, 0.95), 2.0) if robust else (None, None)
    found = loss_weights(
        torch.tensor(losses), kind=kind, temperature=temperature, quantiles=quantiles, cap=cap
    )
    assert found.mean().item() == pytest.approx(1.0, rel=1e-9)
    assert bool((found.float() > 0).all())
    assert cap is None or found.max() <= cap


def test_few_rows_are_weighted_equally() -> None:
    losses = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, NAN]
    assert weigh(LossReweight(), losses).tolist() == [1.0] * 7 + [0.0]
    assert weigh(LossReweight(min_rows=7), losses)[0] < 0.5


@pytest.mark.parametrize(
    ("strategy", "few", "enough"),
    [
        (LossReweight(), (), ("loss",)),
        (When(LossReweight(), start=2), (), ()),
        (When(TopLoss(), start=2, otherwise=LossReweight()), (), ("loss",)),
        (Chain(InfoBatch(), LossReweight()), ("ids",), ("ids", "loss")),
        (Chain(TopLoss(), LossReweight()), ("loss",), ("loss",)),
        (PerGroup(LossReweight()), ("group",), ("loss", "group")),
    ],
)
def test_with_too_few_candidates_nothing_is_needed(
    strategy: Strategy, few: tuple[str, ...], enough: tuple[str, ...]
) -> None:
    assert strategy.needs_for(0, 7) == few and strategy.needs_for(0, 8) == enough
    assert LossReweight.paper().needs_for(0, 1) == ("loss",)
    known = Signals(
        ids=torch.arange(7),
        group=torch.zeros(7, dtype=torch.int64),
        tokens=torch.tensor([3] * 6 + [0]),
    )
    signals = known if "loss" not in few else replace(known, loss=torch.arange(7.0))
    weights = Selector(strategy).select(signals, keep=7).weights
    assert weights.tolist()[:6] == [1.0] * 6


def test_a_row_without_labels_has_no_weight_without_losses_either() -> None:
    signals = Signals(tokens=torch.tensor([2, 0, 1]))
    assert Selector(LossReweight()).select(signals).weights.tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(("rows", "forwards"), [(4, 0), (8, 1)])
def test_a_step_with_too_few_rows_pays_for_no_scores(rows: int, forwards: int) -> None:
    scored = []

    def score(batch: Any, needs: Any, hosted: Any) -> Signals:
        scored.append(batch)
        return Signals(loss=batch["input_ids"][:, 0].float())

    planner = StepPlanner(Selector(LossReweight()), score)
    tokens = torch.arange(1, rows + 1)[:, None].expand(-1, 3).contiguous()
    planner.plan([{"input_ids": tokens, "labels": tokens}], [torch.arange(rows)], step=0)
    assert len(scored) == forwards


def test_equal_losses_are_weighted_equally() -> None:
    assert weigh(LossReweight(), [3.25] * 9).tolist() == pytest.approx([1.0] * 9, rel=1e-6)


def test_all_rows_train_with_keep_or_without() -> None:
    signals = Signals(loss=torch.arange(9.0))
    assert Selector(LossReweight()).select(signals, keep=1).rows.numel() == 9


def test_the_normaliser_is_over_rows() -> None:
    assert LossReweight().normalize == "samples"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "upper"}, r"kind must be one of linupper, quadratic, .*, got 'upper'\. Leave"),
        ({"bounds": "ema"}, r"bounds must be one of minmax, quantile, got 'ema'\. Leave"),
        ({"temperature": 0.0}, r"temperature must be positive and finite, got 0\.0\. Use 0\.4"),
        ({"temperature": NAN}, r"temperature must be positive and finite, got nan\. "),
        ({"quantiles": (0.9, 0.1)}, r"quantiles must be two ascending shares, got \(0\.9, 0\.1\)"),
        ({"quantiles": (0.5,)}, r"quantiles must be two ascending shares, got \(0\.5,\)"),
        ({"cap": 0.5}, r"cap must be at least 1 or None, got 0\.5\. The mean weight is 1"),
        ({"min_rows": 0}, r"min_rows must be at least 1, got 0\. Use 8"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^LossReweight: " + message):
        LossReweight(**arguments)
