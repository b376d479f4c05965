from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from onlinesel.rl.hapo import HAPO, entropy_statistics, normalized_entropy, standardize
from onlinesel.rl.types import TokenSignals, TokenTerms, TokenWeights

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = json.loads((FOLDER / "hapo.json").read_text("utf-8"))
NAN = float("nan")
CLIP = (0.2, 0.28)
VARIANTS = {
    "signed": HAPO(),
    "signed_base_neutral": HAPO.paper(),
    "as_released": HAPO.released(clip=None),
}
ABLATIONS = {
    "token_avg_only": ("token_level", HAPO(clip_scale=0.0, advantage_scale=0.0)),
    "token_avg_plus_clip": ("token_level", HAPO(advantage_scale=0.0)),
    "token_avg_plus_redistribution": ("token_level", HAPO(clip_scale=0.0)),
    "grpo_seq_adv_token_mean": (
        "sequence_level_grpo",
        HAPO(clip_scale=0.0, advantage_scale=0.0),
    ),
}

each_case = pytest.mark.parametrize("case", ["main", "fallback"])


def golden_tokens(
    case: str,
    method: TokenWeights,
    dtype: torch.dtype = torch.float64,
    advantages: str = "token_level",
) -> TokenSignals:
    given = GOLDEN[case]["inputs"]
    assert (given["eps_low"], given["eps_high"]) == CLIP
    entropy, old, new = (
        torch.tensor(given[name], dtype=dtype) for name in ("entropy", "old_logp", "new_logp")
    )
    mask = torch.tensor(given["mask"]) > 0
    # Loud padding: none of it may count.
    entropy = torch.where(mask, entropy, 50.0)
    return TokenSignals(
        entropy=entropy,
        ratio=(new - old).exp(),
        advantages=torch.tensor(GOLDEN[case]["advantages"][advantages], dtype=dtype),
        mask=mask,
        statistics=method.statistics(entropy[mask]),
        clip=CLIP,
    )


def dual_clipped(terms: TokenTerms, ratio: Tensor, limit: float) -> Tensor:
    """Return the loss of every token: the clipped one, capped where the advantage is negative."""
    a = terms.advantages
    clipped = ratio.clamp(1 - terms.clip_low, 1 + terms.clip_high)
    loss = torch.maximum(-a * ratio, -a * clipped)
    return torch.where(a < 0, torch.minimum(loss, -a * limit), loss)


def trl_clipped(terms: TokenTerms, ratio: Tensor, delta: float) -> Tensor:
    """Return the loss of every token as TRL's, whose `delta` caps the ratio."""
    a = terms.advantages
    clipped = ratio.clamp(1 - terms.clip_low, 1 + terms.clip_high)
    return -torch.minimum(a * ratio.clamp(max=delta), a * clipped)


@each_case
def test_golden_statistics(case: str) -> None:
    golden = GOLDEN[case]["entropy_norm"]
    said = golden_tokens(case, HAPO()).statistics
    found = [said[name].item() for name in ("pivot", "sigma", "top", "bottom")]
    wanted = [golden[name] for name in ("pivot_logH", "rms_about_pivot", "z_max", "z_min")]
    assert found == pytest.approx(wanted, rel=1e-9)


@each_case
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_golden_normalized_entropy(case: str, dtype: torch.dtype, rtol: float) -> None:
    golden = GOLDEN[case]["entropy_norm"]
    tokens = golden_tokens(case, HAPO(), dtype)
    z = standardize(tokens.entropy, tokens.statistics)
    h = normalized_entropy(tokens.entropy, tokens.mask, tokens.statistics)
    assert h.dtype == dtype
    for found, name in ((z, "z"), (h, "h_hat"), (h.abs(), "h_hat_as_released")):
        wanted = torch.tensor(golden[name], dtype=dtype)[tokens.mask]
        torch.testing.assert_close(found[tokens.mask], wanted, rtol=rtol, atol=rtol / 100)
    assert h.min() == -1.0 and h.max() == 1.0
    assert bool((h[~tokens.mask] == 0).all())


