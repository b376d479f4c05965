"""Whatever loss the trainer computes, the rows that were dropped take nothing from the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, set_seed
from trl import GRPOTrainer

from onlinesel.callbacks.grpo import RolloutSelection
from onlinesel.callbacks.grpo import checks as _grpo_checks
from onlinesel.callbacks.grpo.loss import regroup
from onlinesel.callbacks.grpo.rows import ROWS, TRAINS
from onlinesel.rl import Refill, ZeroVariance
from tests.callbacks.grpo_hosts import (
    GENERATIONS,
    GMPOTrainer,
    OwnItems,
    OwnLoss,
    attach,
    losses,
    make_grpo_trainer,
    make_problems,
    spy,
    weights,
    written,
)
from tests.callbacks.hosts import LEARNING_RATE, make_model, make_tokenizer

LONGEST = 6
"""``max_completion_length`` of the trainers."""

Row = tuple[list[int], list[int], float]
"""Prompt, completion, advantage."""


def kept_rows(rights: Any) -> list[Row]:
    """The rows of the problems that are solved sometimes, by the definitions alone."""
    found = []
    for problem in make_problems(rights):
        right = problem["rights"]
        if not 0 < right < GENERATIONS:
            continue
        prompt = make_tokenizer()(problem["prompt"])["input_ids"]
        values = torch.tensor([float(i < right) for i in range(GENERATIONS)])
        advantages = (values - values.mean()) / (values.std() + 1e-4)
        found += [(prompt, written(prompt, i), float(advantages[i])) for i in range(GENERATIONS)]
    return found


def scored(model: Any, row: Row) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of each token of a completion."""
    prompt, answer, _ = row
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    log_probs = logits.log_softmax(-1)
    chosen = log_probs.gather(-1, torch.tensor(answer)[:, None])[:, 0]
    return chosen, -(log_probs.exp() * log_probs).sum(-1)


def naive_loss(model: Any, rows: list[Row], name: str) -> Tensor:
    """The loss of a generation batch of these rows alone, row by row."""
    tokens = sum(len(row[1]) for row in rows)
    total = torch.zeros(())
    for row in rows:
        chosen, _ = scored(model, row)
        term = -row[2] * chosen
        total = (
            total
            + {
                "grpo": term.mean() / len(rows),
                "gmpo": term.mean() / len(rows),
                "own": term.sum() / len(rows),
                "dr_grpo": term.sum() / (len(rows) * LONGEST),
                "dapo": term.sum() / tokens,
                "own-items": term.sum() / tokens,
            }[name]
        )
    return total


def composed(trainer: Any) -> list[list[Row]]:
    """The rows that train of each micro-batch of the last generation batch."""
    parts = []
    for batch in trainer._buffered_inputs:
        rows = []
        for i in range(len(batch["prompt_ids"])):
            prompt, answer = (
                batch[f"{name}_ids"][i][batch[f"{name}_mask"][i].bool()].tolist()
                for name in ("prompt", "completion")
            )
            rows += [(prompt, answer, float(batch["advantages"][i]))] if answer else []
        parts.append(rows)
    return parts


def gradient(loss: Tensor, model: Any) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "grpo": (GRPOTrainer, {"loss_type": "grpo"}),
    "dapo": (GRPOTrainer, {"loss_type": "dapo"}),
    "dr_grpo": (GRPOTrainer, {"loss_type": "dr_grpo"}),
    "gmpo": (GMPOTrainer, {}),
    "own": (OwnLoss, {}),
    "own-items": (OwnItems, {}),
}
RIGHT = st.sampled_from([0, 4, 1, 2, 3])


def one_step(
    folder: Path, name: str, rights: Any, slices: int, batches: int, **options: Any
) -> Any:
    """Train one step; return the trainer and its gradient."""
    kind, setting = KINDS[name]
    refill = options.pop("refill", None)
    trainer = make_grpo_trainer(
        folder, rights, kind=kind, max_steps=1, steps_per_generation=slices,
        per_device_train_batch_size=GENERATIONS * len(rights) // batches // slices,
        gradient_accumulation_steps=slices * batches, **setting, **options,
    )  # fmt: skip
    attach(trainer, gate=ZeroVariance(), refill=refill)
    before = weights(trainer)
    trainer.train()
    return trainer, (before - weights(trainer)) / LEARNING_RATE


