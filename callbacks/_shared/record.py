"""Where the runs of a callback are written down: one folder for each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from onlinesel.report.runlog import RunLog

__all__ = ["Record", "model_settings", "optimizer_settings", "reference_kind", "trainer_settings"]

# What does not belong to the arm: who the run is, where it goes, how it is watched and loaded.
_APART = (
    "seed", "data_seed", "output_dir", "run_name", "disable_tqdm", "report_to", "project",
    "use_cpu", "per_device_eval_batch_size", "metric_for_best_model", "greater_is_better",
    "load_best_model_at_end", "ignore_data_skip", "auto_find_batch_size", "prediction_loss_only",
)  # fmt: skip
_FAMILIES = (
    "logging_", "log_", "save_", "eval_", "hub_", "push_", "do_", "dataloader_num", "dataloader_p",
    "dataloader_multi", "trackio_", "include_", "resume_", "skip_", "batch_eval", "ddp_", "_",
)  # fmt: skip
_ALWAYS = (
    "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps",
    "num_train_epochs", "optim", "lr_scheduler_type",
)  # fmt: skip


class Record:
    """Opens the record of each run of a callback.

    Args:
        place: A folder, a :class:`RunLog` that the caller has opened, or None for no record.
    """

    def __init__(self, place: str | Path | RunLog | None) -> None:
        self._place = place
        self._folder: Path | None = None
        self._runs = 0

    def open(
        self, facts: Mapping[str, Any], resume_step: int | None, trial: int | None = None
    ) -> RunLog | None:
        """Open the record of a run that begins.

        The first run of the callback has the folder itself, another one that does not resume a
        folder beside it with a number, and each trial of a hyper-parameter search one inside.

        Args:
            facts: What is written into ``run.json``.
            resume_step: Step of the checkpoint that is resumed; None for a new run.
            trial: Number of the trial.

        Raises:
            ValueError: The folder holds another run, which is not emptied.
        """
        if self._place is None or isinstance(self._place, RunLog):
            return self._place
        folder = Path(self._place)
        if trial is not None:
            folder = folder / f"run-{trial}"
        elif resume_step is not None:
            folder = self._folder or folder
        else:
            self._runs += 1
            if self._runs > 1:
                folder = folder.with_name(f"{folder.name}-{self._runs}")
        if resume_step is None and RunLog.stepped(folder):
            raise ValueError(
                f"record: folder must hold no run, got {folder}, which holds one. Record this run "
                "elsewhere, remove that folder, or resume the run from its checkpoint."
            )
        self._folder = folder
        log = RunLog(folder, resume_step=resume_step)
        log.start(**facts)
        return log


def trainer_settings(trainer: Any) -> dict[str, Any]:
    """Return the settings of a Hugging Face trainer that make a run another arm.

    Of its arguments, those that are not its class's defaults, and the usual ones in any case.
    """
    args, found = trainer.args, dict[str, Any]()
    for field in fields(args) if is_dataclass(args) else ():
        value = getattr(args, field.name)
        apart = field.name in _APART or field.name.startswith(_FAMILIES)
        if not apart and (field.name in _ALWAYS or value != field.default) and _plain(value):
            found[field.name] = str(getattr(value, "value", value))
    dataset = trainer.train_dataset
    rows = {"rows": len(dataset)} if hasattr(dataset, "__len__") else {}
    return found | model_settings(trainer.model) | rows


def model_settings(model: Any) -> dict[str, Any]:
    """Return what tells a model from others: its class, where it came from, and its sizes."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return {
        "model": f"{type(model).__name__} {name}".strip(),
        "parameters": sum(size for size, _ in sizes),
        "trainable": sum(size for size, trains in sizes if trains),
    }


def optimizer_settings(optimizers: Sequence[Any]) -> dict[str, Any]:
    """Return what optimizers are and with what learning rates they begin."""
    groups = [group for each in optimizers for group in each.param_groups]
    rates = dict.fromkeys(str(group.get("initial_lr", group.get("lr"))) for group in groups)
    names = dict.fromkeys(type(each).__name__ for each in optimizers)
    return {"optim": ", ".join(names), "learning_rate": ", ".join(rates)}


def reference_kind(reference: Any) -> str | None:
    """Return where a reference comes from: beforehand it costs nothing as ``"adapter"`` alone."""
    if reference is None or reference == "adapter":
        return reference
    named = isinstance(reference, str)
    return f"column {reference}" if named else f"model {type(reference).__name__}"


def _plain(value: Any) -> bool:
    return value is not None and isinstance(getattr(value, "value", value), str | int | float)