@each_case
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_golden_terms_and_loss(case: str, variant: str, dtype: torch.dtype, rtol: float) -> None:
    golden, method = GOLDEN[case][variant], VARIANTS[variant]
    limit = GOLDEN[case]["inputs"]["dual_clip_c"]
    tokens = golden_tokens(case, method, dtype)
    terms = method.weigh(tokens)
    losses = [form(terms, tokens.ratio, limit) for form in (dual_clipped, trl_clipped)]
    pairs = [
        (terms.clip_low, "clip_low"),
        (terms.clip_high, "clip_high"),
        (terms.advantages, "adv_final"),
        (losses[0], "per_token_loss"),
        (losses[1], "per_token_loss"),
    ]
    for found, name in pairs:
        assert found.dtype == dtype
        wanted = torch.tensor(golden[name], dtype=dtype)[tokens.mask]
        torch.testing.assert_close(found[tokens.mask], wanted, rtol=rtol, atol=rtol / 100)
    mean = losses[1][tokens.mask].mean().item()
    assert mean == pytest.approx(golden["loss_token_mean"], rel=max(rtol, 1e-9) * 10)


@each_case
@pytest.mark.parametrize("name", ABLATIONS)
def test_golden_ablations(case: str, name: str) -> None:
    advantages, method = ABLATIONS[name]
    tokens = golden_tokens(case, method, advantages=advantages)
    loss = trl_clipped(method.weigh(tokens), tokens.ratio, 10.0)[tokens.mask].mean().item()
    assert loss == pytest.approx(GOLDEN[case]["ablations"][name], rel=1e-9)


def test_the_variants_differ_on_the_golden_inputs() -> None:
    losses = {round(GOLDEN["main"][name]["loss_token_mean"], 9) for name in VARIANTS}
    assert len(losses) == 3


def signals(method: HAPO, entropy: list[float], ratio: list[float], clip: Any) -> TokenSignals:
    h = torch.tensor([entropy])
    ones = torch.ones_like(h)
    said = method.statistics(h.flatten())
    return TokenSignals(h, torch.tensor([ratio]), ones, ones.bool(), said, clip)


def test_by_hand() -> None:
    # log entropies -2, 0, 1 about the pivot 0: h = -1, 0, 1.
    method = HAPO(rho=0.5, clip_scale=0.5, advantage_scale=0.25)
    e = torch.tensor([-2.0, 0.0, 1.0]).exp().tolist()
    still = method.weigh(signals(method, e, [1.0, 1.0, 1.0], (0.25, 0.5)))
    assert still.clip_low[0].tolist() == pytest.approx([0.375, 0.25, 0.25])
    assert still.clip_high[0].tolist() == pytest.approx([0.5, 0.5, 0.75])
    # While nothing moves, only the confident token is damped.
    assert still.advantages[0].tolist() == pytest.approx([0.75, 1.0, 1.0])
    moved = method.weigh(signals(method, e, [1.3, 1.3, 1.4], (0.25, 0.5)))
    # The first two move more than 0.5 / 2, the third more than its adapted 0.75 / 2.
    assert moved.advantages[0].tolist() == pytest.approx([1.0, 1.0, 1.25])
    between = method.weigh(signals(method, e, [0.8, 1.0, 1.3], (0.25, 0.5)))
    # The first moved further than its adapted 0.375 / 2, the third not as far as 0.75 / 2.
    assert between.advantages[0].tolist() == pytest.approx([1.0, 1.0, 1.0])
    base = replace(method, neutral="base")
    between = base.weigh(signals(base, e, [0.8, 1.0, 1.3], (0.25, 0.5)))
    assert between.advantages[0].tolist() == pytest.approx([1.0, 1.0, 1.25])


