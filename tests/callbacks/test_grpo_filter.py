"""What a gated batch trains is what a run on the kept problems alone would train."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from onlinesel import Chain, Selection, Signals, Strategy
from onlinesel.callbacks.grpo import meter as _grpo_meter
from onlinesel.callbacks.grpo import prompts as _grpo_prompts
from onlinesel.rl import (
    PassRateBand,
    Refill,
    SharedDifficulty,
    UniformPrompts,
    ZeroVariance,
)
from onlinesel.rl.max_variance import MaxVariance
from tests.callbacks.grpo_hosts import (
    attach,
    length_bonus,
    losses,
    make_grpo_trainer,
    outcome,
    rows,
    spy,
    weights,
)
from tests.callbacks.hosts import make_model, make_tokenizer

NAN = float("nan")
MIXED = (2, 1, 3)
ALL = {"per_device_train_batch_size": 12, "max_steps": 1}
"""Three groups of four: a batch holds all mixed problems of `WITH_DEAD`."""
WITH_DEAD = (0, 2, 4, 1, 0, 4, 3, NAN, 0)

LOSSES: dict[str, dict[str, Any]] = {
    "dapo": {},
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "vespo": {"loss_type": "vespo"},
    "sapo": {"loss_type": "sapo"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "batch-scale": {"scale_rewards": "batch"},
    "no-scale": {"scale_rewards": "none"},
    "objectives": {
        "rewards": [outcome, length_bonus],
        "reward_weights": [1.0, 0.5],
        "multi_objective_aggregation": "normalize_then_sum",
    },
    "truncated": {"mask_truncated_completions": True, "max_completion_length": 4},
}


def step(folder: Path, rights: Any, options: dict[str, Any] | None = None, **setting: Any) -> Any:
    """Return the gradient of one step (as the weights moved), its loss, rows and items."""
    trainer = make_grpo_trainer(folder, rights, **{**ALL, **setting})
    made = spy(trainer)
    if options is not None:
        made = []
        attach(trainer, outcome="outcome", **options)
        made = spy(trainer)
    before = weights(trainer)
    trainer.train()
    return before - weights(trainer), losses(trainer), made[0]


def rows_of_problems(batch: dict[str, Any], keep: Any) -> Any:
    return [row for row in rows(batch) if row[0] in keep]


def assert_same_step(a: Any, b: Any) -> None:
    moved, wanted = a[0], b[0]
    assert wanted.norm() > 1e-4
    assert (moved - wanted).norm() / wanted.norm() < 1e-5
    assert a[1] == pytest.approx(b[1], rel=1e-4, abs=1e-6)
    assert int(a[2]["num_items_in_batch"]) == int(b[2]["num_items_in_batch"])


@pytest.mark.filterwarnings("ignore:RolloutSelection. the outcome")  # one problem has none
@pytest.mark.parametrize("name", LOSSES)
def test_a_refilled_batch_is_a_run_on_the_kept_problems(tmp_path: Path, name: str) -> None:
    """The prompts of the mixed problems are those of the reference run's own."""
    setting = dict(LOSSES[name])
    gate = {"gate": ZeroVariance(), "refill": Refill(max_rounds=30, oversample=2.0)}
    found = step(tmp_path, WITH_DEAD, gate, **setting)
    reference = make_grpo_trainer(tmp_path, WITH_DEAD, **{**ALL, **setting})
    kept = [i for i, right in enumerate(WITH_DEAD) if right in MIXED]
    reference.train_dataset = reference.train_dataset.select(kept)
    made, before = spy(reference), weights(reference)
    reference.train()
    wanted = (before - weights(reference), losses(reference), made[0])
    assert rows(found[2]) == rows(wanted[2])
    assert_same_step(found, wanted)


@pytest.mark.parametrize(
    "name", ["dapo", "grpo", "dr_grpo", "cispo", "vespo", "sapo", "batch-scale", "objectives"]
)
@pytest.mark.parametrize("slices", [1, 2])
def test_a_partial_batch_is_a_run_on_the_kept_problems(
    tmp_path: Path, name: str, slices: int
) -> None:
    """Two groups of six are kept, nothing is generated again: the loss is theirs alone."""
    setting: dict[str, Any] = {**LOSSES[name], "steps_per_generation": slices}
    setting["gradient_accumulation_steps"] = slices
    rights = (0, 2, 4, 1, 0, 4)
    size = 24 // slices
    found = step(
        tmp_path, rights, {"gate": ZeroVariance()}, per_device_train_batch_size=size, **setting
    )
    reference = make_grpo_trainer(
        tmp_path, rights, per_device_train_batch_size=8 // slices, max_steps=1, **setting
    )
    reference.train_dataset = reference.train_dataset.select([1, 3])
    made, before = spy(reference), weights(reference)
    reference.train()
    assert_same_step(found, (before - weights(reference), losses(reference), made[0]))
    assert found[2]["prompt_ids"].shape[0] == 8


