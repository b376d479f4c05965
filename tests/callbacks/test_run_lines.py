"""What a run says and logs: a line at its start and its end, few numbers unless asked for."""

from __future__ import annotations

import gc
import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import onlinesel
from onlinesel import Selection, When
from onlinesel.callbacks._shared import announce as _announce
from onlinesel.callbacks._shared import meter as _meter
from onlinesel.callbacks._shared.meter import StepMeter
from onlinesel.callbacks._shared.reuse import ReusedForward
from onlinesel.callbacks._shared.stopwatch import Stopwatch
from onlinesel.step import StepPlan
from onlinesel.strategies import RS2, InfoBatch, LossReweight, RHOLoss, TopLoss, Uniform
from onlinesel.types import Signals
from tests.callbacks.hosts import attach, make_model, make_rows, make_trainer


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Any:
    """Return what the runs have said so far."""
    gc.collect()  # runs of other tests that were let go say their last line now
    caplog.set_level(logging.INFO, "onlinesel")
    return lambda: [r.message for r in caplog.records if r.name == "onlinesel"]


# The start --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "batch", "accumulate", "candidates", "drop_last"),
    [(48, 2, 1, 4, False), (47, 3, 2, 2, False), (47, 3, 2, 2, True), (14, 4, 2, 3, False)],
)
def test_the_steps_of_an_epoch_are_those_that_the_trainer_counts(
    rows: int, batch: int, accumulate: int, candidates: int, drop_last: bool, tmp_path: Path,
    said: Any,
) -> None:  # fmt: skip
    settings = {
        "rows": make_rows(rows), "per_device_train_batch_size": batch, "max_steps": -1,
        "gradient_accumulation_steps": accumulate, "dataloader_drop_last": drop_last,
        "num_train_epochs": 1, "logging_strategy": "no",
    }  # fmt: skip
    counted = []
    for chosen in (False, True):
        trainer = make_trainer(tmp_path, **settings)
        if chosen:
            attach(trainer, TopLoss(), candidates=candidates)
        trainer.train()
        counted.append(trainer.state.max_steps)
    first, last = said()
    per_step = batch * accumulate
    assert first.startswith(
        f"onlinesel: TopLoss trains {per_step} of {per_step * candidates} candidate rows a step; "
        f"an epoch has {counted[1]} step{'s' * (counted[1] > 1)} instead of {counted[0]}; ids: row "
    )
    steps = int(re.search(r"candidate rows in (\d+) step", last)[1])  # type: ignore[index]
    assert steps == counted[1]


@pytest.mark.parametrize(
    ("strategy", "options", "line"),
    [
        (RS2(fraction=0.5), {}, "RS2 decides about the 2 rows of a step; an epoch has 12 steps "
         "instead of 24; ids: row numbers; no scoring"),
        (InfoBatch(), {"ids": "hash"}, "InfoBatch decides about the 2 rows of a step; an epoch has "
         "24 steps, as without; ids: a hash of each row's content; no scoring"),
        (LossReweight(), {}, "LossReweight decides about the 2 rows of a step; an epoch has 24 "
         "steps, as without; ids: row numbers; no scoring: so few rows are all weighed alike"),
        (LossReweight(min_rows=2), {}, "LossReweight decides about the 2 rows of a step; an epoch "
         "has 24 steps, as without; ids: row numbers; scoring is about 25 % of the work of a step"),
        (When(TopLoss(), start=9, otherwise=Uniform()), {"candidates": 4}, "When trains 2 of 8 "
         "candidate rows a step; an epoch has 6 steps instead of 24; ids: row numbers; scoring is "
         "about 57 % of the work of a step"),
        (TopLoss(), {"candidates": 4, "shadow": True}, "TopLoss would train 1 in 4 rows, and all "
         "of them train (shadow); an epoch has 24 steps, as without; ids: row numbers; scoring is "
         "about 25 % of the work of a step"),
        (TopLoss(), {"candidates": 4, "score": lambda model, batch: Signals(
            loss=batch["input_ids"].float().mean(dim=1))},
         "TopLoss trains 2 of 8 candidate rows a step; an epoch has 6 steps instead of 24; ids: "
         "row numbers; scoring is about 57 % of the work of a step, if your scorer is one forward"),
    ],
)  # fmt: skip
def test_the_first_line(
    strategy: Any, options: dict[str, Any], line: str, tmp_path: Path, said: Any
) -> None:
    trainer = make_trainer(tmp_path)
    attach(trainer, strategy, **options)
    trainer.get_train_dataloader()  # looked at only
    assert said() == []
    trainer.train()
    assert said()[0] == f"onlinesel: {line}" and len(said()) == 2


def test_a_reference_is_a_second_forward_and_a_column_is_none(tmp_path: Path, said: Any) -> None:
    rows = [{**row, "known": 1.0} for row in make_rows()]
    for reference, share in ((make_model(), 67), ("known", 50)):
        trainer = make_trainer(tmp_path, rows=rows, remove_unused_columns=False)
        attach(trainer, RHOLoss(), candidates=3, reference=reference)
        trainer.train()
        assert said()[-2].endswith(f"scoring is about {share} % of the work of a step")