def test_the_ends_of_the_neutral_range_are_outside() -> None:
    method = HAPO(rho=0.5, clip_scale=0.0)
    e = torch.tensor([-2.0, 0.0, 1.0]).exp().tolist()
    ends = method.weigh(signals(method, e, [0.875, 1.0, 1.25], (0.25, 0.5)))
    assert ends.advantages[0].tolist() == pytest.approx([1.0, 1.0, 2.0])
    inside = method.weigh(signals(method, e, [0.8751, 1.0, 1.2499], (0.25, 0.5)))
    assert inside.advantages[0].tolist() == pytest.approx([0.0, 1.0, 1.0])


def test_a_flipped_sign_would_widen_the_wrong_side() -> None:
    entropy = [0.01, 0.1, 1.0, 2.0, 4.0]
    for method in (HAPO(rho=0.5), HAPO.paper(clip=None)):
        terms = method.weigh(signals(method, entropy, [1.0] * 5, (0.2, 0.2)))
        assert terms.clip_low[0, 0] == 0.4 and terms.clip_high[0, 0] == 0.2
        assert terms.clip_low[0, 4] == 0.2 and terms.clip_high[0, 4] == 0.4
        assert terms.advantages[0, 0] == 0.0 and terms.advantages[0, 4] == 1.0
    # As released, the most confident token is treated as the most uncertain one.
    method = HAPO.released()
    terms = method.weigh(signals(method, entropy, [1.0] * 5, (0.2, 0.2)))
    assert terms.clip_high[0, 0] == 0.4 and bool((terms.clip_low == 0.2).all())
    assert bool((terms.advantages == 1.0).all())


def test_the_clip_is_the_trainers_unless_given() -> None:
    said = [method.clip for method in (HAPO(), HAPO.paper(), HAPO.released())]
    assert said == [None, (0.2, 0.28), (0.2, 0.2)]
    method = HAPO(clip_scale=0.0)
    for chosen, bounds in ((method, (0.125, 0.5)), (replace(method, clip=(0.25, 1.0)), (0.25, 1))):
        terms = chosen.weigh(signals(chosen, [1.0, 2.0], [1.0, 1.0], (0.125, 0.5)))
        assert bool((terms.clip_low == bounds[0]).all() and (terms.clip_high == bounds[1]).all())


def test_the_pivot_is_the_nearest_rank_and_halves_go_to_the_even_one() -> None:
    entropy = torch.arange(1.0, 7.0)[torch.tensor([3, 0, 5, 1, 4, 2])]
    for rho, rank in ((0.0, 1), (0.3, 3), (0.5, 3), (0.7, 5), (0.8, 5), (1.0, 6)):
        # 0.3 * 5 = 1.5 -> 2; 0.5 * 5 = 2.5 -> 2; 0.7 * 5 = 3.5 -> 4, counted from 0.
        pivot = entropy_statistics(entropy, rho)["pivot"].exp().item()
        assert pivot == pytest.approx(rank, rel=1e-6), rho


def test_an_empty_batch_changes_nothing() -> None:
    method = HAPO()
    for empty in (torch.empty(0), torch.tensor([NAN, NAN])):
        said = method.statistics(empty)
        assert not any(bool(torch.isnan(value)) for value in said.values())
        ones = torch.ones(1, 2)
        mask = ones.bool()
        for entropy in (torch.tensor([[0.0, 3.0]]), torch.tensor([[NAN, NAN]])):
            terms = method.weigh(TokenSignals(entropy, ones, ones, mask, said, CLIP))
            assert terms.advantages.tolist() == [[1.0, 1.0]]
            assert bool((terms.clip_low == 0.2).all() and (terms.clip_high == 0.28).all())
    no_rows = torch.empty(0, 5)
    said = method.statistics(no_rows.flatten())
    terms = method.weigh(TokenSignals(no_rows, no_rows, no_rows, no_rows.bool(), said, CLIP))
    assert terms.advantages.shape == (0, 5)


