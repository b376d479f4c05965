"""Supervised fine-tuning with online selection: TRL's SFT script, and some flags more.

    onlinesel sft --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name trl-lib/Capybara \\
        --strategy UDS --candidates 4 --record runs/uds --output_dir out/uds

What it does: the model trains on the best ``per_device_train_batch_size`` rows out of
``candidates`` times as many, by the method named with ``--strategy``. All flags of ``trl sft`` work
as they do there, on the command line or in a YAML file given with ``--config``: any model and any
dataset of the Hub or on disk (a folder, or one .jsonl, .json, .csv or .parquet file; mixtures with
``datasets:`` in the YAML file), LoRA with ``--use_peft``, evaluation, checkpoints, resuming. One
default differs: without an accelerator it trains in float32 unless ``--bf16`` is given. Then
``onlinesel report runs/uds`` shows what was chosen and what it cost.

On several GPUs: ``torchrun --nproc_per_node 4 -m onlinesel.recipes.sft ...`` (or ``accelerate
launch -m``). ``--packing`` and ``--padding_free`` leave no rows to choose from and are refused.

Measured: what the methods gain and lose is in the header of :mod:`onlinesel.recipes.demo`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from onlinesel import When, strategies
from onlinesel.parallel.agreement import check_arguments
from onlinesel.report.runlog import RunLog
from onlinesel.strategies import Uniform
from onlinesel.types import Strategy

try:
    from transformers import AutoModelForCausalLM
    from trl import (
        DatasetMixtureConfig,
        ModelConfig,
        ScriptArguments,
        SFTConfig,
        SFTTrainer,
        get_peft_config,
        get_quantization_config,
    )
    from trl.data_utils import get_dataset_column_names

    from onlinesel.callbacks.hf import OnlineSelection
    from onlinesel.recipes._arguments import CommandLine
except ImportError as error:
    raise ImportError('onlinesel.recipes.sft needs trl: pip install "onlinesel[trl]".') from error

__all__ = ["SelectionArguments", "main", "make_strategy", "make_trainer"]

_COMMAND = CommandLine(
    "onlinesel sft", "trl sft", "--model_name_or_path MODEL --dataset_name DATA [--strategy METHOD]"
)
_RECORDED_ROWS = 20_000
_RECORDED_CHARACTERS = 400


@dataclass
class SelectionArguments:
    """Which rows train."""

    _argument_group_name: ClassVar[str] = "which rows train"

    strategy: str = field(
        default="UDS", metadata={"help": f"Method: one of {', '.join(strategies.__all__)}."}
    )
    strategy_args: list[str] = field(
        default_factory=list,
        metadata={"help": "Its arguments as name=value, e.g. alpha=1.0 rows=response."},
    )
    candidates: int = field(
        default=4,
        metadata={
            "help": "Rows scored for each row that trains; per_device_train_batch_size stays the "
            "number of rows trained. Use 1 with methods that only weigh rows or plan epochs."
        },
    )
    scope: str = field(
        default="global",
        metadata={
            "help": "What competes: all candidates of the optimizer step (global), those of each "
            "process (rank), or each micro-batch alone (batch)."
        },
    )
    normalize: str | None = field(
        default=None,
        metadata={"help": "Mean over tokens or over samples; the method's own by default."},
    )
    selection_seed: int | None = field(
        default=None, metadata={"help": "Seed of the selection; the trainer's by default."}
    )
    reference: str | None = field(
        default=None,
        metadata={
            "help": "Reference of RHOLoss: 'adapter' (this model without its adapter), a dataset "
            "column of losses, or the name or path of a model."
        },
    )
    shadow: bool = field(
        default=False, metadata={"help": "Score and log, but train as without selection."}
    )
    reuse_forward: bool = field(
        default=False,
        metadata={
            "help": "Let the scoring forward be the training forward as well; needs "
            "--gradient_checkpointing, which is TRL's default, and a model without dropout."
        },
    )
    reuse_limit: float | None = field(
        default=None, metadata={"help": "GiB that --reuse_forward may hold on each process."}
    )
    record: str | None = field(
        default=None, metadata={"help": "Folder for the record that `onlinesel report` reads."}
    )
    record_text: bool = field(
        default=True, metadata={"help": "Whether the record holds what rows say."}
    )
    log_all: bool = field(
        default=False, metadata={"help": "Log every number about the decisions, not three of them."}
    )
    selection_start: int = field(
        default=0, metadata={"help": "Optimizer steps on uniform rows before the method begins."}
    )
    selection_stop: int | None = field(
        default=None, metadata={"help": "Step from which rows are uniform again."}
    )


def make_strategy(options: SelectionArguments) -> Strategy:
    """Return the strategy that the flags describe.

    Raises:
        ValueError: An unknown name, or arguments that the method does not take.

    Example:
        >>> make_strategy(SelectionArguments("TopLoss", selection_start=10)).active(9)
        False
    """
    kinds = {name: getattr(strategies, name) for name in strategies.__all__}
    strategy: Strategy = _COMMAND.build(
        "strategy", kinds, options.strategy, options.strategy_args,
        "A method of your own runs through the Python API.",
    )  # fmt: skip
    if options.selection_start == 0 and options.selection_stop is None:
        return strategy
    return When(strategy, options.selection_start, options.selection_stop, otherwise=Uniform())


def make_trainer(
    script: ScriptArguments,
    training: SFTConfig,
    model: ModelConfig,
    mixture: DatasetMixtureConfig,
    selection: SelectionArguments,
) -> SFTTrainer:
    """Return TRL's trainer with the selection in it, ready to train.

    Raises:
        ValueError: The arguments do not fit together; the message says what to change.
    """
    # All that can be checked before minutes are spent on model and data.
    strategy = make_strategy(selection)
    normalize = selection.normalize or strategy.normalize
    check_arguments(_COMMAND.name, selection.candidates, selection.scope, normalize)
    _check_model(model, selection, strategy)
    dataset = _COMMAND.load_data(script, mixture)
    train = _COMMAND.split(dataset, script.dataset_train_split, "dataset_train_split")
    _check_columns(train, training)
    training.model_init_kwargs = _COMMAND.loading(training, model)
    quantization = get_quantization_config(model)
    evaluates = training.eval_strategy != "no"
    trainer = SFTTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=train,
        eval_dataset=(
            _COMMAND.split(dataset, script.dataset_test_split, "dataset_test_split")
            if evaluates
            else None
        ),
        peft_config=get_peft_config(model),
        **({} if quantization is None else {"quantization_config": quantization}),
    )
    trainer.add_callback(
        OnlineSelection(
            trainer,
            strategy,
            candidates=selection.candidates,
            scope=selection.scope,
            normalize=selection.normalize,
            seed=selection.selection_seed,
            shadow=selection.shadow,
            reference=_reference(selection, trainer, model),
            record=selection.record,
            record_text=selection.record_text,
            reuse_forward=selection.reuse_forward,
            reuse_limit=selection.reuse_limit,
            log_all=selection.log_all,
        )
    )
    if selection.record is not None and trainer.is_world_process_zero():
        _record_rows(trainer, selection.record, selection.record_text)
    return trainer


def _check_model(model: ModelConfig, selection: SelectionArguments, strategy: Strategy) -> None:
    """Refuse a model that is not named or not there, and a reference that nothing reads."""
    if model.model_name_or_path is None:
        _COMMAND.refuse(
            "model_name_or_path", "a model of the Hub or a folder", None,
            "For example --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name trl-lib/Capybara.",
        )  # fmt: skip
    _COMMAND.check_path("model_name_or_path", model.model_name_or_path)
    name = selection.reference
    if name is None or name == "adapter":
        return
    if "reference_loss" not in strategy.needs:
        _COMMAND.refuse(
            "reference", f"left out for {selection.strategy}", repr(name),
            "Only methods that compare with a reference, as RHOLoss does, take one.",
        )  # fmt: skip
    _COMMAND.check_path("reference", name)


def _check_columns(dataset: Any, training: SFTConfig) -> None:
    """Refuse data that TRL's trainer cannot read, which would fail inside of a tokenizer."""
    if (training.dataset_kwargs or {}).get("skip_prepare_dataset"):
        return
    known, text = get_dataset_column_names(dataset), training.dataset_text_field
    ways = (("messages",), ("prompt", "completion"), (text,), ("conversations",), ("input_ids",))
    if any(set(way) <= set(known) for way in ways):
        return
    _COMMAND.refuse(
        "dataset", f"one with the columns messages, with prompt and completion, or with {text}",
        ", ".join(known),
        f"Rename them, for example by dataset.rename_columns({_renamed(known)}), or name the "
        "column of whole texts by --dataset_text_field.",
    )  # fmt: skip


