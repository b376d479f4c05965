"""Texts in records: what is read, what is left out, and the table that W&B and TensorBoard get."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import onlinesel
from onlinesel.callbacks._shared import texts
from onlinesel.callbacks._shared.record import reference_kind
from onlinesel.callbacks._shared.texts import Texts
from onlinesel.report import read_run
from onlinesel.report.page import render
from onlinesel.report.runlog import RunLog
from onlinesel.strategies import RHOLoss, TopLoss
from tests.callbacks.grpo_hosts import attach as attach_grpo
from tests.callbacks.grpo_hosts import make_grpo_trainer, make_problems
from tests.callbacks.hosts import (
    attach,
    collate,
    make_model,
    make_rows,
    make_tokenizer,
    make_trainer,
)
from tests.callbacks.loop_hosts import make_loader


def words(row: dict[str, list[int]]) -> str:
    """What a row says; tokens 0, 1 and 2 are special (filling, end, unknown), which are no text."""
    return " ".join(f"w{token}" for token in row["input_ids"] if token > 2)


def train(tmp_path: Path, *, side: str = "right", record_text: bool = True, **changes: Any) -> Any:
    trainer = make_trainer(
        tmp_path / "out", collator=partial(collate, side=side), **{"max_steps": 4, **changes}
    )
    trainer.processing_class = make_tokenizer()
    attach(
        trainer, TopLoss(), candidates=2, record=tmp_path / "record", record_text=record_text
    )  # fmt: skip
    return trainer


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_are_decoded_by_the_trainers_tokenizer(tmp_path: Path, side: str) -> None:
    train(tmp_path, side=side).train()
    run, rows = read_run(tmp_path / "record"), make_rows()
    met = {each for choice in run.choices for each in choice.ids}
    assert len(met) == 16 and {**run.rows} == {
        each: texts.Row(each, None, words(rows[each])) for each in met
    }
    page = render([run])
    assert "Most chosen" in page and words(rows[run.choices[0].ids[0]]) in page


def test_texts_are_cut_and_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "TEXT", 9)
    monkeypatch.setattr(texts, "MOST", 5)
    train(tmp_path).train()
    found, rows = read_run(tmp_path / "record").rows, make_rows()
    assert len(found) == 5
    for each, row in found.items():
        text = words(rows[each])
        assert row.text == (text if len(text) <= 9 else text[:8] + "…")
    monkeypatch.setattr(texts, "TEXT", 3)  # of more tokens, only three are read
    assert Texts(SimpleNamespace(processing_class=make_tokenizer()))._decode([5] * 4) == "w5…"


def test_nothing_is_left_of_a_text_that_is_not_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = stub_wandb(monkeypatch)
    trainer = train(tmp_path, record_text=False)
    trainer.args.report_to = ["wandb"]
    trainer.train()
    record = tmp_path / "record"
    assert sent == [] and not (record / "rows.jsonl").exists()
    held = b"".join(file.read_bytes() for file in record.rglob("*") if file.is_file())
    assert held and not any(words(row).encode() in held for row in make_rows())
    assert b'"text"' not in held and len(read_run(record).choices) == 4


def test_a_resumed_record_and_a_pool_of_ones_own_stay(tmp_path: Path) -> None:
    train(tmp_path, save_strategy="steps", save_steps=2).train()
    first = read_run(tmp_path / "record").rows
    train(tmp_path, max_steps=8).train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    lines = (tmp_path / "record" / "rows.jsonl").read_text().splitlines()
    ids = [json.loads(line)["id"] for line in lines]
    assert len(ids) == len(set(ids)) and {*first} < {*ids}
    pool = [(k, "mine", f"text {k}") for k in range(48)]
    RunLog(tmp_path / "own").rows(pool)
    trainer = make_trainer(tmp_path / "out2", max_steps=2)
    trainer.processing_class = make_tokenizer()
    attach(trainer, TopLoss(), candidates=2, record=tmp_path / "own")
    trainer.train()
    assert [tuple(row) for row in read_run(tmp_path / "own").rows.values()] == pool


def test_a_trainer_without_a_tokenizer_records_no_texts(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "out", max_steps=2)
    attach(trainer, TopLoss(), candidates=2, record=tmp_path / "record")
    trainer.train()
    run = read_run(tmp_path / "record")
    assert run.rows == {} and len(run.choices) == 2


def test_what_the_trainer_logged_is_recorded(tmp_path: Path) -> None:
    trainer = train(tmp_path)
    trainer.train()
    logged = [(e["step"], e["loss"]) for e in trainer.state.log_history if "loss" in e]
    run = read_run(tmp_path / "record")
    assert [(e.step, e.loss) for e in run.logs] == logged and len(logged) == 4
    assert [e.seconds for e in run.logs] == [s.seconds for s in run.steps]
    assert "Training loss, where nothing was evaluated" in render([run])


def stub_wandb(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Put a module in the place of wandb that keeps what is logged; its Table is W&B's, in part."""
    sent: list[dict[str, Any]] = []

    class Table:
        def __init__(self, columns: list[str], data: list[list[Any]]) -> None:
            assert all(len(row) == len(columns) for row in data)
            self.columns, self.data = columns, data

    module = SimpleNamespace(run=object(), Table=Table, log=sent.append)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return sent


def table_of(folder: Path) -> list[list[str]]:
    """Count again, from the record: what was trained most, and what was dropped."""
    run, rows = read_run(folder), make_rows()
    decided = [pair for c in run.choices for pair in zip(c.ids, c.weights, c.scores, strict=True)]
    kept = sorted((i, score) for i, weight, score in decided if weight > 0)
    dropped = sorted((i, score) for i, weight, score in decided if weight == 0)
    return [
        [what, str(i), str(int(what == "kept")), "1", f"{score:.4g}", words(rows[i])]
        for what, rows_of in (("kept", kept), ("dropped", dropped))
        for i, score in rows_of
    ]


