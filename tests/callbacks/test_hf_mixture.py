"""Groups ride with their rows, and a mixture decides which rows the trainer loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from onlinesel import Signals
from onlinesel.callbacks.hf import OnlineSelection
from onlinesel.mixing import ODM, DomainSampler, DoReMi, FixedMixture, Mixture
from onlinesel.quotas import PerGroup
from onlinesel.strategies import RS2, TopLoss, Uniform
from tests.callbacks.hosts import (
    attach,
    choices,
    make_model,
    make_rows,
    make_trainer,
    reference_gradient,
)
from tests.callbacks.test_hf_data import Stream, kept
from tests.callbacks.test_hf_gradient import step_error

DOMAINS = [0 if i % 4 else 7 for i in range(48)]
"""Three quarters of the rows are of domain 0, the others of domain 7."""


def rows(count: int = 48) -> list[dict[str, Any]]:
    return [{**row, "domain": DOMAINS[i]} for i, row in enumerate(make_rows(count))]


def losses_of(ids: list[int]) -> list[float]:
    model = make_model()
    return [reference_gradient(model, make_rows(), [i], [1.0], "tokens")[1] for i in ids]


@dataclass(frozen=True)
class Told(Mixture):
    """Notes what it is told, and then draws domain 7 only."""

    needs = ("loss", "reference_loss")

    def init(self, sizes: torch.Tensor) -> Any:
        return {"seven": torch.tensor(0.0)}

    def proportions(self, state: Any) -> torch.Tensor:
        seven = float(state["seven"])
        return torch.tensor([1.0 - seven, seven], dtype=torch.float64)

    def observe(
        self, domain: Any, loss: Any, state: Any, *, reference_loss: Any = None
    ) -> dict[str, torch.Tensor]:
        return {
            "seven": torch.tensor(1.0), "domain": domain, "loss": loss, "known": reference_loss
        }  # fmt: skip


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_each_group_keeps_its_quota(tmp_path: Path, kind: Any) -> None:
    """Of eight candidates the best four train; two groups keep their own best instead."""
    trainer = make_trainer(tmp_path, rows=kind(rows()), gradient_accumulation_steps=2)
    strategy = PerGroup(TopLoss(), shares={0: 0.5, 7: 0.5})
    attach(trainer, strategy, candidates=4, groups="domain", record=tmp_path / "record")
    trainer.train()
    choice = choices(tmp_path / "record")[0]
    by_loss = sorted(zip(losses_of(choice["ids"]), choice["ids"], strict=True), reverse=True)
    wanted = {i for domain in (0, 7) for i in [i for _, i in by_loss if DOMAINS[i] == domain][:2]}
    assert set(kept(choice)) == wanted != {i for _, i in by_loss[:4]}


def test_groups_leave_the_gradient_exact(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, rows=rows(), gradient_accumulation_steps=2)
    error, _ = step_error(
        tmp_path, trainer, PerGroup(TopLoss()), candidates=3, groups="domain", mixture=ODM()
    )
    assert error < 1e-6


@pytest.mark.parametrize("workers", [0, 2])
def test_the_mixture_draws_the_candidates(tmp_path: Path, workers: int) -> None:
    mixture = FixedMixture((0.25, 0.75))
    trainer = make_trainer(tmp_path, rows=rows(), max_steps=9, dataloader_num_workers=workers)
    attach(
        trainer, Uniform(), candidates=4, groups="domain", mixture=mixture, seed=5,
        record=tmp_path / "record",
    )  # fmt: skip
    trainer.train()
    seen = sum((choice["ids"] for choice in choices(tmp_path / "record")), [])
    sampler, expected = DomainSampler(torch.tensor(DOMAINS), mixture, seed=5), []
    for sampler.epoch in (0, 1):
        expected += list(sampler)
    assert seen == expected[:72]  # six steps are an epoch
    shares = trainer.state.log_history[0]
    assert (shares["selection/share/0"], shares["selection/share/7"]) == (0.25, 0.75)


def test_the_mixture_is_told_the_losses_of_the_rows_that_trained(tmp_path: Path) -> None:
    made = [{**row, "known": 3.0 + i} for i, row in enumerate(rows())]
    trainer = make_trainer(tmp_path, rows=made, max_steps=4, learning_rate=0.0)
    callback = attach(
        trainer, TopLoss(), candidates=2, groups="domain", mixture=Told(), reference="known",
        record=tmp_path / "record",
    )  # fmt: skip
    trainer.train()
    seen = choices(tmp_path / "record")
    told, trained = callback._domains._state, kept(seen[-1])
    assert told["loss"].tolist() == pytest.approx(losses_of(trained), rel=1e-5)
    assert told["known"].tolist() == [3.0 + i for i in trained]
    assert told["domain"].tolist() == [int(DOMAINS[i] == 7) for i in trained]
    # The batch after the first step was drawn already when it ended; then only domain 7 comes.
    assert {DOMAINS[i] for i in seen[0]["ids"] + seen[1]["ids"]} == {0}
    assert {DOMAINS[i] for i in seen[2]["ids"] + seen[3]["ids"]} == {7}


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        (PerGroup(TopLoss()), {}, "groups must be the column with the group of each row, got None"),
        (TopLoss(), {"groups": "source"}, "groups must be a column of the training dataset, got "),
        (TopLoss(), {"groups": "name"}, "groups must be a column of integers, got 'name'"),
        (TopLoss(), {"mixture": ODM()}, "groups must be the column with the domain of each row"),
        (
            TopLoss(),
            {"mixture": ODM(), "groups": "domain", "ids": "hash"},
            "ids must be row numbers, got others",
        ),
        (
            RS2(),
            {"mixture": ODM(), "groups": "domain"},
            "mixture must be without shadow and without a method that plans epochs",
        ),
        (
            TopLoss(),
            {"mixture": ODM(), "groups": "domain", "shadow": True},
            "mixture must be without shadow",
        ),
        (
            TopLoss(),
            {"mixture": DoReMi(), "groups": "domain"},
            "reference must be a column of losses for this mixture, got None",
        ),
    ],
)
def test_what_cannot_be_mixed_is_refused(
    tmp_path: Path, strategy: Any, options: dict[str, Any], message: str
) -> None:
    made = Dataset.from_list([{**row, "name": "x"} for row in rows()])
    trainer = make_trainer(tmp_path, rows=made)
    before = dict(trainer.__dict__)
    with pytest.raises(ValueError, match=f"OnlineSelection: .*{message}"):
        OnlineSelection(trainer, strategy, **options)
    assert trainer.__dict__ == before


def test_streams_and_length_groups_are_not_mixed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ids must be row numbers"):
        OnlineSelection(
            make_trainer(tmp_path, rows=Stream()), TopLoss(), groups="domain", mixture=ODM()
        )
    trainer = make_trainer(tmp_path, rows=rows(), train_sampling_strategy="group_by_length")
    with pytest.raises(ValueError, match="train_sampling_strategy must be 'random' for a mixture"):
        OnlineSelection(trainer, TopLoss(), groups="domain", mixture=ODM())


def test_no_mixture_at_all_is_a_type_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="mixture must be"):
        OnlineSelection(
            make_trainer(tmp_path, rows=rows()), TopLoss(), groups="domain", mixture="ODM"
        )


def test_a_group_that_is_no_integer_is_refused(tmp_path: Path) -> None:
    made = [{**row, "domain": 0.5} for row in rows()]
    trainer = make_trainer(tmp_path, rows=made)
    attach(trainer, PerGroup(TopLoss()), candidates=2, groups="domain")
    with pytest.raises(TypeError, match="Signals: group must be an integer tensor"):
        trainer.train()


def test_signals_of_a_scorer_of_ones_own_meet_groups(tmp_path: Path) -> None:
    def score(model: Any, batch: Any) -> Signals:
        assert "onlinesel_group" not in batch and "domain" not in batch
        return Signals(loss=batch["input_ids"].float().mean(dim=1))

    trainer = make_trainer(tmp_path, rows=rows())
    attach(
        trainer, PerGroup(TopLoss()), candidates=4, groups="domain", score=score,
        record=tmp_path / "record",
    )  # fmt: skip
    trainer.train()
    assert len(kept(choices(tmp_path / "record")[0])) == 2


def test_a_second_run_draws_what_the_first_one_drew(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, rows=rows(), max_steps=8)
    callback = attach(trainer, TopLoss(), candidates=4, groups="domain", mixture=ODM())
    seen: list[list[int]] = []
    decided = callback._meter.decided

    def note(plan: Any) -> None:
        seen.append(plan.decisions[0][0].row_ids().tolist())
        decided(plan)

    callback._meter.decided = note  # type: ignore[method-assign]
    before = trainer.model.state_dict()
    start = {name: value.clone() for name, value in before.items()}
    for _ in range(2):
        trainer.model.load_state_dict(start)
        trainer.train()
    assert len(seen) == 16 and seen[:8] == seen[8:]
    assert len({tuple(sorted(ids)) for ids in seen[:8]}) == 8


def test_a_loader_asked_for_between_runs_disturbs_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, rows=rows(), max_steps=2)
    callback = attach(
        trainer, TopLoss(), candidates=4, groups="domain", mixture=FixedMixture((1, 1))
    )
    first = [batch["onlinesel_row_id"].tolist() for batch in trainer.get_train_dataloader()]
    trainer.train()
    again = [batch["onlinesel_row_id"].tolist() for batch in trainer.get_train_dataloader()]
    assert first == again and callback._data._sampler is callback._domains
