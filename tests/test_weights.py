from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onlinesel.weights import (
    Weighing,
    draw_rows,
    effective_size,
    hand_over,
    order_by,
    token_losses,
    top_rows,
    total_weight,
    uniform_draws,
    weighted_mean,
)

NAN, INF = float("nan"), float("inf")
floats = st.one_of(st.sampled_from([0.0, 1.0, 2.0, NAN, INF, -INF]), st.floats(-5, 5, width=32))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_order_is_by_score_then_by_id_with_the_unusable_last() -> None:
    scores = torch.tensor([1.0, NAN, 3.0, 3.0, -INF, INF])
    ids = torch.tensor([10, 4, 9, 2, 3, 1])
    assert order_by(scores, ids).tolist() == [3, 2, 0, 5, 4, 1]
    assert order_by(scores, ids, largest=False).tolist() == [0, 3, 2, 5, 4, 1]


@given(st.lists(floats, min_size=1, max_size=20), st.booleans(), st.randoms())
def test_order_does_not_depend_on_the_position(
    values: list[float], largest: bool, random: object
) -> None:
    ids = torch.tensor(random.sample(range(1000), len(values)))  # type: ignore[attr-defined]
    moved = torch.tensor(random.sample(range(len(values)), len(values)))  # type: ignore[attr-defined]
    scores = torch.tensor(values)
    order = ids[order_by(scores, ids, largest=largest)]
    assert torch.equal(order, ids[moved][order_by(scores[moved], ids[moved], largest=largest)])
    key = {int(i): v for i, v in zip(ids, scores.tolist(), strict=True)}
    usable = [int(i) for i in order if torch.isfinite(torch.tensor(key[int(i)]))]
    sign = -1 if largest else 1
    assert usable == sorted(usable, key=lambda i: (sign * key[i], i))
    assert [int(i) for i in order[: len(usable)]] == usable


def test_top_rows_ties_to_the_lower_id() -> None:
    scores, ids = torch.tensor([2.0, 2.0, 1.0, 2.0]), torch.tensor([9, 5, 1, 7])
    assert top_rows(scores, 2, ids).tolist() == [0, 1, 0, 1]
    assert top_rows(scores, 2, ids, largest=False).tolist() == [0, 1, 1, 0]


def test_top_rows_never_fills_up_with_unusable_rows() -> None:
    scores = torch.tensor([NAN, 1.0, INF, -INF])
    assert top_rows(scores, 3, torch.arange(4)).tolist() == [0, 1, 0, 0]
    assert top_rows(torch.full((3,), NAN), 2, torch.arange(3)).tolist() == [0, 0, 0]
    assert top_rows(torch.tensor([5.0, 6.0]), 9, torch.arange(2)).tolist() == [1, 1]


@given(st.lists(floats, min_size=1, max_size=20), st.integers(-1, 22), st.booleans(), st.randoms())
def test_top_rows_are_the_first_in_order_that_are_usable(
    values: list[float], keep: int, largest: bool, random: object
) -> None:
    scores = torch.tensor(values, dtype=torch.float64)
    ids = torch.tensor(random.choices(range(9), k=len(values)))  # type: ignore[attr-defined]
    first = order_by(scores, ids, largest=largest)[: max(keep, 0)].tolist()
    wanted = [float(i in first and math.isfinite(x)) for i, x in enumerate(values)]
    assert top_rows(scores, keep, ids, largest=largest).tolist() == wanted


def test_uniform_draws_go_by_id() -> None:
    ids = torch.tensor([30, 10, 20])
    by_id = uniform_draws(torch.tensor([10, 20, 30]), seeded())
    assert torch.equal(uniform_draws(ids, seeded()), by_id[[2, 0, 1]])
    assert by_id.dtype == torch.float64 and bool(((by_id >= 0) & (by_id < 1)).all())
    assert not torch.equal(by_id, uniform_draws(torch.tensor([10, 20, 30]), seeded(1)))


def test_draw_rows_by_hand() -> None:
    # One pointer a quarter: rows of 1/2, 1/4, 1/4 get exactly 2, 1, 1 whatever the offset.
    odds, ids = torch.tensor([0.25, 0.5, 0.25]), torch.tensor([2, 1, 3])
    for seed in range(10):
        assert draw_rows(odds, 4, ids, seeded(seed)).tolist() == [1, 2, 1]


