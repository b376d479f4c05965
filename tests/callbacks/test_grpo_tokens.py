"""Token weights, advantages and temperatures through the trainer's own loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from onlinesel.rl import DRPO, HAPO, TokenAverage, TopEntropy
from tests.callbacks.grpo_hosts import (
    attach,
    make_grpo_trainer,
    make_ramp,
    spy,
    weights,
    word_parity,
)
from tests.callbacks.hosts import make_model

GOLDEN = Path(__file__).parents[1] / "golden"
HAPO_CASES = json.loads((GOLDEN / "hapo.json").read_text("utf-8"))
DRPO_CASES = json.loads((GOLDEN / "drpo.json").read_text("utf-8"))
VARIANTS = {
    "signed": HAPO(),
    "signed_base_neutral": HAPO(neutral="base"),
    "as_released": HAPO(signed=False),
}


def double(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def loss_of(trainer: Any, callback: Any, inputs: dict[str, Any], new: torch.Tensor) -> Any:
    """Return the trainer's loss and its gradient for log-probabilities that are given."""
    new = new.clone().requires_grad_()
    callback._call["_get_per_token_logps_and_entropies"] = lambda *_, **__: (
        new, torch.zeros_like(new), None
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.detach(), new.grad


def batch_of(case: dict[str, Any], advantages: torch.Tensor) -> dict[str, Any]:
    mask = torch.tensor(case["inputs"]["mask"])
    return {
        "prompt_ids": torch.ones(len(mask), 2, dtype=torch.long),
        "prompt_mask": torch.ones(len(mask), 2, dtype=torch.long),
        "completion_ids": torch.ones_like(mask),
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": double(case["inputs"]["old_logp"]),
        "num_items_in_batch": mask.sum(),
    }


@pytest.mark.parametrize("case", ["main", "fallback"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_hapo_through_the_trainers_loss(tmp_path: Path, variant: str, case: str) -> None:
    golden = HAPO_CASES[case]
    method = VARIANTS[variant]
    trainer = make_grpo_trainer(tmp_path, epsilon=0.2, epsilon_high=0.28, delta=10.0)
    callback = attach(trainer, tokens=method)
    entropy, mask = double(golden["inputs"]["entropy"]), double(golden["inputs"]["mask"]).bool()
    inputs = batch_of(golden, double(golden["advantages"]["token_level"]))
    inputs["onlinesel_entropy"] = entropy
    callback._tokens.statistics = method.statistics(entropy[mask])
    found, gradient = loss_of(trainer, callback, inputs, double(golden["inputs"]["new_logp"]))
    want = golden[variant]
    assert found.item() == pytest.approx(want["loss_token_mean"], rel=1e-9)
    wanted = double(want["grad_new_logp"])
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)
    assert (trainer.epsilon_low, trainer.epsilon_high) == (0.2, 0.28)  # put back


@pytest.mark.parametrize("case", ["default", "small_tau", "disco_limit"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_golden_drpo_through_the_trainers_loss(tmp_path: Path, case: str, loss_type: str) -> None:
    """Whatever the trainer's loss divides by, the gradient is that of DRPO's objective."""
    from onlinesel.callbacks.grpo.assemble import final_advantages
    from onlinesel.callbacks.grpo.decide import Group

    golden = DRPO_CASES[case]
    inputs = golden["inputs"]
    mask, logp = torch.tensor(inputs["mask"]), double(inputs["new_logp"])
    trainer = make_grpo_trainer(
        tmp_path, loss_type=loss_type, max_completion_length=inputs["max_response_length"]
    )
    method = DRPO(lam=inputs["lam"], tau=inputs["tau"])
    callback = attach(trainer, advantages=method)
    lengths = mask.sum(dim=1)
    rewards, numbers = torch.tensor(inputs["rewards"]).float(), torch.tensor(inputs["groups"])
    groups = [
        Group(
            prompt=int(g),
            rewards=rewards[numbers == g, None],
            outcome=rewards[numbers == g],
            weights=torch.ones(int((numbers == g).sum())),
            lengths=lengths[numbers == g],
        )
        for g in numbers.unique()
    ]
    scores = (logp * mask).sum(dim=1) / lengths.clamp(min=1)
    values = final_advantages(groups, trainer, method, scores.float())
    batch = batch_of(golden, values.double())
    batch["old_per_token_logps"] = logp
    _, gradient = loss_of(trainer, callback, batch, logp)
    wanted = double(golden["grad_discriminative"])
    torch.testing.assert_close(gradient, wanted, rtol=2e-5, atol=1e-8)


def test_hapo_statistics_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    """Two micro-batches share one pivot, from the entropies of all their tokens."""
    trainer = make_grpo_trainer(
        tmp_path, (2, 1), steps_per_generation=2, per_device_train_batch_size=4, max_steps=1,
        gradient_accumulation_steps=2, num_iterations=2,
    )  # fmt: skip
    callback = attach(trainer, tokens=HAPO())
    made = spy(trainer)
    trainer.train()
    batch = made[0]
    mask = batch["completion_mask"].bool()
    said = HAPO().statistics(batch["onlinesel_entropy"][mask])
    for name, value in said.items():
        assert callback._tokens.statistics[name].item() == pytest.approx(value.item(), rel=1e-6)
    # Entropies are the model's own: four words in five are as good as drawn from 64.
    assert 3.9 < float(batch["onlinesel_entropy"][mask].mean()) < float(torch.tensor(64.0).log())


def test_token_average_replaces_the_advantages(tmp_path: Path) -> None:
    trainer = make_grpo_trainer(tmp_path, (2, 1), max_steps=1)
    attach(trainer, advantages=TokenAverage())
    made = spy(trainer)
    trainer.train()
    batch = made[0]
    lengths = batch["completion_mask"].sum(dim=1)
    for group in (slice(0, 4), slice(4, 8)):
        total = (batch["advantages"][group] * lengths[group]).sum()
        assert total.item() == pytest.approx(0, abs=1e-4)
    assert bool((batch["advantages"] != 0).all())


def test_top_entropy_is_the_trainers_own_mask_over_the_whole_batch(tmp_path: Path) -> None:
    moved = []
    for own in (True, False):
        setting = {"top_entropy_quantile": 0.25} if own else {}
        trainer = make_grpo_trainer(tmp_path, (2, 1), max_steps=1, **setting)
        if not own:
            attach(trainer, tokens=TopEntropy(0.25))
        before = weights(trainer)
        trainer.train()
        moved.append(before - weights(trainer))
    # TRL's quantile interpolates between two tokens, ours takes a token: at most one differs.
    cosine = torch.cosine_similarity(moved[0], moved[1], dim=0)
    assert cosine > 0.9 and bool(moved[0].any())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_tokens_are_scored_at_the_temperature_that_sampled(
    tmp_path: Path, lora: bool, fused: bool
) -> None:
    trainer = make_grpo_trainer(
        tmp_path, (2, 1), known=False, rewards=word_parity, max_steps=1, num_iterations=2,
        model=make_model(lora=lora), temperature=0.8,
    )  # fmt: skip
    attach(trainer, temperature=make_ramp(), fused_logprobs=fused)
    made = spy(trainer)
    seen: list[torch.Tensor] = []
    original = trainer._get_per_token_logps_and_entropies

    def noted(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        seen.append(result[0].detach())
        return result

    trainer._get_per_token_logps_and_entropies = noted
    model = trainer.model
    trainer.train()
    batch = made[0]
    mask = batch["completion_mask"].bool()
    steps = torch.arange(mask.shape[1])
    heat = (1 + 0.5 * (steps + 1)).expand_as(mask)
    torch.testing.assert_close(batch["onlinesel_temperature"][mask], heat[mask])
    trainer2 = make_grpo_trainer(tmp_path, model=make_model(lora=lora))
    with torch.no_grad():
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        logits = trainer2.model(input_ids=ids, attention_mask=attention).logits
    logits = logits[:, -mask.shape[1] - 1 : -1] / (0.8 * heat[..., None])
    wanted = logits.log_softmax(-1).gather(-1, batch["completion_ids"][..., None])[..., 0]
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(batch["old_per_token_logps"][mask], wanted[mask], **close)
    # The noted entropy is that before any temperature.
    raw = (logits * 0.8 * heat[..., None]).log_softmax(-1)
    entropy = -(raw.exp() * raw).sum(-1)
    torch.testing.assert_close(batch["onlinesel_entropy"][mask], entropy[mask], **close)
    # In the loss as well: before the first update the ratio is one.
    torch.testing.assert_close(seen[1].sort(0).values, seen[0].sort(0).values, **close)
    assert "generate" not in model.__dict__