@pytest.mark.parametrize(
    ("candidates", "forwards", "frozen", "checkpointing", "reused", "expected"),
    [
        (4, 1, False, False, False, 4 / 7),
        (4, 2, False, False, False, 8 / 11),
        (4, 1, True, False, False, 4 / 6),  # no gradient of weights
        (4, 1, False, True, False, 4 / 8),
        (4, 1, False, True, True, 3 / 7),  # a forward less than it would have
        (1, 0, False, True, True, 0.0),
    ],
)
def test_the_share_is_counted_work(
    candidates: int, forwards: int, frozen: bool, checkpointing: bool, reused: bool, expected: float
) -> None:
    model = torch.nn.Linear(3, 3).requires_grad_(not frozen)
    found = _announce.scoring_share(
        model, candidates=candidates, forwards=forwards, checkpointing=checkpointing, reused=reused
    )
    assert found == pytest.approx(expected)


def test_a_loop_of_ones_own_says_both_lines(said: Any) -> None:
    model = torch.nn.Linear(2, 3)
    rows = [(torch.ones(2) * i, i % 3) for i in range(22)]
    steps = onlinesel.steps(
        DataLoader(rows, batch_size=2, shuffle=True), model, TopLoss(), candidates=2, accumulate=2,
        score=onlinesel.ClassificationScorer(),
    )  # fmt: skip
    for _ in range(2):
        for step in steps:
            for micro in step:
                inputs, labels = micro.batch
                micro.loss(cross_entropy(model(inputs), labels, reduction="none")).backward()
    assert said() == [
        "onlinesel: TopLoss trains 4 of 8 candidate rows a step; an epoch has 3 steps instead of "
        "6; ids: row numbers, or the column sample_id where there is one; scoring is about 40 % of "
        "the work of a step, if your scorer is one forward"
    ]
    steps.close()
    assert said()[1].startswith(
        "onlinesel: TopLoss trained 22 of 44 candidate rows in 6 steps and dropped 22; choosing "
    )
    steps.close()
    del steps
    assert len(said()) == 2


def test_a_loop_that_is_let_go_says_its_last_line_too(said: Any) -> None:
    model = torch.nn.Linear(2, 3)
    loader = [(torch.ones(4, 2), torch.tensor([0, 1, 2, 0]))] * 3

    def run() -> None:
        score = onlinesel.ClassificationScorer()
        for step in onlinesel.steps(loader, model, TopLoss(), candidates=3, score=score):
            for micro in step:
                inputs, labels = micro.batch
                micro.loss(cross_entropy(model(inputs), labels, reduction="none")).backward()

    run()
    first, last = said()
    assert first.startswith(
        "onlinesel: TopLoss trains 1 in 3 candidate rows; an epoch has 1 step instead of 3; ids: a "
        "hash of each row's content; "
    )
    assert last.startswith("onlinesel: TopLoss trained 4 of 12 candidate rows in 1 step and dropp")