def test_a_batch_without_a_kept_group_moves_nothing(tmp_path: Path) -> None:
    moved, loss, batch = step(tmp_path, (0, 4, 0), {"gate": ZeroVariance()})
    assert loss == [0.0]
    assert not bool(moved.any())
    assert rows(batch) == []


def test_unscored_completions_keep_advantage_zero(tmp_path: Path) -> None:
    """One of four completions has no reward: the group trains without it."""

    def partly(completions: list[str], **kwargs: Any) -> list[float | None]:
        pairs = zip(completions, outcome(completions, **kwargs), strict=True)
        return [None if "w13" in text.split()[0] else value for text, value in pairs]

    partly.__name__ = "outcome"
    *_, batch = step(tmp_path, (2, 0, 2), {"gate": ZeroVariance()}, rewards=partly)
    values = [row[2] for row in rows(batch)]
    # Unbiased deviation of (1, 1, 0) is 0.57735.
    assert sorted(values) == pytest.approx(sorted([0.5773, 0.5773, -1.1545, 0] * 2), abs=1e-3)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("partial", {"kept": 1, "rejected": 0}),
        ("top_up", {"kept": 1, "rejected": 2}),
        ("skip", {"kept": 0, "rejected": 0}),
        ("replace", {"kept": 0, "rejected": 0}),  # one of three is not more than a third
    ],
)
def test_what_a_short_batch_trains(tmp_path: Path, policy: str, expected: dict[str, int]) -> None:
    refill = Refill(max_rounds=0, on_short=policy)
    *_, batch = step(tmp_path, (0, 2, 4, 0), {"gate": ZeroVariance(), "refill": refill})
    advantages = [row[2] for row in rows(batch)]
    assert sum(value != 0 for value in advantages) == 4 * expected["kept"]
    assert sum(value == 0 for value in advantages) == 4 * expected["rejected"]


def test_replaced_groups_are_copies_of_kept_ones(tmp_path: Path) -> None:
    refill = Refill(max_rounds=0, on_short="replace")
    *_, batch = step(tmp_path, (3, 2, 4, 0), {"gate": ZeroVariance(), "refill": refill})
    found = rows(batch)
    assert len(found) == 12 and len(set(found)) == 8
    assert int(batch["num_items_in_batch"]) == sum(len(answer) for _, answer, _ in found)


def test_top_up_takes_the_most_varied_of_the_rejected(tmp_path: Path) -> None:
    refill = Refill(max_rounds=0, on_short="top_up")
    gate = PassRateBand(0.5, 0.5)
    *_, batch = step(tmp_path, (0, 4, 1, 2, 2), {"gate": gate, "refill": refill})
    values = {round(abs(row[2]), 2) for row in rows(batch)}
    # One group of 1 in 4 (advantages 1.5 and -0.5), then the first of the constant ones.
    assert {1.5, 0.5, 0.0} == values


def test_a_skipped_batch_leaves_weights_and_moments_alone(tmp_path: Path) -> None:
    """Momentum and weight decay would move them even with a gradient of zero."""
    trainer = make_grpo_trainer(
        tmp_path, (2, 2, 0, 4), max_steps=2, optim="adamw_torch", learning_rate=0.01,
        weight_decay=0.1,
    )  # fmt: skip
    attach(trainer, gate=ZeroVariance(), refill=Refill(max_rounds=0, on_short="skip"))
    seen: list[torch.Tensor] = []
    original = trainer.training_step

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.append(weights(trainer))
        return original(*args, **kwargs)

    trainer.training_step = noted
    trainer.train()
    assert not torch.equal(seen[0], seen[1])  # the first batch trained
    assert torch.equal(seen[1], weights(trainer))  # the second one was skipped


