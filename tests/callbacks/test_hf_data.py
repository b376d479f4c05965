"""Ids survive, epochs keep their length, odd batches do what is documented."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import IterableDataset as TorchIterable

from onlinesel import Signals, When
from onlinesel.data.rows import content_ids
from onlinesel.strategies import RS2, UDS, LossReweight, RHOLoss, TopLoss, Uniform
from tests.callbacks.hosts import (
    attach,
    choices,
    collate,
    make_model,
    make_rows,
    make_sft_trainer,
    make_trainer,
    reference_gradient,
)


def kept(choice: dict[str, Any]) -> list[int]:
    return [i for i, w in zip(choice["ids"], choice["weights"], strict=True) if w > 0]


class Stream(TorchIterable):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(make_rows())


def test_an_epoch_scores_every_row_once_and_keeps_its_length(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=-1, num_train_epochs=2)
    attach(trainer, TopLoss(), candidates=4, record=tmp_path / "record")
    trainer.train()
    assert trainer.state.global_step == 12  # 48 rows, 2 x 4 candidates a step, 2 epochs
    seen = [choice["ids"] for choice in choices(tmp_path / "record")]
    for epoch in (seen[:6], seen[6:]):
        assert sorted(sum(epoch, [])) == list(range(48))
    assert seen[:6] != seen[6:]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_ids_are_row_numbers_whatever_loads_them(tmp_path: Path, kind: Any, workers: int) -> None:
    """The score recorded beside an id is the loss of that very row."""
    trainer = make_trainer(tmp_path, rows=kind(make_rows()), dataloader_num_workers=workers)
    attach(trainer, TopLoss(), candidates=3, record=tmp_path / "record")
    trainer.train()
    choice, model = choices(tmp_path / "record")[0], make_model()
    for i, score in zip(choice["ids"], choice["scores"], strict=True):
        _, loss = reference_gradient(model, make_rows(), [i], [1.0], "tokens")
        assert score == pytest.approx(loss, rel=1e-5)


def test_a_sample_id_column_is_used(tmp_path: Path) -> None:
    rows = Dataset.from_list([{**r, "sample_id": 2**53 + 1 + i} for i, r in enumerate(make_rows())])
    trainer = make_trainer(tmp_path, rows=rows, max_steps=-1, num_train_epochs=1)
    attach(trainer, Uniform(), record=tmp_path / "record")
    trainer.train()
    seen = sum((choice["ids"] for choice in choices(tmp_path / "record")), [])
    assert sorted(seen) == [2**53 + 1 + i for i in range(48)]


def test_sft_keeps_ids_through_its_collator(tmp_path: Path) -> None:
    trainer = make_sft_trainer(tmp_path, max_steps=-1, num_train_epochs=1)
    attach(trainer, Uniform(), record=tmp_path / "record")
    trainer.train()
    seen = sum((choice["ids"] for choice in choices(tmp_path / "record")), [])
    assert sorted(seen) == list(range(48))


@pytest.mark.parametrize(
    "stream",
    [Stream(), IterableDataset.from_generator(lambda: iter(make_rows()))],
    ids=["torch", "datasets"],
)
def test_streams_get_content_ids(tmp_path: Path, stream: Any) -> None:
    trainer = make_trainer(tmp_path, rows=stream, max_steps=3)
    attach(trainer, TopLoss(), candidates=4, record=tmp_path / "record")
    trainer.train()
    expected = [int(content_ids(collate([row]))[0]) for row in make_rows()]
    seen = sum((choice["ids"] for choice in choices(tmp_path / "record")), [])
    assert seen == expected[:24] and len(set(seen)) == 24


def test_a_ragged_last_batch_keeps_at_least_one_row(tmp_path: Path) -> None:
    """Nine rows, batches of eight candidates: the last step has one candidate and trains it."""
    trainer = make_trainer(tmp_path, rows=make_rows(9), max_steps=-1, num_train_epochs=1)
    attach(trainer, TopLoss(), candidates=4, record=tmp_path / "record")
    trainer.train()
    assert [len(kept(c)) for c in choices(tmp_path / "record")] == [2, 1]


def test_a_dataset_smaller_than_the_candidates_trains(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, rows=make_rows(3))
    with pytest.warns(UserWarning, match="16 candidates and the dataset has 3 rows"):
        attach(trainer, TopLoss(), candidates=8, record=tmp_path / "record")
        trainer.train()
    assert [len(kept(c)) for c in choices(tmp_path / "record")] == [1]


def test_group_by_length_still_groups_candidates(tmp_path: Path) -> None:
    rows = Dataset.from_list([{**r, "length": len(r["input_ids"])} for r in make_rows(400)])
    spread = {}
    for strategy in ("random", "group_by_length"):
        trainer = make_trainer(tmp_path, rows=rows, max_steps=20, train_sampling_strategy=strategy)
        attach(trainer, Uniform(), candidates=4, record=tmp_path / strategy)
        trainer.train()
        tokens = [torch.tensor(c["tokens"]).float() for c in choices(tmp_path / strategy)]
        spread[strategy] = float(torch.stack([t.std() for t in tokens]).mean())
    assert spread["group_by_length"] < 0.5 * spread["random"]


def test_an_own_sampler_reads_columns_of_the_data(tmp_path: Path) -> None:
    """Columns that the model does not take are gone from the loader's rows, not from the data."""
    hard = [(7 * i) % 32 for i in range(32)]
    rows = Dataset.from_list([{**r, "hard": h} for r, h in zip(make_rows(32), hard, strict=True)])
    trainer = make_trainer(tmp_path, rows=rows, max_steps=4)

    def easy_first(_: Any = None) -> list[int]:
        found = trainer.train_dataset["hard"]
        assert found[3:5] == hard[3:5] and list(trainer.train_dataset[:2]["hard"]) == hard[:2]
        return sorted(range(len(found)), key=lambda i: found[i])

    trainer._get_train_sampler = easy_first
    attach(trainer, Uniform(), candidates=2, record=tmp_path / "record")
    trainer.train()
    seen = [row for choice in choices(tmp_path / "record") for row in choice["ids"]]
    wanted = sorted(range(32), key=hard.__getitem__)
    step = len(seen) // 4
    for start in range(0, len(seen), step):
        assert sorted(seen[start : start + step]) == sorted(wanted[start : start + step])