def test_wandb_gets_a_table_of_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = stub_wandb(monkeypatch)
    trainer = train(tmp_path)
    trainer.args.report_to = ["wandb"]
    trainer.train()
    (message,) = sent
    assert message["train/global_step"] == 4
    table = message["selection/examples"]
    assert table.columns == ["Example", "Id", "Trained", "Looked at", "Mean score", "Text"]
    assert table.data == table_of(tmp_path / "record") and len(table.data) == 16
    sys.modules["wandb"].run = None  # type: ignore[attr-defined]  # not on: nothing is sent
    train(tmp_path / "off").train()
    assert len(sent) == 1


def test_a_table_that_cannot_be_sent_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stub_wandb(monkeypatch)
    monkeypatch.setattr(sys.modules["wandb"], "log", lambda message: 1 / 0)
    trainer = train(tmp_path)
    trainer.args.report_to = ["wandb"]
    with caplog.at_level("INFO", "onlinesel"):
        trainer.train()
    assert trainer.state.global_step == 4
    assert "the table of examples did not reach wandb: ZeroDivisionError" in caplog.text


class TensorBoardCallback:
    """As transformers': its writer is closed when training ends, and can be made again."""

    logging_dir = "here"

    def __init__(self, closed: bool) -> None:
        self.written: list[tuple[str, str, int]] = []
        self.closed = 0
        self.tb_writer = None if closed else self

    def _SummaryWriter(self, log_dir: str) -> TensorBoardCallback:  # noqa: N802
        assert log_dir == "here"
        return self

    def add_text(self, tag: str, text: str, step: int) -> None:
        self.written.append((tag, text, step))

    def flush(self) -> None: ...

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("closed", [True, False])
def test_tensorboard_gets_markdown_without_html(tmp_path: Path, closed: bool) -> None:
    board = TensorBoardCallback(closed)
    trainer = SimpleNamespace(
        args=SimpleNamespace(report_to=["tensorboard"]), state=SimpleNamespace(global_step=7),
        callback_handler=SimpleNamespace(callbacks=[object(), board]),
    )  # fmt: skip
    with RunLog(tmp_path) as log:
        log.rows([(3, None, "<img src=x> a|b\nc"), (4, None, "four")])
        found = Texts(trainer)
        found.start(log)
        found.count([3, 4, 5], [True, False, True], [0.5, float("nan"), 1.0])
        found.count([3], [False])
        found.send()
    ((tag, text, step),) = board.written
    assert (tag, step, board.closed) == ("selection/examples", 7, int(closed))
    assert text.splitlines()[2:] == [
        "| kept | 3 | 1 | 2 | 0.5 | &lt;img src=x&gt; a\\|b c |",
        "| dropped | 4 | 0 | 1 |  | four |",
    ]


def test_a_real_tensorboard_has_the_table(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = train(tmp_path, report_to=["tensorboard"])
    trainer.train()
    boards = [EventAccumulator(str(f)).Reload() for f in (tmp_path / "out").rglob("events.*")]
    tag = "selection/examples/text_summary"
    (held,) = [board.Tensors(tag) for board in boards if tag in board.Tags()["tensors"]]
    text = held[0].tensor_proto.string_val[0].decode()
    assert held[0].step == 4
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    assert cells == table_of(tmp_path / "record")


def test_prompts_of_grpo_are_recorded(tmp_path: Path) -> None:
    rights = [2, 0, 4, 1, 2, 0, 2, 2]
    for wanted in (True, False):
        trainer = make_grpo_trainer(tmp_path / f"out-{wanted}", rights, max_steps=3)
        record = tmp_path / f"record-{wanted}"
        attach_grpo(trainer, record=record, record_text=wanted)
        trainer.train()
        run, problems = read_run(record), make_problems(rights)
        made = {each for batch in run.generations for each in batch.prompts}
        assert len(made) == 6
        said = {each: row.text for each, row in run.rows.items()}
        assert said == ({each: problems[each]["prompt"] for each in made} if wanted else {})
        logged = [(e["step"], e["reward"]) for e in trainer.state.log_history if "reward" in e]
        assert [(e.step, e.metrics["reward"]) for e in run.logs] == logged and len(logged) == 3
        held = b"".join(file.read_bytes() for file in record.rglob("*") if file.is_file())
        assert (problems[min(made)]["prompt"].encode() in held) is wanted
        assert "Training reward, where nothing was evaluated" in render([run])


def test_conversations_are_lines() -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": None},
    ]
    assert texts._said(chat) == "user: What?" and texts._said(chat[:1]) == "system: Be brief."
    assert (texts._said("plain"), texts._said(None)) == ("plain", "")


def test_where_a_reference_comes_from_is_recorded(tmp_path: Path) -> None:
    given = (None, "adapter", "cached", torch.nn.Linear(1, 1))
    kinds = [None, "adapter", "column cached", "model Linear"]
    assert [reference_kind(each) for each in given] == kinds
    trainer = make_trainer(tmp_path / "out", max_steps=1)
    attach(
        trainer, RHOLoss(), candidates=2, record=tmp_path / "record", reference=make_model()
    )  # fmt: skip
    trainer.train()
    told = json.loads((tmp_path / "record" / "run.json").read_text())
    assert told["reference"] == "model LlamaForCausalLM"
    model, rows = make_model(), make_loader()
    steps = onlinesel.steps(
        rows, model, RHOLoss(), candidates=2, reference=make_model(), record=tmp_path / "loop"
    )
    next(iter(steps))
    told = json.loads((tmp_path / "loop" / "run.json").read_text())
    assert told["reference"] == "model LlamaForCausalLM"