def test_raise_says_what_is_missing(tmp_path: Path) -> None:
    refill = Refill(max_rounds=1, on_short="raise")
    with pytest.raises(ValueError, match=r"batch must hold 3 groups that train, got 1 after 2 gen"):
        step(tmp_path, (0, 2, 4, 0, 0, 0), {"gate": ZeroVariance(), "refill": refill})


def test_refill_stops_at_its_bounds(tmp_path: Path) -> None:
    trainer = make_grpo_trainer(tmp_path, (0,) * 40, **ALL)
    attach(trainer, gate=ZeroVariance(), refill=Refill(max_rounds=5, max_rollouts=30))
    trainer.train()
    log = trainer.state.log_history[0]
    # 12 completions of the loader, 12 more, and 6 of the last 6 allowed hold one group of 4.
    assert (log["rollouts/rollouts"], log["rollouts/rounds"]) == (28, 3)
    assert log["rollouts/short"] == 3


def test_refill_ends_with_the_data(tmp_path: Path) -> None:
    trainer = make_grpo_trainer(tmp_path, (0, 0, 4, 4, 2, 0), **ALL)
    attach(trainer, gate=ZeroVariance(), refill=Refill(max_rounds=50))
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["rollouts/rollouts"] == 24 and log["rollouts/short"] == 2


def test_left_over_groups_train_once_in_the_next_batch(tmp_path: Path) -> None:
    trainer = make_grpo_trainer(tmp_path, (0, 0, 2, 1, 3, 2, 1), **{**ALL, "max_steps": 2})
    refill = Refill(max_rounds=1, oversample=3.0, leftover="carry")
    callback = attach(trainer, gate=ZeroVariance(), refill=refill, prompts=UniformPrompts())
    made = spy(trainer)
    carried: list[list[Any]] = []
    original = callback._on__generate_and_score_completions

    def noted(inputs: Any) -> Any:
        batch = original(inputs)
        carried.append(list(callback._maker.filler.carried))
        return batch

    trainer._generate_and_score_completions = noted
    made = spy(trainer)
    trainer.train()
    assert carried[0], "nothing was left over"
    left = {tuple(r) for g in carried[0] for r in _prompts(g.rows)}
    assert left <= {row[0] for row in rows(made[1])}
    assert all(len(rows(batch)) == 12 for batch in made)
    # Their advantages are those of their own group.
    for prompt in left:
        values = [row[2] for row in rows(made[1]) if row[0] == prompt]
        assert sum(values) == pytest.approx(0, abs=1e-4) and any(values)


def _prompts(batch: dict[str, Any]) -> list[tuple[int, ...]]:
    pairs = zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    return [tuple(ids[mask.bool()].tolist()) for ids, mask in pairs]


def test_max_variance_trains_half_of_each_group(tmp_path: Path) -> None:
    """Of four completions with one right answer, that one and one wrong one train."""
    options = {"rollouts": MaxVariance(2)}
    *_, batch = step(tmp_path, (1, 3, 2), options)
    found = rows(batch)
    assert len(found) == 6
    # Mean and deviation are those of the two that train: (1, 0) gives +- 0.7071.
    assert sorted(abs(row[2]) for row in found) == pytest.approx([0.707] * 6, abs=1e-3)
    assert int(batch["num_items_in_batch"]) == sum(len(answer) for _, answer, _ in found)


@dataclass(frozen=True)
class AtMostOneRight(Strategy):
    """A user's gate."""

    needs = ("reward", "group")

    def select(self, signals: Signals, state: Any, **_: Any) -> Any:
        reward, group = signals.require(self, "reward"), signals.require(self, "group")
        right = torch.zeros(int(group.max()) + 1).index_add(0, group, reward)
        return Selection((right <= 1)[group].float()), state


def test_a_gate_of_ones_own_is_a_few_lines(tmp_path: Path) -> None:
    *_, batch = step(tmp_path, (1, 2, 4), {"gate": AtMostOneRight()})
    assert [value > 0 for *_, value in rows(batch)].count(True) == 1
    assert len(rows(batch)) == 4


