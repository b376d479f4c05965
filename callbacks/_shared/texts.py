"""What rows and prompts say, for the record, and for W&B and TensorBoard where those are on."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from torch import Tensor

from onlinesel.callbacks._shared.announce import say
from onlinesel.report.reading import read_lines, row_of
from onlinesel.report.records import Row
from onlinesel.report.runlog import RunLog
from onlinesel.report.wording import Table, markdown

__all__ = ["MOST", "TEXT", "Texts"]

MOST = 2000
"""Rows or prompts of a run whose text is written down: the first that it meets."""

TEXT = 400
"""Characters of a text that are written down; of a row no more than as many tokens are read."""

_LISTED = 10  # of each kind in the table that is sent


@dataclass
class _Seen:
    """A row with a text, and what became of it since the run began or was resumed."""

    text: str
    looked_at: int = 0
    trained: int = 0
    scored: int = 0
    score: float = 0.0


class Texts:
    """Read the texts of the first rows that a run meets on the process that writes its record.

    Args:
        trainer: Whose ``processing_class`` turns tokens into text.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._log: RunLog | None = None
        self._seen: dict[int, _Seen] = {}
        self._waiting: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def start(self, log: RunLog | None) -> None:
        """Begin a run; what its record holds already, of an earlier part or as a pool, stays."""
        self._log, self._seen, self._waiting = log, {}, []
        if log is not None:
            for row in read_lines(log.path / "rows.jsonl", row_of):
                self._seen[row.id] = _Seen(row.text)

    def look(self, ids: Sequence[Tensor], batches: Sequence[Mapping[str, Any]]) -> None:
        """Note candidates that may be new; they are read by :meth:`write`, outside of the step."""
        if self._log is None or len(self._seen) >= MOST or self._decoder is None:
            return
        for numbers, batch in zip(ids, batches, strict=True):
            tokens, mask = batch.get("input_ids"), batch.get("attention_mask")
            if isinstance(tokens, Tensor) and tokens.shape[:-1] == numbers.shape:
                fits = isinstance(mask, Tensor) and mask.shape == tokens.shape
                self._waiting.append((numbers, tokens, mask if fits else None))

    def count(
        self,
        ids: Iterable[int],
        trained: Iterable[bool],
        scores: Iterable[float] | None = None,
    ) -> None:
        """Note what was decided about rows."""
        if self._log is None:
            return
        ids = list(ids)
        values = [float("nan")] * len(ids) if scores is None else list(scores)
        for each, trains, score in zip(ids, trained, values, strict=True):
            seen = self._seen.get(each)
            if seen is not None:
                seen.looked_at, seen.trained = seen.looked_at + 1, seen.trained + bool(trains)
                if score == score:
                    seen.scored, seen.score = seen.scored + 1, seen.score + score

    def write(self) -> None:
        """Write down the texts of the rows that are new."""
        waiting, self._waiting = self._waiting, []
        for numbers, tokens, mask in waiting:
            ids = numbers.tolist()
            new = [k for k, each in enumerate(ids) if each not in self._seen]
            new = new[: max(MOST - len(self._seen), 0)]
            if not new:
                continue
            rows = tokens[new].tolist()
            masks = [[1] * len(row) for row in rows] if mask is None else mask[new].tolist()
            for k, row, real in zip(new, rows, masks, strict=True):
                kept = [token for token, is_real in zip(row, real, strict=True) if is_real]
                self._add(ids[k], self._decode(kept))

    def prompts(self, ids: Iterable[int]) -> None:
        """Write down the texts of the prompts that are new: rows of the trainer's data set."""
        dataset = self._trainer.train_dataset
        if self._log is None or not hasattr(dataset, "__getitem__"):
            return
        for each in ids:
            if each >= 0 and each not in self._seen and len(self._seen) < MOST:
                row = dataset[each]
                self._add(each, _cut(_said(row.get("prompt") if isinstance(row, Mapping) else row)))

    def send(self) -> None:
        """Send the rows kept and dropped most to W&B and TensorBoard, where the trainer does too.

        A run must not end in an error because of this: what went wrong is said.
        """
        table = None if self._log is None else self.table()
        targets = set(getattr(self._trainer.args, "report_to", None) or ()) & {*_SENDERS}
        for name in sorted(targets) if table is not None else ():
            try:
                _SENDERS[name](self._trainer, table)
            except Exception as error:
                say(f"onlinesel: the table of examples did not reach {name}: {error!r}")

    def table(self) -> Table | None:
        """Return the rows trained most, and those dropped most often; None if none was met."""
        known = {each: seen for each, seen in self._seen.items() if seen.looked_at and seen.text}
        most = sorted(known, key=lambda i: (-known[i].trained, known[i].looked_at, i))
        kept = [i for i in most if known[i].trained][:_LISTED]
        passed = [i for i in known if known[i].trained < known[i].looked_at and i not in kept]
        passed.sort(key=lambda i: (known[i].trained / known[i].looked_at, -known[i].looked_at, i))
        rows = [("kept", i) for i in kept] + [("dropped", i) for i in passed[:_LISTED]]
        if not rows:
            return None
        columns = ("Example", "Id", "Trained", "Looked at", "Mean score", "Text")
        return Table(columns, tuple((what, str(i), *_cells(known[i])) for what, i in rows))

    @property
    def _decoder(self) -> Any:
        processing = getattr(self._trainer, "processing_class", None)
        tokenizer = getattr(processing, "tokenizer", processing)
        return tokenizer if hasattr(tokenizer, "decode") else None

    def _decode(self, tokens: list[int]) -> str:
        text = self._decoder.decode(tokens[:TEXT], skip_special_tokens=True)
        return _cut(text, more=len(tokens) > TEXT)

    def _add(self, each: int, text: str) -> None:
        assert self._log is not None
        self._seen[each] = _Seen(text)
        self._log.more_rows([Row(each, None, text)])


