"""What a record says of a run: its seeds and settings, and its cost after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import onlinesel
from onlinesel.callbacks.hf import OnlineSelection
from onlinesel.report import read_run
from onlinesel.report.runlog import find_runs
from onlinesel.strategies import TopLoss, Uniform
from tests.callbacks.grpo_hosts import attach as attach_grpo
from tests.callbacks.grpo_hosts import make_grpo_trainer
from tests.callbacks.hosts import attach, choices, make_model, make_trainer
from tests.callbacks.loop_hosts import make_loader, sgd, train


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def test_the_seed_is_the_trainers_unless_it_is_given(tmp_path: Path) -> None:
    for seed, given in ((5, {}), (6, {"seed": 0})):
        trainer = make_trainer(tmp_path / f"out-{seed}", seed=seed, learning_rate=0.25)
        attach(trainer, TopLoss(), candidates=2, record=tmp_path / f"{seed}", **given)
        trainer.train()
    first, second = facts(tmp_path / "5"), facts(tmp_path / "6")
    assert (first["seed"], first["trainer_seed"]) == (5, 5)
    assert (second["seed"], second["trainer_seed"]) == (0, 6)
    told = first["settings"]
    assert told == second["settings"]  # a seed, a folder or a way of logging makes no arm
    assert told["learning_rate"] == "0.25" and told["optim"] == "sgd" and told["rows"] == 48
    assert told["model"] == "LlamaForCausalLM"
    assert told["parameters"] == sum(p.numel() for p in trainer.model.parameters())


def test_grpo_takes_the_trainers_seed_too(tmp_path: Path) -> None:
    trainer = make_grpo_trainer(tmp_path / "out", max_steps=1, seed=7)
    callback = attach_grpo(trainer, record=tmp_path / "record")
    trainer.train()
    found = facts(tmp_path / "record")
    assert (callback.seed, found["seed"], found["trainer_seed"]) == (7, 7, 7)
    assert found["settings"]["learning_rate"] == str(trainer.args.learning_rate)


def test_a_resumed_record_goes_on_in_seconds_and_rows(tmp_path: Path) -> None:
    record = tmp_path / "record"
    for resume in (False, True):
        trainer = make_trainer(
            tmp_path / "out", max_steps=6 if resume else 5, save_strategy="steps", save_steps=3
        )
        attach(trainer, TopLoss(), candidates=2, record=record)
        checkpoint = str(tmp_path / "out" / "checkpoint-3") if resume else None
        before = read_run(record).steps if resume else ()
        trainer.train(resume_from_checkpoint=checkpoint)
    steps = read_run(record).steps
    assert [s.step for s in steps] == [1, 2, 3, 4, 5, 6]
    assert [s.rows for s in steps] == [2 * k for k in range(1, 7)]
    assert [s.candidates for s in steps] == [4 * k for k in range(1, 7)]
    assert steps[:3] == before[:3]
    for earlier, later in zip(steps, steps[1:], strict=False):
        assert later.seconds == pytest.approx(earlier.seconds + later.step_seconds)
        assert later.cpu_seconds >= earlier.cpu_seconds


def test_a_loop_that_goes_on_does_so_too(tmp_path: Path) -> None:
    def steps(model: Any) -> Any:
        return onlinesel.steps(
            make_loader(), model, TopLoss(), candidates=2, record=tmp_path / "record"
        )

    torch.manual_seed(11)
    model = make_model()
    first = steps(model)
    train(first, model, sgd(model), stop=3)
    state = first.state_dict()
    first.close()
    second = steps(model)
    second.load_state_dict(state)
    train(second, model, sgd(model), stop=5)
    second.state_dict()
    second.close()
    assert [s.rows for s in read_run(tmp_path / "record").steps] == [2, 4, 6, 8, 10]
    found = facts(tmp_path / "record")
    assert found["trainer_seed"] == torch.initial_seed() and found["seed"] == 0
    assert found["settings"]["batch size"] == 2


def test_every_train_call_has_a_record_of_its_own(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "out", max_steps=2)
    attach(trainer, TopLoss(), candidates=2, record=tmp_path / "runs" / "top")
    for _ in range(3):
        trainer.train()
    found = find_runs([tmp_path / "runs"])
    assert sorted(path.name for path in found) == ["top", "top-2", "top-3"]
    for path in found:
        run = read_run(path)
        assert [s.rows for s in run.steps] == [2, 4] and len(choices(path)) == 2
    again = make_trainer(tmp_path / "out", max_steps=2)
    attach(again, Uniform(), candidates=2, record=tmp_path / "runs" / "top")
    with pytest.raises(ValueError, match="record: folder must hold no run, got .*top.* elsewhere"):
        again.train()
    assert len(choices(tmp_path / "runs" / "top")) == 2


def test_each_trial_of_a_search_has_a_record_with_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    trainer = make_trainer(tmp_path / "out", max_steps=2)
    trainer.model_init = lambda: make_model()
    attach(trainer, TopLoss(), candidates=2, record=tmp_path / "search")
    for number, rate in enumerate((0.1, 0.2)):  # as hyperparameter_search does, with optuna
        trainer.args.learning_rate = rate
        trainer.train(trial=SimpleNamespace(number=number, params={}))
    found = sorted(find_runs([tmp_path / "search"]))
    assert [path.name for path in found] == ["run-0", "run-1"]
    assert [facts(path)["settings"]["learning_rate"] for path in found] == ["0.1", "0.2"]
    assert [len(choices(path)) for path in found] == [2, 2]


def test_a_run_without_selection_state_still_goes_on_in_its_record(tmp_path: Path) -> None:
    out, record = tmp_path / "out", tmp_path / "record"
    trainer = make_trainer(out, max_steps=2, save_strategy="steps", save_steps=2,
                           save_only_model=True)  # fmt: skip
    attach(trainer, TopLoss(), candidates=2, record=record)
    trainer.train()
    trainer = make_trainer(out, max_steps=3)
    trainer.add_callback(OnlineSelection(trainer, TopLoss(), candidates=2, record=record))
    with pytest.warns(UserWarning, match="has no state of the selection"):
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    assert [s.rows for s in read_run(record).steps] == [2, 4, 6]