def test_rows_without_labels_are_never_chosen(tmp_path: Path) -> None:
    rows = make_rows()
    for row in rows[::2]:
        row["labels"] = [-100] * len(row["labels"])
    trainer = make_trainer(tmp_path, rows=rows, max_steps=-1, num_train_epochs=1)
    attach(trainer, TopLoss(), candidates=2, record=tmp_path / "record")
    trainer.train()
    chosen = sum((kept(c) for c in choices(tmp_path / "record")), [])
    assert chosen and all(i % 2 == 1 for i in chosen)


@pytest.mark.parametrize("host", [make_trainer, make_sft_trainer])
@pytest.mark.parametrize("strategy", [TopLoss(), LossReweight(min_rows=2)])
def test_a_step_without_any_label_moves_nothing(tmp_path: Path, host: Any, strategy: Any) -> None:
    rows = [{**r, "labels": [-100] * len(r["labels"])} for r in make_rows()]
    trainer = host(tmp_path, rows=rows)
    attach(trainer, strategy, candidates=2)
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert trainer.state.log_history[0]["loss"] == 0.0


def test_rows_with_nan_losses_are_counted_and_never_chosen(tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[63] = float("nan")
    poisoned = {i for i, r in enumerate(make_rows()) if 63 in r["input_ids"]}
    trainer = make_trainer(tmp_path, model=model, max_steps=-1, num_train_epochs=1)
    attach(trainer, TopLoss(), candidates=3, record=tmp_path / "record")
    trainer.train()
    assert poisoned and not poisoned & set(sum((kept(c) for c in choices(tmp_path / "record")), []))
    counted = sum(h.get("selection/nonfinite", 0.0) for h in trainer.state.log_history)
    assert counted == len(poisoned)
    assert torch.isfinite(model.lm_head.weight).all()


def test_a_stream_that_knows_its_length_is_a_stream(tmp_path: Path) -> None:
    class Measured(Stream):
        def __len__(self) -> int:
            return 48

    trainer = make_trainer(tmp_path, rows=Measured(), max_steps=2)
    attach(trainer, TopLoss(), candidates=4, record=tmp_path / "record")
    trainer.train()
    expected = [int(content_ids(collate([row]))[0]) for row in make_rows()]
    assert sum((c["ids"] for c in choices(tmp_path / "record")), []) == expected[:16]


@pytest.mark.parametrize("name", ["sample_id", "source", "cached"])
def test_a_column_with_none_in_a_row_is_refused_before_the_run(tmp_path: Path, name: str) -> None:
    """An id, a group, a reference loss: what is missing is not made up."""
    filled = {"sample_id": 7, "source": 1, "cached": 0.5}
    rows = [
        {**r, **filled, name: None if i == 3 else filled[name]} for i, r in enumerate(make_rows())
    ]
    options: dict[str, Any] = {"groups": "source", "reference": "cached", "candidates": 2}
    message = rf"column '{name}' must have a number in every row, got None in 1 of 48. Fill it"
    trainer = make_trainer(tmp_path, rows=Dataset.from_list(rows))
    with pytest.raises(ValueError, match=message):
        attach(trainer, RHOLoss(), **options)
    # Rows that were left out do not count.
    attach(
        make_trainer(tmp_path, rows=Dataset.from_list(rows).select(range(4, 48))),
        RHOLoss(),
        **options,
    )


def test_a_row_without_an_id_is_refused_when_it_comes(tmp_path: Path) -> None:
    """A list of rows has no table that could be asked before."""
    rows = [{**r, "sample_id": None if i == 3 else i} for i, r in enumerate(make_rows())]
    trainer = make_trainer(tmp_path, rows=rows, max_steps=24)
    attach(trainer, TopLoss(), candidates=2, ids="sample_id")
    with pytest.raises(ValueError, match="column 'sample_id' must have a number in every row"):
        trainer.train()


def test_a_sample_id_that_is_no_integer_falls_back_to_row_numbers(tmp_path: Path) -> None:
    rows = Dataset.from_list([{**r, "sample_id": f"row-{i}"} for i, r in enumerate(make_rows())])
    trainer = make_trainer(tmp_path, rows=rows, max_steps=-1, num_train_epochs=1)
    attach(trainer, Uniform(), record=tmp_path / "record")
    trainer.train()
    seen = sum((choice["ids"] for choice in choices(tmp_path / "record")), [])
    assert sorted(seen) == list(range(48))


def test_the_dataset_is_still_told_its_epoch(tmp_path: Path) -> None:
    class Counting(list):  # type: ignore[type-arg]
        def set_epoch(self, epoch: int) -> None:
            epochs.append(epoch)

    epochs: list[int] = []
    whole = {"rows": Counting(make_rows()), "num_train_epochs": 2, "max_steps": -1}
    make_trainer(tmp_path, **whole).train()
    plain, epochs[:] = list(epochs), []
    trainer = make_trainer(tmp_path, **whole)
    attach(trainer, Uniform())
    trainer.train()
    assert plain and epochs == plain


def test_rows_that_are_not_mappings_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, rows=[(1, 2), (3, 4)])
    attach(trainer, Uniform())
    with pytest.raises(TypeError, match="rows must be mappings of names to values, got tuple"):
        trainer.train()


