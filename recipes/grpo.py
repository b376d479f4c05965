"""GRPO on problems that the model can learn from: TRL's GRPO script, and a few flags more.

    onlinesel grpo                                # a small model and made-up problems, on a CPU
    onlinesel grpo --config recipes/configs/grpo_gsm8k.yaml      # Qwen2.5-0.5B, GSM8K and vLLM

What it does: problems are chosen before the rollout by what is predicted of them (``--prompts``),
groups that teach nothing are dropped after it (``--gate``), and the batch is filled up again
(``--max_rounds``, ``--on_short``). ``--rollouts``, ``--advantages``, ``--tokens`` and
``--adaptive_temperature`` switch on the other parts. ``none`` switches a part off; with all parts
off this is TRL's trainer. All flags of ``trl grpo`` work as they do there, on the command line or
in a YAML file given with ``--config``: any model and data set, LoRA, vLLM, evaluation, checkpoints;
without an accelerator it trains in float32 unless ``--bf16`` is given.

Without ``--model_name_or_path`` a small Llama practises sums for a minute and then learns from
procedural problems (``--task``, one of mixed and digits), which takes a few minutes on a CPU.

Reward functions are given as ``module.function``; the first one is taken as the outcome that
decides, unless ``--outcome`` names another, or several that each score one task. ``--prompt_column
question`` makes a prompt of a column of questions, with ``--instruction`` after it.

On several GPUs: ``accelerate launch -m onlinesel.recipes.grpo ...``. Then ``onlinesel report RUN``
and ``onlinesel prompts RUN`` show what ``--record RUN`` wrote down.

Measured: what the methods gain and lose is in the header of :mod:`onlinesel.recipes.demo_grpo`.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from onlinesel import rl
from onlinesel._base.words import did_you_mean
from onlinesel.report.runlog import RunLog

try:
    from datasets import Dataset
    from trl import (
        DatasetMixtureConfig,
        GRPOConfig,
        GRPOTrainer,
        ModelConfig,
        ScriptArguments,
        get_peft_config,
        get_quantization_config,
    )
    from trl.data_utils import get_dataset_column_names

    from onlinesel.callbacks.grpo import RolloutSelection
    from onlinesel.recipes._arguments import CommandLine
    from onlinesel.recipes._problems import TASKS, columns, correct, held_out, pool
    from onlinesel.recipes._rl_warm import RLWarmSettings, prepare_rl
except ImportError as error:
    raise ImportError('onlinesel.recipes.grpo needs trl: pip install "onlinesel[trl]".') from error

__all__ = ["RolloutArguments", "main", "make_parts", "make_trainer"]

_COMMAND = CommandLine(
    "onlinesel grpo", "trl grpo", "[--model_name_or_path MODEL --dataset_name DATA]"
)
_KINDS: dict[str, tuple[str, ...]] = {
    "gate": ("PassRateBand", "ZeroVariance"),
    "prompts": (
        "SharedDifficulty", "Thompson", "InformativeProbability", "GRESO", "UniformPrompts",
    ),
    "rollouts": ("MaxVariance",),
    "advantages": ("TokenAverage", "DRPO", "OneSided"),
    "tokens": ("HAPO", "TopEntropy"),
}  # fmt: skip
_GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""What TRL hands to a reward function besides the columns of the data."""
_EMBEDDED: dict[str, Any] = {
    "per_device_train_batch_size": 32,
    "num_generations": 8,
    "learning_rate": 5e-5,
    "max_steps": 100,
    "temperature": 1.0,
    "top_k": 0,
    "beta": 0.0,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "logging_steps": 10,
    "use_cpu": True,
}
"""Defaults of the embedded model, which flags override."""


def _part(name: str, default: str = "none") -> Any:
    return field(default=default, metadata={"help": f"One of {', '.join(_KINDS[name])}, or none."})


def _pairs(name: str) -> Any:
    return field(
        default_factory=list,
        metadata={"help": f"Arguments of --{name} as name=value words, e.g. target=0.4."},
    )


