from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from onlinesel import Chain, Selector, Signals, State
from onlinesel.strategies import UDS, LossReweight
from onlinesel.strategies.uds import enqueue, greedy_rows, mean_distance

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "uds.json").read_text("utf-8"))
ALPHA = GOLDEN["alpha"]
RTOL = GOLDEN["tolerances"]["float32_rtol"]
VARIANTS = {"reference": "projection_all_rows", "masked": "projection_padded_rows_zeroed"}
NAN, INF = float("nan"), float("inf")

each_variant = pytest.mark.parametrize("variant", VARIANTS)


def close(found: Tensor, wanted: Any) -> None:
    torch.testing.assert_close(
        found.double(), torch.tensor(wanted, dtype=torch.float64), rtol=RTOL, atol=1e-3
    )


def filled(strategy: UDS, queue: list[list[float]], pointer: int, count: int) -> State:
    tensors = {"queue": torch.tensor(queue)}
    tensors |= {"pointer": torch.tensor(pointer), "count": torch.tensor(count)}
    return {**strategy.init(), **tensors}


def golden_state(strategy: UDS) -> State:
    inputs = GOLDEN["inputs"]
    return filled(strategy, inputs["queue"], inputs["queue_ptr"], inputs["queue_count"])


def golden_signals(variant: str) -> Signals:
    utility = GOLDEN["selection"][f"{variant}_behaviour"]["utility"]
    embedding = GOLDEN["expected"][VARIANTS[variant]]
    return Signals(nuclear_norm=torch.tensor(utility), embedding=torch.tensor(embedding))


def decide(strategy: UDS, signals: Signals, state: State, keep: int) -> Any:
    generator = torch.Generator().manual_seed(0)
    return strategy.select(signals, state, keep=keep, step=0, generator=generator)


@each_variant
def test_golden_decision_and_queue(variant: str) -> None:
    wanted = GOLDEN["selection"][f"{variant}_behaviour"]
    strategy = UDS(ALPHA, capacity=6)
    signals, state = golden_signals(variant), golden_state(UDS(ALPHA, capacity=6))
    close(mean_distance(signals.embedding, state["queue"][:5]), wanted["diversity"])
    selection, after = decide(strategy, signals, state, GOLDEN["shapes"]["K"])
    close(selection.scores, wanted["combined"])
    assert selection.scores.argsort(descending=True).tolist() == wanted["ranking_desc"]
    assert selection.rows.tolist() == wanted["topk_indices_sorted"]
    close(after["queue"], wanted["queue_after"])
    assert after["pointer"].item() == wanted["queue_ptr_after"]
    assert after["count"].item() == wanted["queue_count_after"]


@each_variant
def test_golden_empty_queue(variant: str) -> None:
    wanted = GOLDEN["selection"]["empty_queue"]
    selection, _ = decide(UDS(ALPHA), golden_signals(variant), UDS(ALPHA).init(), 2)
    close(selection.scores, wanted[f"combined_{variant}"])
    assert selection.rows.tolist() == wanted[f"topk_{variant}"]
    distance = mean_distance(golden_signals(variant).embedding, torch.empty(0, 15))
    assert distance.tolist() == wanted["diversity"]


@each_variant
@pytest.mark.parametrize("alpha", GOLDEN["alpha_sweep_topk"])
def test_golden_alpha_sweep(variant: str, alpha: str) -> None:
    strategy = UDS(float(alpha), capacity=6)
    selection, _ = decide(strategy, golden_signals(variant), golden_state(strategy), 2)
    name = {"reference": "ref_topk", "masked": "masked_topk"}[variant]
    assert selection.rows.tolist() == GOLDEN["alpha_sweep_topk"][alpha][name]


def test_golden_trace() -> None:
    trace = GOLDEN["trace_masked_capacity3"]
    strategy = UDS(trace["alpha"], capacity=trace["capacity"])
    state = strategy.init()
    for step in trace["steps"]:
        signals = Signals(
            nuclear_norm=torch.tensor(step["utility"]), embedding=torch.tensor(step["projected"])
        )
        selection, state = decide(strategy, signals, state, trace["K"])
        close(selection.scores, step["combined"])
        assert selection.rows.tolist() == step["topk_indices_sorted"]
        close(state["queue"][: step["count_after"]], step["queue_after"][: step["count_after"]])
        assert state["pointer"].item() == step["ptr_after"]
        assert state["count"].item() == step["count_after"]