def test_a_batch_without_labels_is_refused(tmp_path: Path) -> None:
    def unlabelled(features: Any) -> Any:
        return {k: v for k, v in collate(features).items() if k != "labels"}

    trainer = make_trainer(tmp_path, collator=unlabelled)
    attach(trainer, TopLoss(), candidates=2)
    with pytest.raises(ValueError, match="batch must hold 'labels', got"):
        trainer.train()


def test_equal_tokens_with_other_labels_are_other_rows() -> None:
    row = make_rows(1)[0]
    other = {**row, "labels": [-100] * len(row["labels"])}
    ids = content_ids(collate([row, other, row]))
    assert ids[0] == ids[2] != ids[1]


def test_rows_that_differ_in_anything_are_other_rows() -> None:
    several = {"input_ids": torch.ones(3, 2).long(), "labels": torch.eye(3)}
    assert len(content_ids(several).unique()) == 3
    texts = {"x": torch.ones(4), "text": ["a", "b", "a", "a"], "boxes": [torch.ones(n) for n in
             (1, 1, 2, 1)]}  # fmt: skip
    ids = content_ids(texts).tolist()
    assert ids[0] == ids[3] and len(set(ids)) == 3


def test_metrics_are_means_over_the_steps_that_have_them(tmp_path: Path) -> None:
    """Every other step has no scores: the mean is that of the others, not half of it."""
    trainer = make_trainer(tmp_path, max_steps=4, logging_steps=4)
    strategy = When(TopLoss(), every=2, otherwise=Uniform())
    attach(trainer, strategy, candidates=2, record=tmp_path / "record")
    trainer.train()
    means = []
    for choice in choices(tmp_path / "record"):
        if choice["scores"] is not None:
            pairs = zip(choice["scores"], choice["weights"], strict=True)
            means.append(float(torch.tensor([s for s, w in pairs if w > 0]).mean()))
    logged = trainer.state.log_history[0]["selection/score_kept"]
    assert len(means) == 2 and logged == pytest.approx(sum(means) / 2)