def test_an_unknown_entropy_takes_no_part() -> None:
    entropy = torch.tensor([0.1, 0.5, 1.0, 2.0])
    spoilt = torch.tensor([0.1, NAN, 0.5, 1.0, float("inf"), 2.0])
    said, again = entropy_statistics(entropy), entropy_statistics(spoilt)
    assert all(torch.equal(said[name], again[name]) for name in said)
    h = normalized_entropy(spoilt[None], torch.ones(1, 6, dtype=torch.bool), again)
    assert h[0, [1, 4]].tolist() == [0.0, 0.0] and h[0, 0] == -1.0


@pytest.mark.parametrize("value", [0.0, 0.7, -1e-3])
def test_equal_entropies_change_nothing(value: float) -> None:
    method = HAPO()
    terms = method.weigh(signals(method, [value] * 4, [1.0, 0.5, 2.0, 1.0], CLIP))
    assert terms.advantages.tolist() == [[1.0] * 4]
    assert bool((terms.clip_low == 0.2).all() and (terms.clip_high == 0.28).all())


def test_low_precision_entropies_are_taken_as_float32() -> None:
    entropy = torch.tensor([0.125, 0.5, 1.0, 4.0])
    said = entropy_statistics(entropy.bfloat16())
    assert said["pivot"].dtype == torch.float32
    assert all(
        torch.equal(said[name], value) for name, value in entropy_statistics(entropy).items()
    )


@given(
    values=st.lists(st.floats(0, 20, width=32), min_size=1, max_size=40),
    rho=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_properties(values: list[float], rho: float, dtype: torch.dtype, seed: int) -> None:
    entropy = torch.tensor(values, dtype=dtype)
    said = entropy_statistics(entropy, rho)
    mask = torch.ones(1, len(values), dtype=torch.bool)
    h = normalized_entropy(entropy[None], mask, said)[0]
    assert bool((h.abs() <= 1).all())
    order = entropy.argsort()
    assert bool((h[order].diff() >= 0).all())  # more uncertain is never less
    assert bool((h == 0).any())  # the pivot is one of the tokens
    if (entropy.clamp(min=1e-8).log() > said["pivot"]).any():
        assert h.max() == 1.0
    if (entropy.clamp(min=1e-8).log() < said["pivot"]).any():
        assert h.min() == -1.0
    shuffle = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    again = entropy_statistics(entropy[shuffle], rho)
    for name, value in said.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-9)
    for method in (HAPO(), HAPO.paper(), HAPO.released()):
        tokens = TokenSignals(entropy[None], mask.to(dtype), -mask.to(dtype), mask, said, CLIP)
        terms = method.weigh(tokens)
        assert bool((terms.advantages <= 0).all() and (terms.advantages >= -2).all())
        low, high = CLIP if method.clip is None else method.clip
        assert bool((terms.clip_low >= low).all() and (terms.clip_low <= 2.001 * low).all())
        assert bool((terms.clip_high >= high).all() and (terms.clip_high <= 2.001 * high).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rho": 1.5}, r"rho must be in \[0, 1\], got 1\.5\. Use 0\.8"),
        ({"rho": NAN}, r"rho must be in \[0, 1\], got nan\. "),
        ({"advantage_scale": -0.1}, r"advantage_scale must be in \[0, 1\], got -0\.1\. Use 1\.0"),
        ({"clip_scale": -1.0}, r"clip_scale must be at least 0 and finite, got -1\.0\. Use 1\.0"),
        ({"neutral": "v2"}, r"neutral must be one of adapted, base, got 'v2'\. Leave"),
        ({"clip": (0.2,)}, r"clip must be two positive numbers or None, got \(0\.2,\)\. Use"),
        ({"clip": (0.2, 0.0)}, r"clip must be two positive numbers or None, got \(0\.2, 0\.0\)"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^HAPO: " + message):
        HAPO(**arguments)
