"""Prompts with images: every forward sees them, or the part is refused before it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features

from onlinesel.callbacks.grpo import RolloutSelection
from onlinesel.callbacks.grpo.images import images_of
from onlinesel.callbacks.grpo.state import buffer_tensors, restore_buffer
from onlinesel.rl import (
    DRPO,
    HAPO,
    AdaptiveTemperature,
    MaxVariance,
    Refill,
    SharedDifficulty,
    Thompson,
    ZeroVariance,
)
from tests.callbacks.grpo_hosts import attach, spy, weights
from tests.callbacks.image_hosts import (
    MESSAGES,
    make_dataset,
    make_seeing_model,
    make_seeing_trainer,
    messages,
)


def naive(batch: dict[str, Any], row: int, seen: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy of each token of one completion, from a model as it began."""
    model = make_seeing_model()
    prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
    answer = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
    ids = torch.cat([prompt, answer])[None]
    inputs = {"input_ids": ids, "pixel_values": batch["pixel_values"][row : row + 1]}
    with torch.no_grad():
        if seen:
            logits = model(**inputs).logits[0]
        else:
            logits = model(input_ids=ids).logits[0]
    log_probs = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return log_probs.gather(-1, answer[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)


@pytest.mark.parametrize("where", ["messages", "image"])
def test_token_weights_see_the_images(tmp_path: Path, where: str) -> None:
    trainer = make_seeing_trainer(tmp_path, where)
    attach(trainer, tokens=HAPO())
    made = spy(trainer)
    trainer.train()
    batch, blind = made[0], 0.0
    for row in range(8):
        mask = batch["completion_mask"][row].bool()
        found = batch["onlinesel_entropy"][row][mask]
        torch.testing.assert_close(found, naive(batch, row)[1], rtol=1e-4, atol=1e-5)
        blind = max(blind, float((found - naive(batch, row, seen=False)[1]).abs().max()))
    assert blind > 1e-3, "the images change nothing, so this test would see nothing"


def test_scores_of_completions_see_the_images(tmp_path: Path) -> None:
    trainer = make_seeing_trainer(tmp_path, "messages")
    callback = attach(trainer, advantages=DRPO())
    made, scores = spy(trainer), []
    measure = callback._tokens.measure

    def noted(*args: Any) -> Any:
        scores.append(measure(*args))
        return scores[-1]

    callback._tokens.measure = noted  # type: ignore[method-assign]
    trainer.train()
    for row in range(8):
        wanted = naive(made[0], row)[0].mean()
        assert float(scores[0][row]) == pytest.approx(float(wanted), rel=1e-4)
        assert float(naive(made[0], row, seen=False)[0].mean()) != pytest.approx(float(wanted))


def test_temperatures_and_our_head_see_them_too(tmp_path: Path) -> None:
    """TRL's head on scaled states, and ours with the temperature of each token."""
    moved = []
    for fused in (False, True):
        trainer = make_seeing_trainer(tmp_path, "messages")
        attach(
            trainer, tokens=HAPO(), temperature=AdaptiveTemperature(tau=0.5), fused_logprobs=fused
        )
        before = weights(trainer)
        trainer.train()
        moved.append(before - weights(trainer))
    assert bool(moved[0].any())
    assert (moved[0] - moved[1]).norm() / moved[0].norm() < 1e-4


@pytest.mark.parametrize("where", ["messages", "image"])
@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"gate": ZeroVariance()},
            "train_dataset must be text only with gate=, got ",
        ),
        ({"gate": ZeroVariance(), "refill": Refill()}, "text only with gate=.* With images use pr"),
        ({"rollouts": MaxVariance(2)}, "train_dataset must be text only with rollouts="),
        ({"prompts": SharedDifficulty()}, "features must be a column of the data set with images"),
    ],
)
def test_rows_of_images_are_not_dropped_or_moved(
    tmp_path: Path, where: str, parts: dict[str, Any], message: str
) -> None:
    trainer = make_seeing_trainer(tmp_path, where)
    before = dict(trainer.__dict__)
    with pytest.raises(ValueError, match=message):
        RolloutSelection(trainer, **parts)
    assert trainer.__dict__ == before
    RolloutSelection(trainer, prompts=Thompson())


def test_images_that_come_unannounced_are_refused_before_they_train(tmp_path: Path) -> None:
    """A stream is not asked for its rows beforehand."""
    trainer = make_seeing_trainer(tmp_path, "none")
    trainer.train_dataset = make_dataset("messages").to_iterable_dataset()
    trainer.accelerator.dataloader_config.dispatch_batches = False
    attach(trainer, gate=ZeroVariance())
    before = weights(trainer)
    with pytest.raises(ValueError, match="must hold text rows only, got num_images, pixel_values"):
        trainer.train()
    assert torch.equal(before, weights(trainer))


def test_a_model_that_sees_is_gated_on_text(tmp_path: Path) -> None:
    trainer = make_seeing_trainer(tmp_path, "none")
    attach(trainer, gate=ZeroVariance())
    before = weights(trainer)
    trainer.train()
    assert bool((before - weights(trainer)).any())


def test_images_are_found_where_they_are() -> None:
    text = [messages(0, images=False), messages(1, images=False)]
    late = [*text, messages(2)]
    features = Features({"prompt": MESSAGES})

    def dataset(prompts: list[Any]) -> Dataset:
        return Dataset.from_list([{"prompt": prompt} for prompt in prompts], features=features)

    class Rows(list):  # type: ignore[type-arg]
        """No Dataset; its first row is what it can be asked for."""

    assert images_of(dataset(text)) is None  # a field for images without an image in it
    assert images_of(dataset(late)) == "images in the messages of 'prompt'"
    assert images_of(Rows([{"prompt": messages(0)}])) == "images in the messages of 'prompt'"
    assert images_of(Rows([{"prompt": "w2 w3"}])) is None
    assert images_of(Dataset.from_list([{"prompt": "w2"}])) is None
    assert images_of(Dataset.from_list([{"prompt": "w2", "images": []}])) == "a column 'images'"
    adding = dataset(text).with_transform(lambda rows: {"prompt": [messages(0)]})
    assert images_of(adding) == "images in the messages of 'prompt'"


def test_a_batch_of_images_survives_a_checkpoint(tmp_path: Path) -> None:
    """How many images each row has is a list, which was left out, and with it the batch."""
    trainer = make_seeing_trainer(tmp_path, "messages", num_iterations=2)
    attach(trainer, tokens=HAPO())
    trainer.train()
    assert trainer._step == 1  # of the two that the batch is for
    state = buffer_tensors(trainer)
    other = make_seeing_trainer(tmp_path, "messages", num_iterations=2)
    restore_buffer(other, state, torch.device("cpu"))
    assert other._step == 1
    for mine, whole in zip(other._buffered_inputs, trainer._buffered_inputs, strict=True):
        assert mine.keys() == whole.keys()
        assert mine["num_images"] == whole["num_images"] == [1] * 8
        assert torch.equal(mine["pixel_values"], whole["pixel_values"])