@dataclass
class RolloutArguments:
    """Which problems are rolled out, and which of their completions train."""

    _argument_group_name: ClassVar[str] = "which problems are rolled out, and what of them trains"

    gate: str = _part("gate", "PassRateBand")
    gate_args: list[str] = _pairs("gate")
    prompts: str = _part("prompts", "SharedDifficulty")
    prompts_args: list[str] = _pairs("prompts")
    rollouts: str = _part("rollouts")
    rollouts_args: list[str] = _pairs("rollouts")
    advantages: str = _part("advantages")
    advantages_args: list[str] = _pairs("advantages")
    tokens: str = _part("tokens")
    tokens_args: list[str] = _pairs("tokens")
    adaptive_temperature: float | None = field(
        default=None, metadata={"help": "Strength of HAPO's temperature, e.g. 0.05."}
    )
    max_rounds: int = field(
        default=3, metadata={"help": "Further generation calls for one batch; 0 for none."}
    )
    max_rollouts: int | None = field(
        default=None, metadata={"help": "Completions generated for one batch at most."}
    )
    on_short: str = field(
        default="partial",
        metadata={"help": "If it is still short: partial, replace, top_up, skip or raise."},
    )
    leftover: str = field(
        default="discard", metadata={"help": "Kept groups beyond a full batch: discard or carry."}
    )
    reward: list[str] = field(
        default_factory=lambda: ["onlinesel.recipes.rewards.final_number"],
        metadata={"help": "Reward functions, each as module.function."},
    )
    outcome: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Reward functions that say right or wrong, of which the first that is not None "
            "counts; by default the first of --reward."
        },
    )
    success: float | None = field(
        default=None,
        metadata={"help": "Outcome above which an answer is right; graded ones count as they are."},
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column of questions to make prompts of."}
    )
    instruction: str = field(default="", metadata={"help": "What is written after each question."})
    task: str = field(
        default="mixed",
        metadata={"help": f"Problems without a model: one of {', '.join(TASKS)}."},
    )
    selection_seed: int | None = field(
        default=None, metadata={"help": "Seed of the selection; the trainer's by default."}
    )
    record: str | None = field(
        default=None,
        metadata={"help": "Folder for the record of `onlinesel report` and `onlinesel prompts`."},
    )
    record_text: bool = field(
        default=True, metadata={"help": "Whether the record holds what prompts say."}
    )


def make_parts(options: RolloutArguments) -> dict[str, Any]:
    """Return the parts of the callback that the flags describe, by the name of their argument.

    Raises:
        ValueError: An unknown name, or arguments that a part does not take.

    Example:
        >>> make_parts(RolloutArguments(prompts="none", gate_args=["low=0.2"]))["gate"].low
        0.2
    """
    parts: dict[str, Any] = {}
    for argument, names in _KINDS.items():
        name = getattr(options, argument)
        if name == "none":
            continue
        parts[argument] = _COMMAND.build(
            argument, {kind: getattr(rl, kind) for kind in names}, name,
            getattr(options, f"{argument}_args"), "Use none to switch it off.",
        )  # fmt: skip
    if "gate" in parts:
        parts["refill"] = rl.Refill(
            max_rounds=options.max_rounds,
            max_rollouts=options.max_rollouts,
            on_short=options.on_short,
            leftover=options.leftover,
        )
    if options.adaptive_temperature is not None:
        parts["temperature"] = rl.AdaptiveTemperature(tau=options.adaptive_temperature)
    return parts


def make_trainer(
    script: ScriptArguments,
    training: GRPOConfig,
    model: ModelConfig,
    mixture: DatasetMixtureConfig,
    options: RolloutArguments,
) -> GRPOTrainer:
    """Return TRL's trainer with the selection in it, ready to train.

    Args:
        script: Data.
        training: TRL's settings.
        model: The model; without a name, the embedded one.
        mixture: Data, in a YAML file.
        options: Our flags.

    Raises:
        ValueError: The arguments do not fit together; the message says what to change.
    """
    parts = make_parts(options)  # before minutes are spent on model and data
    if model.model_name_or_path is None:
        trainer = _embedded(training, options)
    else:
        _COMMAND.check_path("model_name_or_path", model.model_name_or_path)
        trainer = _from_hub(script, training, model, mixture, options)
    trainer.add_callback(
        RolloutSelection(
            trainer,
            **parts,
            outcome=options.outcome or trainer.reward_funcs[0],
            success=options.success,
            seed=options.selection_seed,
            record=options.record,
            record_text=options.record_text,
        )
    )
    if options.record is not None and trainer.is_world_process_zero():
        _record_rows(trainer, options.record, options.record_text)
    return trainer


def _embedded(training: GRPOConfig, options: RolloutArguments) -> GRPOTrainer:
    """Return a trainer of the small model on procedural problems."""
    if options.task not in TASKS:
        _COMMAND.refuse(
            "task", f"one of {', '.join(TASKS)}", repr(options.task),
            "Or name a model and a data set.",
        )  # fmt: skip
    with training.main_process_first(desc="practice"):
        start, cached = prepare_rl(RLWarmSettings(options.task), Path("runs") / "starts")
    if not cached:
        print(f"Practised sums; kept in {start.folder}.", flush=True)
    training.max_completion_length = start.task.tokens
    return GRPOTrainer(
        model=start.model(),
        reward_funcs=correct,
        args=training,
        train_dataset=Dataset.from_dict(columns(pool(start.task))),
        eval_dataset=Dataset.from_dict(columns(held_out(start.task))),
        processing_class=start.tokenizer(),
    )