def test_a_flipped_sign_would_keep_what_was_just_trained() -> None:
    state = filled(UDS(capacity=2), [[0.0, 0.0], [2.0, 0.0]], 0, 2)
    embedding = torch.tensor([[1.0, 0.0], [1.0, 3.0], [1.0, 0.0]])
    signals = Signals(nuclear_norm=torch.tensor([5.0, 4.0, 6.0]), embedding=embedding)
    # Mean distances 1, sqrt(10), 1.
    selection, _ = decide(UDS(1.0, capacity=2), signals, state, 1)
    assert selection.scores.tolist() == pytest.approx([6.0, 4 + 10**0.5, 7.0])
    assert selection.rows.tolist() == [1]
    assert selection.metrics["diversity"].item() == pytest.approx(10**0.5)
    # And the norm alone keeps the largest.
    assert decide(UDS(0.0), signals, UDS(0.0).init(), 1)[0].rows.tolist() == [2]


def test_the_distance_does_not_cancel_at_large_norms() -> None:
    memory = torch.full((40, 1024), 1e6)
    embedding = memory[:30].clone()
    embedding[:, 0] += 64.0
    found = mean_distance(embedding, memory)
    assert found.tolist() == pytest.approx([64.0] * 30, rel=1e-6)


def test_only_valid_rows_of_the_queue_count() -> None:
    strategy = UDS(1.0, capacity=3)
    state = filled(strategy, [[1.0], [0.0], [0.0]], 1, 1)
    signals = Signals(nuclear_norm=torch.zeros(1), embedding=torch.tensor([[4.0]]))
    assert decide(strategy, signals, state, 1)[0].scores.tolist() == [3.0]


def test_chosen_rows_enter_in_the_order_of_their_ids() -> None:
    strategy = UDS(capacity=4)
    signals = Signals(
        ids=torch.tensor([9, 3, 5, 7]),
        nuclear_norm=torch.tensor([4.0, 3.0, 1.0, 2.0]),
        embedding=torch.tensor([[9.0], [3.0], [5.0], [7.0]]),
    )
    _, state = decide(strategy, signals, strategy.init(), 3)
    assert state["queue"].tolist() == [[3.0], [7.0], [9.0], [0.0]]
    assert (state["pointer"].item(), state["count"].item()) == (3, 3)


def test_a_write_longer_than_the_queue_leaves_its_end() -> None:
    state = {"pointer": torch.tensor(1), "count": torch.tensor(0)}
    after = enqueue(state, torch.arange(5.0)[:, None], 3)
    # Written at 1, 2, 0, 1, 2: the last three values stay.
    assert after["queue"].tolist() == [[2.0], [3.0], [4.0]]
    assert (after["pointer"].item(), after["count"].item()) == (0, 3)


def test_rows_that_are_not_finite_enter_neither_the_batch_nor_the_queue() -> None:
    strategy = UDS(capacity=4)
    signals = Signals(
        nuclear_norm=torch.tensor([9.0, NAN, 8.0, INF, 1.0]),
        embedding=torch.tensor([[NAN], [2.0], [INF], [4.0], [5.0]]),
    )
    selection, state = decide(strategy, signals, strategy.init(), 5)
    assert selection.rows.tolist() == [4]
    assert state["queue"].tolist() == [[5.0], [0.0], [0.0], [0.0]]


def test_rows_without_a_labelled_token_are_not_kept() -> None:
    signals = Signals(
        nuclear_norm=torch.tensor([9.0, 1.0]),
        embedding=torch.zeros(2, 1),
        tokens=torch.tensor([0, 4]),
    )
    for strategy in (UDS(), UDS(greedy=True), UDS(alpha=0.0)):
        assert Selector(strategy).select(signals, keep=2).rows.tolist() == [1]


def test_greedy_counts_the_rows_chosen_before() -> None:
    embedding = torch.tensor([[0.0], [0.0], [10.0], [4.0]])
    utility, memory = torch.tensor([5.0, 4.0, 1.0, 2.0]), torch.tensor([[0.0]])
    ids = torch.arange(4)
    # Plain scores 5, 4, 11, 6: row 2 first; then means with 0 and 10 are 5, 5, -, 5: row 0.
    assert greedy_rows(utility, embedding, memory, 1.0, 2, ids).tolist() == [1, 0, 1, 0]
    # Then means with 0, 10 and 0 are 10/3, 14/3 for rows 1 and 3: 7.33 against 6.67.
    assert greedy_rows(utility, embedding, memory, 1.0, 3, ids).tolist() == [1, 1, 1, 0]