@settings(
    max_examples=8, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    st.sampled_from(sorted(KINDS)),
    st.lists(RIGHT, min_size=3, max_size=3),
    st.lists(RIGHT, min_size=3, max_size=3),
    st.sampled_from([1, 2, 3, 4, 6]),
    st.sampled_from([1, 2]),
    st.sampled_from(["partial", "skip"]),
)
@example("gmpo", [2, 0, 1], [0, 0, 0], 6, 1, "partial")
@example("grpo", [2, 3, 1], [2, 0, 4], 3, 2, "skip")
@example("dapo", [0, 0, 4], [1, 0, 4], 1, 2, "partial")
@example("own", [0, 3, 4], [0, 0, 4], 6, 2, "partial")
@example("own-items", [0, 3, 4], [2, 1, 4], 6, 2, "partial")
def test_a_step_is_the_mean_over_what_was_kept(
    tmp_path: Path, name: str, first: Any, second: Any, slices: int, batches: int, policy: str
) -> None:
    """Any rows, slices and generation batches of one optimizer step; the reference knows none."""
    generations = [first, second][:batches]
    refill = Refill(max_rounds=0, on_short=policy)
    rights = [right for generation in generations for right in generation]
    kept = [rows_of(rights, i, len(first)) for i in range(batches)]
    least = len(first) * GENERATIONS if policy == "skip" else 1  # which skips short batches
    kept = [rows for rows in kept if len(rows) >= least]
    trainer, found = one_step(tmp_path, name, rights, slices, batches, refill=refill)
    if not kept:
        assert not bool(found.any())
        return
    model = make_model()
    loss = sum(naive_loss(model, rows, name) for rows in kept) / len(kept)
    wanted = gradient(loss, model)
    assert wanted.norm() > 1e-3
    assert (found - wanted).norm() / wanted.norm() < 2e-4
    assert losses(trainer)[0] == pytest.approx(loss_at_ratio_one(kept, name, model), abs=2e-3)


def rows_of(rights: list[float], batch: int, size: int) -> list[Row]:
    """The kept rows of one generation batch; a problem's prompt depends on its number."""
    prompts = {tuple(make_tokenizer()(p["prompt"])["input_ids"]) for p in
               make_problems(rights)[batch * size : (batch + 1) * size]}  # fmt: skip
    return [row for row in kept_rows(rights) if tuple(row[0]) in prompts]


def loss_at_ratio_one(kept: list[list[Row]], name: str, model: Any) -> float:
    """The loss that is logged: its ratio is 1 where its gradient is that of the log-probability."""
    if name.startswith("own"):
        with torch.no_grad():
            return float(sum(naive_loss(model, rows, name) for rows in kept) / len(kept))
    total = 0.0
    for rows in kept:
        tokens = sum(len(row[1]) for row in rows)
        for _, answer, advantage in rows:
            share = {"dapo": len(answer) / tokens, "dr_grpo": len(answer) / LONGEST / len(rows)}
            total -= advantage * share.get(name, 1 / len(rows))
    return total / len(kept)


@pytest.mark.parametrize("name", ["grpo", "dapo"])
@pytest.mark.parametrize("slices", [3, 6])
def test_the_entropy_bonus_is_of_the_rows_that_train(
    tmp_path: Path, name: str, slices: int
) -> None:
    """Each micro-batch's mean over tokens counts by its share of the rows that train."""
    rights, coefficient = (2, 0, 4), 3.0
    trainer, found = one_step(tmp_path, name, rights, slices, 1, entropy_coef=coefficient)
    rows, model = kept_rows(rights), make_model()
    bonus = torch.zeros(())
    for part in composed(trainer):
        if part:
            entropy = torch.cat([scored(model, row)[1] for row in part])
            bonus = bonus + len(part) / len(rows) * entropy.mean()
    wanted = gradient(naive_loss(model, rows, name) - coefficient * bonus, model)
    assert (found - wanted).norm() / wanted.norm() < 2e-4


@pytest.mark.parametrize("slices", [3, 6])
def test_bnpo_is_the_mean_over_micro_batches_that_train(tmp_path: Path, slices: int) -> None:
    trainer = make_grpo_trainer(
        tmp_path, (2, 0, 4), max_steps=1, steps_per_generation=slices,
        per_device_train_batch_size=12 // slices, gradient_accumulation_steps=slices,
        loss_type="bnpo",
    )  # fmt: skip
    attach(trainer, gate=ZeroVariance())
    before = weights(trainer)
    trainer.train()
    found = (before - weights(trainer)) / LEARNING_RATE
    model, loss = make_model(), torch.zeros(())
    for part in composed(trainer):
        if part:
            loss = loss + len(part) / 4 * naive_loss(model, part, "dapo")
    wanted = gradient(loss, model)
    assert (found - wanted).norm() / wanted.norm() < 2e-4


@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_topping_up_an_empty_batch_is_a_run_without_a_gate(tmp_path: Path, name: str) -> None:
    """The rejected groups train as they do there: with advantages of 0, which dilute the step."""
    moved = []
    for gated in (True, False):
        trainer = make_grpo_trainer(
            tmp_path, (2, 0, 4, 0), max_steps=1, gradient_accumulation_steps=2,
            steps_per_generation=1, **KINDS[name][1],
        )  # fmt: skip
        if gated:
            refill = Refill(max_rounds=0, on_short="top_up")
            attach(trainer, gate=ZeroVariance(), refill=refill)
        before = weights(trainer)
        trainer.train()
        moved.append(before - weights(trainer))
    assert bool(moved[1].any())
    assert (moved[0] - moved[1]).norm() / moved[1].norm() < 1e-5