def _cut(text: str, more: bool = False) -> str:
    """Return at most :data:`TEXT` characters, with a mark where there is ``more``."""
    more = more or len(text) > TEXT
    return text[: TEXT - more] + "…" * more


def _said(prompt: Any) -> str:
    """Return a prompt as text: a string as it is, a conversation a line a message.

    What the system says is the same for all, and would leave no room for what is asked.
    """
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list | tuple):
        return ""
    lines, messages = [], [message for message in prompt if isinstance(message, Mapping)]
    for message in messages:
        content = message.get("content")
        if message.get("role") == "system" and len(messages) > 1:
            continue
        if isinstance(content, list | tuple):
            content = " ".join(str(p["text"]) for p in content if "text" in p and p["text"])
        if content:
            lines.append(f"{message.get('role', '')}: {content}")
    return "\n".join(lines)


def _cells(seen: _Seen) -> tuple[str, str, str, str]:
    score = f"{seen.score / seen.scored:.4g}" if seen.scored else ""
    return str(seen.trained), str(seen.looked_at), score, seen.text


def _to_wandb(trainer: Any, table: Table) -> None:
    wandb: Any = importlib.import_module("wandb")
    if wandb.run is not None:
        sent = wandb.Table(columns=list(table.columns), data=[list(row) for row in table.rows])
        step = trainer.state.global_step
        wandb.log({"selection/examples": sent, "train/global_step": step})


def _to_tensorboard(trainer: Any, table: Table) -> None:
    """Write as markdown, in which text is no HTML; the trainer closes its writer when it ends."""
    callbacks = trainer.callback_handler.callbacks
    own = next((c for c in callbacks if type(c).__name__ == "TensorBoardCallback"), None)
    if own is None:
        return
    writer = own.tb_writer or own._SummaryWriter(log_dir=own.logging_dir)
    safe = Table(table.columns, tuple(tuple(escape(c) for c in row) for row in table.rows))
    writer.add_text("selection/examples", markdown(safe), trainer.state.global_step)
    if own.tb_writer is None:
        writer.close()
    else:
        writer.flush()


_SENDERS: Mapping[str, Any] = {"wandb": _to_wandb, "tensorboard": _to_tensorboard}