def test_greedy_avoids_the_twin_that_plain_selection_takes() -> None:
    signals = Signals(
        nuclear_norm=torch.tensor([9.0, 9.0, 8.0]),
        embedding=torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]),
    )
    assert Selector(UDS()).select(signals, keep=2).rows.tolist() == [0, 1]
    assert Selector(UDS(greedy=True)).select(signals, keep=2).rows.tolist() == [0, 2]


def test_greedy_and_plain_agree_on_one_row() -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        signals = Signals(
            nuclear_norm=torch.rand(8, generator=generator),
            embedding=torch.rand(8, 3, generator=generator),
        )
        memory = filled(UDS(capacity=3), torch.eye(3).tolist(), 0, 3)
        plain = decide(UDS(capacity=3), signals, memory, 1)[0]
        greedy = decide(UDS(capacity=3, greedy=True), signals, memory, 1)[0]
        assert torch.equal(plain.weights, greedy.weights)


def test_without_a_distance_no_embedding_is_needed() -> None:
    assert UDS(alpha=0.0).needs == ("nuclear_norm",)
    assert UDS().needs == ("nuclear_norm", "embedding")
    signals = Signals(nuclear_norm=torch.tensor([1.0, 2.0]))
    assert Selector(UDS(alpha=0.0)).select(signals, keep=1).rows.tolist() == [1]


def test_what_the_scorer_is_told() -> None:
    assert UDS().scorer_options == {
        "rows": "attention",
        "length": "raw",
        "projector": {
            "vocab_dim": 128,
            "time_dim": 8,
            "time": None,
            "scale": "unit",
            "compact": True,
            "seed": 0,
        },
    }
    paper = UDS.paper()
    assert paper.alpha == 2.5e-3 and paper.capacity == 1024
    options = paper.scorer_options
    assert options["rows"] == "all" and options["length"] == "raw"
    assert {k: options["projector"][k] for k in ("time", "scale", "compact")} == {
        "time": 512,
        "scale": "uds",
        "compact": False,
    }
    assert UDS(projector_seed=5).scorer_options["projector"]["seed"] == 5


def test_two_parts_of_a_chain_must_score_alike() -> None:
    assert Chain(UDS(), LossReweight()).scorer_options == UDS().scorer_options
    with pytest.raises(ValueError, match="Chain: parts must agree on the scorer option 'rows'"):
        Chain(UDS(), UDS(rows="all"))


def test_the_default_alpha_is_the_papers_in_the_unit_scale() -> None:
    assert pytest.approx(1.5e-3 * (152_064 * 512) ** 0.5 / 2, rel=0.01) == UDS().alpha


@pytest.mark.parametrize(
    "other",
    [{"projector_seed": 1}, {"time": 512}, {"rows": "all"}, {"scale": "uds"}, {"compact": False}],
)
def test_a_queue_of_another_projector_is_refused(other: dict[str, Any]) -> None:
    signals = Signals(nuclear_norm=torch.ones(2), embedding=torch.eye(2))
    _, state = decide(UDS(), signals, UDS().init(), 1)
    message = r"^UDS: state must come from the same projector \(seed, .*, got \[.*\]\. Keep the set"
    with pytest.raises(ValueError, match=message):
        decide(UDS(**other), signals, state, 1)


def test_an_embedding_of_another_width_is_refused() -> None:
    selector = Selector(UDS())
    selector.select(Signals(nuclear_norm=torch.ones(2), embedding=torch.eye(2)), keep=1)
    message = r"^UDS: embedding must be \(N, D\) with the D of the queue \(2,\), got \(3, 3\)\. Sco"
    with pytest.raises(ValueError, match=message):
        selector.select(Signals(nuclear_norm=torch.ones(3), embedding=torch.eye(3)), keep=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -1.0}, r"alpha must be finite and >= 0, got -1\.0\. Use 6\.6"),
        ({"alpha": NAN}, r"alpha must be finite and >= 0, got nan\. "),
        ({"capacity": 0}, r"capacity must be at least 1, got 0\. Leave"),
        ({"vocab_dim": 0}, r"vocab_dim must be at least 1, got 0\. "),
        ({"time_dim": -1}, r"time_dim must be at least 1, got -1\. "),
        ({"time": 0}, r"time must be at least 1, got 0\. "),
        ({"rows": "prompt"}, r"rows must be one of attention, response, all, got 'prompt'\. Leave"),
        ({"length": "log"}, r"length must be one of raw, rows, sqrt, got 'log'\. "),
        ({"scale": "fft"}, r"scale must be one of unit, uds, got 'fft'\. "),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^UDS: " + message):
        UDS(**arguments)