def test_gates_combine_like_other_strategies(tmp_path: Path) -> None:
    gate = Chain(PassRateBand(0, 0.5), PassRateBand(0.5, 1))
    *_, batch = step(tmp_path, (1, 2, 3), {"gate": gate})
    assert {round(abs(row[2]), 2) for row in rows(batch)} == {0.87}
    assert len(rows(batch)) == 4


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_muted_rows_take_nothing_from_the_kl_term(tmp_path: Path, loss_type: str) -> None:
    """One group of four trains in a batch of twelve rows, six of which each slice must hold."""
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    found = []
    for rights, options in (((0, 2, 4), {"gate": ZeroVariance()}), ((2,), None)):
        model = LlamaForCausalLM.from_pretrained(tmp_path / "model")
        with torch.no_grad():
            model.lm_head.weight[3] += 0.5  # the policy has left its reference
        size = 1 if options is None else 3
        trainer = make_grpo_trainer(
            tmp_path, rights, model=model, beta=0.7, loss_type=loss_type, max_steps=1,
            per_device_train_batch_size=4 * size // 4, steps_per_generation=4,
            gradient_accumulation_steps=4,
        )  # fmt: skip
        trainer.train_dataset = trainer.train_dataset.select([0] if size == 1 else [0, 1, 2])
        if options is None:  # the same problem alone
            data = make_grpo_trainer(tmp_path, (0, 2, 4)).train_dataset
            trainer.train_dataset = data.select([1])
        else:
            attach(trainer, **options)
        before = weights(trainer)
        trainer.train()
        found.append(before - weights(trainer))
    assert (found[0] - found[1]).norm() / found[1].norm() < 1e-5


def test_other_rewards_than_right_and_wrong_can_be_gated_and_refilled(tmp_path: Path) -> None:
    """Nobody counts successes of rewards of -1 and 1 but those who asked for a sampler."""

    def signed(completions: list[str], **kwargs: Any) -> list[float]:
        return [2.0 * value - 1.0 for value in outcome(completions, **kwargs)]

    signed.__name__ = "outcome"
    options = {"gate": ZeroVariance(1e-6), "refill": Refill(max_rounds=30)}
    *_, batch = step(tmp_path, (0, 2, 4, 1, 0, 3), options, rewards=signed)
    assert len(rows(batch)) == 12


def test_groups_of_fewer_scored_completions_are_cut_to_one_size(tmp_path: Path) -> None:
    """The first call keeps a group with two scored completions, the second one whole groups."""

    def partly(completions: list[str], rights: list[float], **kwargs: Any) -> list[float | None]:
        values = outcome(completions, rights=rights, **kwargs)
        return [
            None if right == 1 and text.split()[0] in ("w12", "w13") else value
            for text, right, value in zip(completions, rights, values, strict=True)
        ]

    partly.__name__ = "outcome"
    options = {"gate": ZeroVariance(), "refill": Refill(), "rollouts": MaxVariance(3)}
    *_, batch = step(tmp_path, (1, 0, 4, 2, 3, 2), options, rewards=partly)
    found = rows(batch)
    assert len(found) == 9
    assert sum(value == 0 for *_, value in found) == 1  # the one without a reward


def test_a_lora_policy_is_gated_and_weighed(tmp_path: Path) -> None:
    moved = []
    for rights in ((2, 0, 4, 1), (2, 1)):
        trainer = make_grpo_trainer(
            tmp_path, rights, model=make_model(lora=True), max_steps=1,
            per_device_train_batch_size=4 * len(rights),
        )  # fmt: skip
        if len(rights) == 2:
            data = make_grpo_trainer(tmp_path, (2, 0, 4, 1)).train_dataset
            trainer.train_dataset = data.select([0, 3])
        else:
            attach(trainer, gate=ZeroVariance())
        before = weights(trainer)
        trainer.train()
        moved.append(before - weights(trainer))
    assert (moved[0] - moved[1]).norm() / moved[1].norm() < 1e-5


def test_embedding_the_prompts_is_part_of_the_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_grpo_trainer(tmp_path, (2,) * 20, max_steps=1)
    callback = attach(trainer, prompts=SharedDifficulty())
    monkeypatch.setattr(_grpo_prompts.FeatureCache, "_path", lambda _: tmp_path / "kept")
    embed, now = _grpo_prompts.embed_prompts, [5.0]

    def tick(*args: Any) -> Any:
        now[0] += 300.0
        return embed(*args)

    clock = SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: now[0] / 2)
    monkeypatch.setattr(_grpo_meter, "time", clock)
    monkeypatch.setattr(_grpo_prompts, "embed_prompts", tick)
    trainer.train()
    assert (callback.meter.seconds, callback.meter.cpu_seconds) == (300.0, 150.0)