def test_too_many_trained_rows_are_pointed_out(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    attach(trainer, LossReweight(min_rows=2), candidates=2)
    with pytest.warns(UserWarning, match="4 of 4 candidates train where 2 were asked for"):
        trainer.train()


def test_a_scorer_of_ones_own_runs_in_eval_mode_without_gradient(tmp_path: Path) -> None:
    seen = []

    def score(model: Any, batch: Any) -> Signals:
        seen.append((model.training, torch.is_grad_enabled()))
        return Signals(loss=batch["input_ids"].float().mean(dim=1))

    trainer = make_trainer(tmp_path)
    attach(trainer, TopLoss(), candidates=2, score=score)
    trainer.train()
    assert seen == [(False, False)] and trainer.model.training


def test_a_second_run_reads_the_head_again(tmp_path: Path) -> None:
    model = make_model()
    model.lm_head.weight.requires_grad_(False)
    trainer = make_trainer(tmp_path, model=model)
    callback = attach(trainer, UDS(alpha=0.0), candidates=2)
    scores = []
    for _ in range(2):
        trainer.train()
        scores.append(callback.selector.metrics()["score_kept"])
        model.lm_head.weight.data.mul_(100.0)
    assert scores[1] > 20 * scores[0]


def test_rs2_trains_each_row_once_in_two_epochs(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=-1, num_train_epochs=2)
    attach(trainer, RS2(fraction=0.5), record=tmp_path / "record")
    trainer.train()
    assert trainer.state.global_step == 24
    assert sorted(sum((kept(c) for c in choices(tmp_path / "record")), [])) == list(range(48))


def test_reference_losses_from_a_column_a_model_and_the_adapter_agree(tmp_path: Path) -> None:
    """The base model is the reference in all three; RHO must rank the rows the same way."""
    base, scores = make_model(), {}
    rows = make_rows()
    for row in rows:
        _, row["cached"] = reference_gradient(base, [row], [0], [1.0], "tokens")
    for name, reference in (("column", "cached"), ("model", make_model()), ("adapter", "adapter")):
        model = make_model(lora=True)
        trainer = make_trainer(tmp_path, model=model, rows=Dataset.from_list(rows))
        attach(trainer, RHOLoss(), candidates=4, reference=reference, record=tmp_path / name)
        trainer.train()
        choice = choices(tmp_path / name)[0]
        scores[name] = [s for _, s in sorted(zip(choice["ids"], choice["scores"], strict=True))]
    assert max(abs(s) for s in scores["column"]) > 1e-3
    assert scores["model"] == pytest.approx(scores["column"], abs=2e-5)
    assert scores["adapter"] == pytest.approx(scores["column"], abs=2e-5)


def test_evaluation_is_untouched(tmp_path: Path) -> None:
    losses = []
    for strategy in (None, LossReweight(min_rows=2)):
        trainer = make_trainer(tmp_path)
        trainer.eval_dataset = make_rows(10, seed=1)
        if strategy is not None:
            attach(trainer, strategy, candidates=4)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1]


def test_shadow_logs_what_it_would_do_and_changes_nothing(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path, max_steps=3)
    plain.train()
    shadowed = make_trainer(tmp_path, max_steps=3)
    attach(shadowed, TopLoss(), candidates=2, shadow=True)
    shadowed.train()
    for a, b in zip(plain.model.parameters(), shadowed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [h["selection/kept_share"] for h in shadowed.state.log_history if "loss" in h] == [
        0.5
    ] * 3


def test_bf16_autocast_trains_and_scores(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, bf16=True, max_steps=2)
    attach(trainer, TopLoss(), candidates=3, record=tmp_path / "record")
    trainer.train()
    choice, model = choices(tmp_path / "record")[0], make_model()
    for i, score in zip(choice["ids"], choice["scores"], strict=True):
        _, loss = reference_gradient(model, make_rows(), [i], [1.0], "tokens")
        assert score == pytest.approx(loss, rel=2e-2)


def test_the_log_has_the_costs(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2)
    attach(trainer, TopLoss(), candidates=2, log_all=True)
    trainer.train()
    log = trainer.state.log_history[0]
    assert 0 < log["selection/score_share"] < 1
    assert log["selection/break_even"] == pytest.approx(1 - log["selection/score_share"])
    assert log["selection/score_kept"] > log["selection/score_dropped"]
    assert log["selection/ess"] == 1.0
    assert "selection/kept_share" not in trainer.state.log_history[-1]  # the summary of the run