def test_a_replaced_batch_loses_nothing_to_an_empty_one(tmp_path: Path) -> None:
    """Two of three groups fill the first batch; the second has none to repeat, and is skipped."""
    refill = Refill(max_rounds=0, on_short="replace")
    rights = (2, 1, 4, 0, 0, 4)
    trainer, found = one_step(tmp_path, "grpo", rights, 1, 2, refill=refill)
    alone = make_grpo_trainer(
        tmp_path, rights, max_steps=1, loss_type="grpo", per_device_train_batch_size=12
    )
    attach(alone, gate=ZeroVariance(), refill=refill)
    before = weights(alone)
    alone.train()
    wanted = (before - weights(alone)) / LEARNING_RATE
    assert (found - wanted).norm() / wanted.norm() < 1e-5
    assert losses(trainer) == pytest.approx(losses(alone), abs=1e-6)


def test_rows_that_were_dropped_are_not_even_forwarded(tmp_path: Path) -> None:
    trainer = make_grpo_trainer(
        tmp_path, (2, 0, 4), max_steps=1, steps_per_generation=4, per_device_train_batch_size=3,
        gradient_accumulation_steps=4,
    )  # fmt: skip
    attach(trainer, gate=ZeroVariance())
    made = spy(trainer)
    trainer.train()
    assert [len(part["prompt_ids"]) for part in trainer._buffered_inputs] == [1, 1, 1, 1]
    assert len(made[0]["prompt_ids"]) == 4


def make_routing_model() -> Any:
    set_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": 4}
    return MixtralForCausalLM(
        MixtralConfig(
            num_hidden_layers=2,
            max_position_embeddings=64,
            pad_token_id=0,
            router_aux_loss_coef=1.0,
            output_router_logits=True,
            **sizes,
            **heads,
        )  # fmt: skip
    )


@pytest.mark.parametrize("rights", [(2, 0, 4), (0, 4, 0)])
def test_rows_that_were_dropped_do_not_train_the_router(tmp_path: Path, rights: Any) -> None:
    trainer = make_grpo_trainer(
        tmp_path, rights, model=make_routing_model(), max_steps=1, per_device_train_batch_size=12
    )
    assert trainer.aux_loss_enabled
    attach(trainer, gate=ZeroVariance())
    before = weights(trainer)
    trainer.train()
    moved = before - weights(trainer)
    if 2 not in rights:
        assert not bool(moved.any())
        return
    alone = make_grpo_trainer(
        tmp_path, (2,), model=make_routing_model(), max_steps=1, per_device_train_batch_size=4
    )
    alone.train()
    wanted = before - weights(alone)
    assert (moved - wanted).norm() / wanted.norm() < 1e-5


def test_a_router_is_refused_rows_that_fill_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_grpo_checks, "world_size", lambda: 3)
    trainer = make_grpo_trainer(tmp_path, (2, 0, 4), model=make_routing_model())
    with pytest.raises(ValueError, match="equally many on all 3 processes with router_aux_loss_co"):
        RolloutSelection(trainer, gate=ZeroVariance())
    RolloutSelection(trainer)


def test_deepspeed_is_refused_steps_over_several_batches(tmp_path: Path) -> None:
    """Its engine has updated the weights before a batch that was empty can be made up for."""
    trainer = make_grpo_trainer(
        tmp_path, (2, 0, 4, 2), steps_per_generation=1, gradient_accumulation_steps=2
    )
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match=r"multiple of gradient_accumulation_steps.*got 1 and 2"):
        RolloutSelection(trainer, gate=ZeroVariance())
    RolloutSelection(
        trainer, gate=ZeroVariance(), refill=Refill(max_rounds=0, on_short="top_up")
    ).detach()


# Regrouping ----------------------------------------------------------------------------------


@given(st.integers(0, 14), st.integers(1, 5), st.integers(1, 3), st.randoms())
def test_every_rank_spreads_its_rows_alike(rows: int, slices: int, ranks: int, random: Any) -> None:
    """No row is lost or doubled, and micro-batches are as large on every rank."""
    longest = -(-rows // ranks)
    size = -(-max(longest, 1) // slices) * slices
    counts = [rows // ranks + (rank < rows % ranks) for rank in range(ranks)]
    shapes = []
    for count in counts:
        numbers = list(range(count)) + [-1] * (size - count)
        random.shuffle(numbers)
        batch = torch.tensor(numbers).chunk(slices)
        parts = [{"x": x, TRAINS: x >= 0, ROWS: torch.tensor(rows), "none": None} for x in batch]
        made = regroup(parts, ranks)
        assert len(made) == slices
        assert sorted(n for part in made for n in part["x"].tolist() if n >= 0) == list(
            range(count)
        )
        assert all(torch.equal(part[TRAINS], part["x"] >= 0) for part in made)
        shapes.append([len(part["x"]) for part in made])
    assert all(shape == shapes[0] for shape in shapes)
    assert min(shapes[0]) >= 1 and max(shapes[0]) - min(shapes[0]) <= 1
    assert sum(shapes[0]) == max(longest, slices)