@given(
    odds=st.lists(st.sampled_from([0.0, 0.1, 1.0, 3.0]), min_size=1, max_size=12),
    draws=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_draw_rows_sums_and_stays_within_one_of_the_expectation(
    odds: list[float], draws: int, seed: int
) -> None:
    odds[0] = odds[0] or 1.0
    chance = torch.tensor(odds)
    ids = torch.randperm(len(odds), generator=seeded(seed))
    counts = draw_rows(chance, draws, ids, seeded(seed))
    assert counts.sum() == draws and bool((counts[chance == 0] == 0).all())
    expected = draws * chance.double() / chance.double().sum()
    assert bool(((counts - expected).abs() < 1 + 1e-6).all())
    moved = torch.randperm(len(odds), generator=seeded(seed + 1))
    assert torch.equal(draw_rows(chance[moved], draws, ids[moved], seeded(seed)), counts[moved])


def test_draw_rows_is_unbiased() -> None:
    odds, rounds, draws = torch.tensor([0.1, 0.4, 0.2, 0.05, 0.25]), 4000, 3
    generator = seeded()
    ids = torch.arange(5)
    counts = torch.stack([draw_rows(odds, draws, ids, generator) for _ in range(rounds)])
    error = counts.double().std(dim=0) / rounds**0.5
    assert bool(((counts.double().mean(dim=0) - draws * odds).abs() < 4 * error).all())


def test_effective_size() -> None:
    assert effective_size(torch.tensor([3.0, 3.0, 3.0, 0.0])).item() == pytest.approx(3.0)
    # (1 + 2 + 3)^2 / (1 + 4 + 9)
    assert effective_size(torch.tensor([1.0, 2.0, 3.0])).item() == pytest.approx(36 / 14)
    assert effective_size(torch.zeros(3)).item() == 0.0


def naive_mean(
    loss: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor, normalize: str
) -> float:
    numerator = denominator = 0.0
    for i in range(loss.shape[0]):
        tokens = [loss[i, t].item() for t in range(loss.shape[1]) if mask[i, t]]
        w = weights[i].item()
        if w == 0 or not tokens:
            continue
        per_row = normalize == "samples"
        numerator += w * (sum(tokens) / len(tokens) if per_row else sum(tokens))
        denominator += w if per_row else w * len(tokens)
    return numerator / denominator if denominator else 0.0


@pytest.mark.parametrize("normalize", ["tokens", "samples"])
@given(
    rows=st.integers(1, 6),
    width=st.integers(1, 5),
    seed=st.integers(0, 10_000),
    weights=st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=6, max_size=6),
)
def test_weighted_mean_equals_a_loop(
    normalize: str, rows: int, width: int, seed: int, weights: list[float]
) -> None:
    generator = seeded(seed)
    loss = torch.rand(rows, width, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, width, generator=generator) < 0.6
    w = torch.tensor(weights[:rows])
    want = naive_mean(loss, mask, w, normalize)
    poisoned = torch.where(mask & (w > 0)[:, None], loss, NAN).requires_grad_()
    found = weighted_mean(poisoned, mask, w, normalize=normalize)
    assert found.item() == pytest.approx(want, rel=1e-9)
    (gradient,) = torch.autograd.grad(found, poisoned)
    assert bool(torch.isfinite(gradient).all())
    assert bool((gradient[~(mask & (w > 0)[:, None])] == 0).all())


def test_weighted_mean_by_hand() -> None:
    loss = torch.tensor([[2.0, 4.0], [9.0, NAN], [1.0, 7.0]])
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    weights = torch.tensor([1.0, 2.0, 5.0])
    # (1 * 6 + 2 * 9) / (1 * 2 + 2 * 1) and (1 * 3 + 2 * 9) / (1 + 2): the empty row is not there.
    assert weighted_mean(loss, mask, weights).item() == 6.0
    assert weighted_mean(loss, mask, weights, normalize="samples").item() == 7.0
    assert weighted_mean(loss, mask, weights, denominator=8.0).item() == 3.0
    assert weighted_mean(loss, mask, weights, denominator=torch.tensor(12)).item() == 2.0


def test_dropping_rows_equals_weighing_them_with_zero() -> None:
    loss = torch.rand(4, 3, generator=seeded())
    mask = torch.rand(4, 3, generator=seeded(1)) < 0.7
    kept = torch.tensor([0, 2])
    weights = torch.tensor([1.0, 0.0, 1.0, 0.0])
    found = weighted_mean(loss, mask, weights)
    assert found.item() == pytest.approx(loss[kept][mask[kept]].mean().item())


def test_parts_of_a_step_add_up_to_the_whole() -> None:
    loss, mask = torch.rand(4, 3, generator=seeded()), torch.ones(4, 3, dtype=torch.bool)
    weights = torch.tensor([1.0, 0.5, 2.0, 0.0])
    whole = weighted_mean(loss, mask, weights)
    total = (weights * 3).sum()
    parts = [
        weighted_mean(loss[i], mask[i], weights[i], denominator=total)
        for i in (slice(0, 1), slice(1, 4))
    ]
    assert sum(parts).item() == pytest.approx(whole.item())