def _from_hub(
    script: ScriptArguments,
    training: GRPOConfig,
    model: ModelConfig,
    mixture: DatasetMixtureConfig,
    options: RolloutArguments,
) -> GRPOTrainer:
    dataset = _COMMAND.load_data(script, mixture)
    training.model_init_kwargs = _COMMAND.loading(training, model)
    evaluates = training.eval_strategy != "no"
    train = _COMMAND.split(dataset, script.dataset_train_split, "dataset_train_split")
    test = _COMMAND.split(dataset, script.dataset_test_split, "dataset_test_split") if (
        evaluates
    ) else None  # fmt: skip
    rewards = [_reward(name) for name in options.reward]
    for function in rewards:
        _check_columns(function, get_dataset_column_names(train))
    return GRPOTrainer(
        model=model.model_name_or_path,
        reward_funcs=rewards,
        args=training,
        train_dataset=_prompted(train, options),
        eval_dataset=None if test is None else _prompted(test, options),
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )


def _reward(name: str) -> Any:
    module, _, function = name.rpartition(".")
    if not module:
        _COMMAND.refuse("reward", "module.function", repr(name), "Write where it is defined.")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"onlinesel grpo: reward must be a function that can be imported, got {name!r} "
            f"({error}). Run from the folder of its module."
        ) from error


def _check_columns(reward: Callable[..., Any], known: Sequence[str]) -> None:
    """Refuse a reward function that asks for columns which the data has not."""
    parameters = inspect.signature(reward).parameters.values()
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    asked = [p.name for p in parameters if p.kind in by_name and p.default is p.empty]
    missing = [name for name in asked if name not in (*known, *_GIVEN)]
    if missing:
        _COMMAND.refuse(
            "reward", f"a function of the data's columns ({', '.join(known)})",
            f"{reward.__name__}, which reads {', '.join(missing)}",
            "Rename the column, or name another function of your own by --reward.",
        )  # fmt: skip


def _prompted(dataset: Any, options: RolloutArguments) -> Any:
    """Return the data with a column ``prompt``: a conversation of one question."""
    column, known = options.prompt_column, get_dataset_column_names(dataset)
    if column is None:
        if "prompt" not in known:
            _COMMAND.refuse(
                "prompt_column", "given for data without a column 'prompt'", None,
                f"The columns are {', '.join(known)}: write --prompt_column {_question(known)}.",
            )  # fmt: skip
        return dataset
    if column not in known:
        _COMMAND.refuse(
            "prompt_column", f"a column of the data ({', '.join(known)})", repr(column),
            did_you_mean(column, known, "Name one of them."),
        )  # fmt: skip

    def conversation(row: dict[str, Any]) -> dict[str, Any]:
        text = f"{row[column]}\n{options.instruction}".rstrip()
        return {"prompt": [{"role": "user", "content": text}]}

    return dataset.map(conversation)


def _question(columns: Sequence[str]) -> str:
    """Return the column that most likely holds the questions."""
    likely = ("question", "problem", "query", "instruction", "input")
    return next((name for name in likely if name in columns), columns[0] if columns else "NAME")


def _record_rows(trainer: Any, folder: str, text: bool) -> None:
    """Write down what the problems say (if `text`), for the report and `onlinesel prompts`."""
    dataset = trainer.train_dataset
    if trainer.args.resume_from_checkpoint or not hasattr(dataset, "__len__"):
        return
    kinds = dataset["kind"] if "kind" in dataset.column_names else [None] * len(dataset)
    texts = (p if isinstance(p, str) else p[-1]["content"] for p in dataset["prompt"])
    said = (each[:400] if text else "" for each in texts)
    rows = zip(range(len(dataset)), kinds, said, strict=True)
    RunLog(folder).rows(rows)  # refuses a folder that holds another run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe from the command line.

    Args:
        argv: Arguments without the program's name, or None for those of the process.

    Returns:
        0, or 2 if the arguments cannot be followed.
    """
    kinds = (ScriptArguments, GRPOConfig, ModelConfig, DatasetMixtureConfig, RolloutArguments)

    def make() -> GRPOTrainer:
        parsed = _COMMAND.parse(kinds, argv, _EMBEDDED)
        if parsed[2].model_name_or_path is not None:  # then TRL's own defaults
            parsed = _COMMAND.parse(kinds, argv, _COMMAND.precision(argv))
        return make_trainer(*parsed)

    return _COMMAND.run(make)


if __name__ == "__main__":
    sys.exit(main())
