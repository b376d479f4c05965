"""The data side of the Hugging Face callback: which rows the trainer loads, and where it stands.

The trainer resumes by skipping as many batches *of each process* as it has trained, which repeats
or loses rows where the number of processes or the size of a batch is another one. The order of an
epoch's rows is a function of seed and epoch alone, so a checkpoint notes how many rows of it are
behind, and a run that reads in other portions goes on with the row after them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from torch import Tensor

from onlinesel.callbacks._shared.belonging import warn_of_workers
from onlinesel.callbacks._shared.checkpoint import load_selection, save_selection
from onlinesel.callbacks._shared.trainers import is_stream
from onlinesel.callbacks._shared.wrapping import overridden
from onlinesel.callbacks.hf.batches import only_moves
from onlinesel.callbacks.hf.checks import check_loader, refuse
from onlinesel.callbacks.hf.order import ContinuedOrder, EpochOrder, order_of, sampler_of
from onlinesel.data.datasets import DataFacts
from onlinesel.data.fingerprint import rows_digest, same_rows
from onlinesel.data.reading import generator_states, generators_of, set_generator_states
from onlinesel.data.rows import ROW_ID, CarryColumns, NumberedRows, PlanSampler

__all__ = ["TrainingData"]

_ORDER = "selection-order"


class TrainingData:
    """Builds the trainer's loader over candidates, and knows which rows are behind.

    Args:
        trainer: The trainer.
        columns: Feature keys that ride to batch keys.
        factor: Candidate rows for each row of the trainer's batch.
        plan: ``rows -> (epoch -> (n,) row numbers)``, or to None where the strategy plans nothing.
        sampler: Replaces the trainer's, as :class:`onlinesel.mixing.DomainSampler`.
    """

    def __init__(
        self,
        trainer: Any,
        columns: Mapping[str, str],
        *,
        factor: int,
        plan: Callable[[int], Callable[[int], Tensor] | None],
        sampler: Any = None,
    ) -> None:
        self._trainer, self._columns, self._factor = trainer, dict(columns), factor
        self._plan, self._given = plan, sampler
        self._fresh = None if sampler is None else sampler.state_dict()
        self._behind: dict[str, Any] | None = None
        self._known = DataFacts.of(trainer.train_dataset)
        self.begin(None)

    def begin(self, facts: dict[str, Any] | None, checkpoint: str | None = None) -> None:
        """Start a run.

        Args:
            facts: Of the checkpoint that it goes on from, None if it has none.
            checkpoint: Its folder.
        """
        self._behind, self._sampler = facts, self._given
        self._digest: dict[str, Any] | None = None
        self._generators: list[torch.Generator] = []
        self._drawn: Tensor | None = None
        self._read = 0
        self._standing: tuple[int, int] | None = None
        if facts is not None:
            self._check_rows(facts)
        args = self._trainer.args
        if facts is not None and not args.ignore_data_skip:
            rank = args.process_index
            found = load_selection(str(checkpoint), rank=rank, name=_ORDER)
            warn_of_workers(args)
            self._drawn = None if found is None else found[0]["generators"]
        if self._given is not None and facts is None:
            self._given.load_state_dict(self._fresh)  # another run of the same trainer begins anew
        self._order: EpochOrder | None = None
        self._epoch: int | None = None
        self._steps = 0

    def loader(self, build: Callable[[], Any]) -> Any:
        """Let the trainer build its own loader, over candidates and with ids in the batches.

        Args:
            build: The trainer's ``get_train_dataloader``.
        """
        trainer, dataset = self._trainer, self._trainer.train_dataset
        whole = dataset
        found = self._known.difference(dataset)
        if found is not None:
            refuse(
                "train_dataset", "the one that the trainer had when it was wrapped", found,
                "Its columns and rows are known by then: call detach(), and attach the callback to "
                "the trainer with its new dataset.",
            )  # fmt: skip
        self._sampler = self._given
        build_sampler = trainer._get_train_sampler
        with overridden(trainer, {"_signature_columns": trainer._signature_columns}):
            trainer._set_signature_columns_if_needed()
            trainer._signature_columns = [*trainer._signature_columns, *self._columns]
            if ROW_ID in self._columns:
                if hasattr(dataset, "column_names"):
                    dataset = trainer._remove_unused_columns(dataset, description="training")
                plan = self._plan(len(dataset))
                if plan is not None:
                    self._sampler = PlanSampler(plan)

            def sampler(*_: Any) -> Any:
                with overridden(trainer, {"train_dataset": whole}):  # one's own reads it
                    return self._sampler or build_sampler(dataset)

            changes = {
                "train_dataset": NumberedRows(dataset) if ROW_ID in self._columns else dataset,
                "data_collator": CarryColumns(trainer.data_collator, self._columns),
                "_train_batch_size": trainer._train_batch_size * self._factor,
                "_get_train_sampler": sampler,
            }
            with overridden(trainer, changes):
                loader = build()
                if isinstance(loader, DataLoaderShard) and only_moves(trainer):
                    loader.device = None  # what decides about rows is read before they are moved
                if self._factor > 1:
                    size, processes = trainer._train_batch_size, trainer.args.world_size
                    check_loader(loader, size, processes)
        self._survey(loader)
        return loader

    def described(self) -> dict[str, Any]:
        """Return rows of a step, steps of an epoch with and without selection, and what ids are.

        Call it after :meth:`loader`.
        """
        args, named = self._trainer.args, {to: name for name, to in self._columns.items()}
        portion = self._portion // self._factor
        ids = "a hash of each row's content"
        if ROW_ID in named:
            own = named[ROW_ID] == ROW_ID
            ids = "row numbers" if own else f"the column {named[ROW_ID]}"
        facts = {"rows": portion * self._accumulate, "steps": None, "without": None, "ids": ids}
        if self._steps:
            rows = len(self._trainer.train_dataset)
            batches = rows // portion if args.dataloader_drop_last else -(-rows // portion)
            facts["steps"] = self._steps
            facts["without"] = max(-(-batches // self._accumulate), 1)
        return facts

    def counts_on(self, device: torch.device) -> torch.device:
        """Return where the trainer shall have its count of a step's items, which ours replaces.

        It stays where the labels are, unless the trainer sums it over processes.
        """
        return device if self._trainer.args.world_size > 1 else torch.device("cpu")

    # Where the run stands -------------------------------------------------------------------

    def _rows(self) -> dict[str, Any] | None:
        """Return what the rows are recognised by; read once, where there is a checkpoint."""
        dataset, args = self._trainer.train_dataset, self._trainer.args
        if self._digest is None and not is_stream(dataset):
            self._digest = rows_digest(dataset, workers=args.dataloader_num_workers)
        return self._digest

    def _check_rows(self, facts: dict[str, Any]) -> None:
        """Refuse rows that are not the checkpoint's: numbers would mean other rows."""
        before = facts.get("data", {}).get("content")
        if same_rows(before, self._rows()):
            return
        if not self._trainer.args.ignore_data_skip:
            refuse(
                "train_dataset", f"the checkpoint's ({before})", self._rows(),
                "Resume with the same rows in the same order, or set ignore_data_skip=True to "
                "begin the data anew.",
            )  # fmt: skip
        warnings.warn(
            "OnlineSelection: train_dataset holds other rows than the checkpoint's. What the "
            "method remembers of them by number belongs to the old ones.",
            stacklevel=2,
        )

    def _survey(self, loader: Any) -> None:
        """Note in which portions the trainer reads, and go on behind a checkpoint."""
        try:
            batches = len(loader)
        except TypeError:
            batches = 0
        args, found = self._trainer.args, getattr(loader, "total_batch_size", None)
        rows = self._trainer._train_batch_size * self._factor * args.world_size
        self._portion = int(found or rows)  # of a micro-batch, over all processes
        self._accumulate = args.gradient_accumulation_steps
        self._steps = max(-(-batches // self._accumulate), 1) if batches else 0
        self._length = batches * self._portion
        self._order = order_of(loader, self._sampler) if self._length else None
        self._generators = generators_of(loader)
        stream = is_stream(self._trainer.train_dataset)
        self._reader = "a stream" if stream else type(sampler_of(loader)).__name__
        if self._behind is not None and not args.ignore_data_skip:
            self._continue(loader, self._behind)

    def _trained(self, step: int) -> tuple[int, int]:
        """Return the trainer's epoch after so many steps, and the rows that it has read of it."""
        epoch, steps = divmod(step, self._steps)
        return epoch, steps * self._accumulate * self._portion

    def facts(self, step: int) -> dict[str, Any]:
        """Return what a checkpoint must know to go on with the next row.

        Args:
            step: Optimizer steps that have trained.
        """
        facts: dict[str, Any] = {
            "step": step, "portion": self._portion, "accumulate": self._accumulate,
            "order": self._reader, "streamed": False, "content": self._rows(),
        }  # fmt: skip
        if not self._steps:
            facts |= {"pass": self._epoch or 0, "read": self._read}
        if self._order is None:
            return facts
        epoch, read = self._trained(step)
        place = epoch * self._order.rows + read
        if isinstance(self._sampler, ContinuedOrder):
            place = self._sampler.origin + epoch * self._length + read
            facts["streamed"] = True
        return {**facts, "place": place, "rows": self._order.rows, "seed": self._order.seed}

    def _continue(self, loader: Any, facts: dict[str, Any]) -> None:
        """Go on behind the rows that were read, where the trainer's own skipping would not."""
        processes = self._trainer.args.world_size
        old = facts.get("data")
        if old is None:  # written before checkpoints knew
            if facts["world_size"] != processes:
                _refuse_order(facts["world_size"], processes, "no place in the data in it")
            return
        now, order = self.facts(old["step"]), self._order
        if order is None and facts["world_size"] != processes:
            _refuse_order(facts["world_size"], processes, f"{old['order']} and {now['order']}")
        if not self._steps and "pass" in old:
            self._standing = old["pass"], old["read"]
        same = all(old[name] == now[name] for name in ("portion", "accumulate"))
        if same and not old["streamed"]:
            return
        if order is None or old["order"] != now["order"] or "place" not in old:
            _refuse_order(facts["world_size"], processes, f"{old['order']} and {now['order']}")
        assert order is not None
        if old["rows"] != order.rows:
            refuse(
                "train_dataset", f"the checkpoint's ({old['rows']} rows an epoch)", order.rows,
                "Resume with the data that wrote it, or set ignore_data_skip=True.",
            )  # fmt: skip
        if not old["streamed"] and old["place"] == now["place"]:
            return
        epoch, read = self._trained(old["step"])
        stream = order_of(loader, self._sampler, seed=old["seed"])
        assert stream is not None
        self._sampler = ContinuedOrder(
            stream.of, order.rows, behind=old["place"], length=self._length,
            origin=old["place"] - epoch * self._length - read,
        )  # fmt: skip
        self._order = stream
        loader.set_sampler(self._sampler)

    def begin_epoch(self, step: int) -> None:
        """Tell our sampler its epoch; a trainer's call does not always arrive.

        An order that is no function of seed and epoch is drawn from generators, which are put
        where they stood when the epoch began that is gone on with.

        Args:
            step: Optimizer steps that have trained.
        """
        first = self._epoch is None
        if self._steps:
            self._epoch = step // self._steps if self._epoch is None else self._epoch + 1
        elif first:
            self._epoch, self._read = self._standing or (0, 0)
        else:
            self._epoch, self._read = (self._epoch or 0) + 1, 0
        if self._sampler is not None:
            self._sampler.epoch = self._epoch
        if self._order is None:
            if first and self._drawn is not None:
                set_generator_states(self._generators, self._drawn)
            self._drawn = generator_states(self._generators)

    def note(self, batches: int) -> None:
        """Note that the trainer has fetched so many micro-batches more."""
        self._read += batches

    def save(self, folder: str, step: int) -> None:
        """Write where this process's generators stood when its epoch began, if that matters."""
        if self._order is not None:
            return
        drawn = self._drawn
        if drawn is None or (self._steps and step % self._steps == 0):  # another epoch is next
            drawn = generator_states(self._generators)
        rank = self._trainer.args.process_index
        save_selection(folder, {"generators": drawn}, {}, rank=rank, name=_ORDER)

    def standing(self) -> AbstractContextManager[None]:
        """Let the trainer begin where a stream stands, whose passes it cannot count.

        It takes a stream without a length for one epoch, and would read past more rows than a pass
        has.
        """
        init = self._trainer._init_training_state

        def init_training_state(*args: Any, **kwargs: Any) -> tuple[int, int]:
            found: tuple[int, int] = init(*args, **kwargs)
            return found if self._standing is None else self._standing

        changes = {"_init_training_state": init_training_state}
        return overridden(self._trainer, changes)


def _refuse_order(before: int, now: int, got: str) -> None:
    refuse(
        "order of the rows",
        f"a function of seed and epoch to go on exactly from {before} process(es) on {now} or "
        "with another batch size", got,
        "Resume with the processes, batch size and accumulation that wrote the checkpoint, or set "
        "ignore_data_skip=True to begin the data anew.",
    )  # fmt: skip