def _renamed(known: Sequence[str]) -> dict[str, str]:
    """Return which columns may be the ones that TRL reads, by their usual names."""
    if len(known) == 1:
        return {known[0]: "text"}
    usual = {
        "prompt": ("question", "instruction", "query", "input"),
        "completion": ("answer", "response", "output", "target"),
    }
    renamed: dict[str, str] = {}
    for new, names in usual.items():
        left = [old for old in known if old not in usual and old not in renamed]
        if new not in known and left:
            renamed[next((name for name in names if name in left), left[0])] = new
    return renamed


def _reference(selection: SelectionArguments, trainer: Any, model: ModelConfig) -> Any:
    """Return what the callback takes: a word, a column, or a model that is loaded here."""
    name = selection.reference
    if name is None or name == "adapter":
        return name
    if name in (getattr(trainer.train_dataset, "column_names", None) or ()):
        return name
    reference = AutoModelForCausalLM.from_pretrained(
        name,
        dtype=model.dtype,
        attn_implementation=model.attn_implementation,
        trust_remote_code=trainer.args.trust_remote_code,
    )
    return reference.requires_grad_(False).to(trainer.accelerator.device)


def _record_rows(trainer: Any, folder: str, text: bool) -> None:
    """Write down what the rows say (if `text`), for the examples and sources of the report."""
    dataset, resumed = trainer.train_dataset, trainer.args.resume_from_checkpoint
    columns = getattr(dataset, "column_names", None) or ()
    # The ids that the callback logs are row numbers only where it counts the rows itself.
    countable = hasattr(dataset, "__len__") and "sample_id" not in columns
    if resumed or not countable or len(dataset) > _RECORDED_ROWS:
        return
    tokenizer = trainer.processing_class
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    sources = dataset["source"] if "source" in columns else [None] * len(dataset)
    texts = (tokenizer.decode(ids)[:_RECORDED_CHARACTERS] for ids in dataset["input_ids"])
    rows = zip(range(len(dataset)), sources, texts if text else [""] * len(dataset), strict=True)
    RunLog(folder).rows(rows)  # refuses a folder that holds another run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe from the command line.

    Args:
        argv: Arguments without the program's name, or None for those of the process.

    Returns:
        0, or 2 if the arguments cannot be followed.
    """
    kinds = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, SelectionArguments)
    defaults = _COMMAND.precision(argv)
    return _COMMAND.run(lambda: make_trainer(*_COMMAND.parse(kinds, argv, defaults)))


if __name__ == "__main__":
    sys.exit(main())