@pytest.mark.parametrize("normalize", ["tokens", "samples"])
def test_a_step_without_weight_has_no_gradient(normalize: str) -> None:
    loss = torch.tensor([[NAN, 1.0]], requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    found = weighted_mean(loss, mask, torch.zeros(1), normalize=normalize)
    found.backward()
    assert found.item() == 0.0
    assert loss.grad is not None and loss.grad.tolist() == [[0.0, 0.0]]


def test_a_half_precision_loss_is_summed_in_float32() -> None:
    loss = torch.ones(1, 4099, dtype=torch.bfloat16)
    mask = torch.ones(1, 4099, dtype=torch.bool)
    weights = torch.ones(1)
    assert weighted_mean(loss, mask, weights, denominator=4099).item() == 1.0
    assert weighted_mean(loss, mask, weights * 1.001, denominator=1.0).item() == pytest.approx(
        4099 * 1.001, rel=1e-6
    )


def test_an_unknown_normaliser_is_refused() -> None:
    message = (
        r"^weighted_mean: normalize must be 'tokens', 'samples' or 'rows', got 'mean'\. "
        r"Use 'tokens' for the mean over labelled tokens\.$"
    )
    with pytest.raises(ValueError, match=message):
        weighted_mean(torch.ones(1, 1), torch.ones(1, 1).bool(), torch.ones(1), normalize="mean")


def test_a_planned_step_hands_its_weights_over() -> None:
    """Weights 2 and 1 with 1 and 3 tokens; the step's denominator comes from elsewhere."""
    seen: list[list[float]] = []
    weights, counts = torch.tensor([2.0, 1.0]), torch.tensor([1, 3])
    losses = torch.tensor([[4.0, 0.0, 0.0], [1.0, 2.0, 6.0]])
    for normalize, wanted in (("tokens", 2 * 4 + 9), ("samples", 2 * 4 + 3)):
        weighing = Weighing(
            weights, counts, torch.tensor(10.0), normalize, 2.0, lambda x: seen.append(x.tolist())
        )
        hand_over(weighing)
        try:
            assert weighted_mean(losses).item() == pytest.approx(2 * wanted / 10)
            row_means = torch.tensor([4.0, 3.0])
            assert weighted_mean(row_means).item() == pytest.approx(2 * wanted / 10)
            explicit = weighted_mean(losses, counts[:, None] > torch.arange(3), weights)
            assert explicit.item() == pytest.approx((2 * 4 + 9) / (2 + 3))
        finally:
            hand_over(None)
    assert seen == [[4.0, 3.0]] * 4
    # Validation that shares the code gets the plain mean.
    assert weighted_mean(torch.tensor([4.0, 3.0])).item() == 3.5


def test_losses_of_another_shape_are_refused() -> None:
    tokens = Weighing(torch.ones(2), torch.tensor([1, 1]), torch.tensor(2.0), "tokens")
    items = Weighing(torch.ones(2), None, torch.tensor(2.0), "tokens")
    with pytest.raises(
        ValueError, match=r"losses must be one per row \(2,\) or .* got shape \(3,\)"
    ):
        tokens(torch.ones(3))
    with pytest.raises(ValueError, match=r"weighted_mean: losses must be one per row .* \(\)"):
        tokens(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"where rows have no labelled tokens, got shape \(2, 5\)"):
        items(torch.ones(2, 5))
    with pytest.raises(ValueError, match="mask must be given with token losses, got None"):
        weighted_mean(torch.ones(2, 2))


def test_losses_of_other_tokens_than_are_counted_are_refused() -> None:
    """Of 5 labels a causal model predicts 4; a classifier of tokens has a loss for each."""
    counts = torch.tensor([4, 2])
    weighing = Weighing(torch.ones(2), counts, torch.tensor(6.0), "tokens", width=4)
    losses = torch.arange(8.0).view(2, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    assert weighing(losses, mask).item() == pytest.approx((0 + 1 + 2 + 3 + 4 + 5) / 6)
    with pytest.raises(ValueError, match=r"losses must be those of the 4 tokens .* shape \(2, 5\)"):
        weighing(torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"mask must mark the labelled tokens, \[4, 2\] of the ro"):
        weighing(losses, torch.ones(2, 4).bool())


def test_token_losses_are_those_of_cross_entropy() -> None:
    logits = torch.randn(2, 4, 5, generator=seeded())
    labels = torch.tensor([[1, 2, -100, 3], [4, -100, 0, 1]])
    losses = token_losses(logits, labels)
    for row, at in ((0, 1), (0, 3), (1, 2), (1, 3)):
        wanted = -logits[row, at - 1].log_softmax(0)[labels[row, at]]
        assert losses[row, at - 1] == pytest.approx(float(wanted), rel=1e-5)
    assert losses[0, 1] == losses[1, 0] == 0.0


def test_the_weight_of_rows_without_a_token_counts_only_among_items() -> None:
    weights = torch.tensor([2.0, 5.0])
    for normalize, wanted in (("tokens", 8.0), ("samples", 2.0)):
        assert total_weight(weights, torch.tensor([4, 0]), normalize).item() == wanted
        assert total_weight(weights, None, normalize).item() == 7.0