def test_lightning_says_both_lines(said: Any) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from onlinesel.callbacks.lightning import OnlineSelection

    class Classifier(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(2, 3)

        def forward(self, inputs: torch.Tensor) -> Any:
            return self.net(inputs)

        def training_step(self, batch: Any, _: int) -> Any:
            inputs, labels = batch
            losses = cross_entropy(self(inputs), labels, reduction="none")
            return onlinesel.weighted_mean(losses)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    rows = [(torch.ones(2) * i, i % 3) for i in range(16)]
    selection = OnlineSelection(TopLoss(), candidates=2, score=onlinesel.ClassificationScorer())
    trainer = lightning.Trainer(
        max_epochs=2, callbacks=[selection], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, accelerator="cpu", accumulate_grad_batches=2,
    )  # fmt: skip
    trainer.fit(Classifier(), DataLoader(rows, batch_size=2))
    first, last = said()
    assert first.startswith(
        "onlinesel: TopLoss trains 4 of 8 candidate rows a step; an epoch has 2"
    )
    assert last.startswith("onlinesel: TopLoss trained 16 of 32 candidate rows in 4 steps and drop")


# The end ----------------------------------------------------------------------------------------


def test_the_last_line_counts_what_was_dropped_and_what_it_took(
    tmp_path: Path, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, max_steps=3)
    callback = attach(trainer, TopLoss(), candidates=4)
    trainer.train()
    tally = callback._meter._tally
    assert (tally.steps, tally.rows, tally.candidates) == (3, 6, 24)
    assert 0 < tally.choosing < tally.seconds
    share = round(100 * tally.choosing / tally.seconds)
    assert said()[1] == (
        "onlinesel: TopLoss trained 6 of 24 candidate rows in 3 steps and dropped 18; choosing "
        f"took {tally.choosing:.3g} s, {share} % of the steps' {tally.seconds:.3g} s: it saves "
        f"time if it needs at most {100 - share} % of the steps that uniform rows need"
    )


def test_an_interrupted_run_says_its_last_line_and_another_run_counts_anew(
    tmp_path: Path, said: Any
) -> None:
    trainer = make_trainer(tmp_path, max_steps=4)
    callback = attach(trainer, TopLoss(), candidates=2)
    halt = {"at": 2}

    def stop(args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == halt["at"]:
            raise KeyboardInterrupt

    callback.on_substep_end = callback.on_log = stop  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert "trained 4 of 8 candidate rows in 2 steps" in said()[1]
    halt["at"] = -1
    trainer.train()
    assert "trained 8 of 16 candidate rows in 4 steps" in said()[3] and len(said()) == 4


def test_rows_without_a_finite_score_are_in_the_last_line_and_in_the_log(
    tmp_path: Path, said: Any
) -> None:
    def scorer(model: Any, batch: Any) -> Signals:
        loss = batch["input_ids"].float().mean(dim=1)
        return Signals(loss=loss.index_fill(0, torch.tensor([0]), math.nan))

    trainer = make_trainer(tmp_path, max_steps=2)
    attach(trainer, TopLoss(), candidates=4, score=scorer)
    trainer.train()
    assert said()[1].endswith("; 2 rows had a score that is not finite")
    assert [log.get("selection/nonfinite") for log in trainer.state.log_history] == [1.0, 1.0, None]


# Where the lines go -----------------------------------------------------------------------------


def test_without_logging_they_are_on_standard_error_and_can_be_turned_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("onlinesel")
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    logger.manager._clear_cache()  # type: ignore[attr-defined]
    _announce.say("one")
    assert capsys.readouterr().err == "one\n" and logger.handlers == []
    logger.setLevel("WARNING")
    _announce.say("two")
    assert capsys.readouterr().err == ""
    logger.manager._clear_cache()  # type: ignore[attr-defined]


def test_one_process_speaks_for_all(said: Any) -> None:
    for writes in (False, True):
        meter = StepMeter(None, {"name": "TopLoss"})
        meter.start(None, writes=writes)
        meter.announce(lambda: "it begins")
        meter.announce(lambda: "it begins again")
        meter.stop()
    assert said() == ["onlinesel: it begins"]


# The log ----------------------------------------------------------------------------------------


def test_the_log_has_few_numbers_and_all_on_request(tmp_path: Path) -> None:
    found = {}
    for log_all in (False, True):
        trainer = make_trainer(tmp_path)
        attach(trainer, TopLoss(), candidates=4, log_all=log_all)
        trainer.train()
        log = trainer.state.log_history[0]
        found[log_all] = {n.removeprefix("selection/") for n in log if n.startswith("selection/")}
    assert found[False] == {"kept_share", "score_share", "score_kept"}
    assert found[True] == found[False] | {
        "score_dropped", "ess", "length_bias", "score_seconds", "break_even",
    }  # fmt: skip


class Clock:
    """A clock that is moved by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_a_reused_forward_saves_does_not_count_as_choosing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(_meter.time, "perf_counter", clock)
    signals = Signals(ids=torch.arange(4), tokens=torch.ones(4, dtype=torch.int64))
    selection = Selection(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    decisions = [(signals, selection)]
    plan = StepPlan([], [], [], [], [], torch.ones(()), "tokens", decisions, seconds=4.0)

    class Reuse:
        saved_seconds = 1.0

        def decide(self, batches: Any, decide: Any) -> Any:
            return decide(), {"reused_share": 1.0}

    for reuse, share in ((None, 0.4), (Reuse(), 0.3)):
        meter = StepMeter(None, {"name": "TopLoss"}, log_all=True)
        meter.start(None, writes=True)
        meter.fetch()
        meter.deciding(lambda: plan, reuse, [])  # type: ignore[arg-type]
        clock.now += 10.0
        meter.end(1)
        log = meter.drain()
        assert log["selection/score_seconds"] == 4.0
        assert log["selection/score_share"] == pytest.approx(share)
        # A step of uniform rows would take the other 6 s, and the forward that was reused.
        assert log["selection/break_even"] == pytest.approx((6.0 + 10 * (0.4 - share)) / 10.0)
        assert f"took {10 * share:.3g} s, {100 * share:.0f} % of" in (meter.closing() or "")


def test_what_is_saved_is_the_forward_of_the_rows_that_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stopwatch, "seconds", lambda self: 12.0)
    kept = ReusedForward.keep
    saved: list[tuple[float, float]] = []

    def keep(self: ReusedForward, batches: Any) -> Any:
        scored = sum(c.source.numel() for c in self._candidates)
        result = kept(self, batches)
        trained = sum(batch["input_ids"].numel() for batch in batches)
        saved.append((self.saved_seconds, 12.0 * trained / scored))
        return result

    monkeypatch.setattr(ReusedForward, "keep", keep)
    trainer = make_trainer(tmp_path, max_steps=2, gradient_checkpointing=True)
    attach(trainer, TopLoss(), candidates=4, reuse_forward=True)
    trainer.train()
    assert len(saved) == 2
    for found, wanted in saved:
        assert found == pytest.approx(wanted) and 0 < found <= 3.0
