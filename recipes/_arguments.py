"""What the recipes' command lines share: parts named by flags, data as TRL's scripts load them."""

from __future__ import annotations

import ast
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from datasets import load_dataset
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, get_dataset

__all__ = ["CommandLine"]

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class CommandLine:
    """Reads flags for one command, whose name its errors carry."""

    name: str

    def refuse(self, argument: str, rule: str, got: object, remedy: str) -> NoReturn:
        """Raise the designed error of the command."""
        raise ValueError(f"{self.name}: {argument} must be {rule}, got {got}. {remedy}")

    def build(
        self,
        argument: str,
        kinds: Mapping[str, type],
        kind: str,
        pairs: Sequence[str] | Mapping[str, Any],
        remedy: str,
    ) -> Any:
        """Return the part that a flag and its ``name=value`` arguments describe.

        Args:
            argument: The flag; its arguments' flag is ``{argument}_args``.
            kinds: What there is, by name.
            kind: The name that was given.
            pairs: ``name=value`` words, or a mapping from a YAML file.
            remedy: What to do about an unknown name.

        Raises:
            ValueError: An unknown name, or arguments that it does not take.
        """
        if kind not in kinds:
            self.refuse(argument, f"one of {', '.join(kinds)}", repr(kind), remedy)
        values = self._keywords(f"{argument}_args", pairs, kinds[kind])
        try:
            return kinds[kind](**values)
        except TypeError as error:
            self.refuse(
                f"{argument}_args", f"values that {kind} takes", values, f"It says: {error}."
            )

    def _keywords(
        self, argument: str, pairs: Sequence[str] | Mapping[str, Any], kind: type
    ) -> dict[str, Any]:
        """Return ``name=value`` pairs as keyword arguments; YAML may give a mapping instead."""
        allowed = [f.name for f in dataclasses.fields(kind) if f.init]
        if not isinstance(pairs, Mapping):
            split = [pair.partition("=") for pair in pairs]
            for pair, (name, equals, _) in zip(pairs, split, strict=True):
                if not equals:
                    self.refuse(argument, "name=value pairs", repr(pair), f"Write {name}=VALUE.")
            names = [name for name, _, _ in split]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                self.refuse(argument, "different names", f"{twice!r} twice", "Give it once.")
            pairs = {name: _value(text) for name, _, text in split}
        for name in pairs:
            if name not in allowed:
                rule = f"among {', '.join(allowed)}" if allowed else "empty"
                self.refuse(
                    argument, f"{rule} for {kind.__name__}", repr(name),
                    f"help({kind.__module__.rpartition('.')[0]}.{kind.__name__}) explains the "
                    "method.",
                )  # fmt: skip
        return dict(pairs)

    def load_data(self, script: ScriptArguments, mixture: DatasetMixtureConfig) -> Any:
        """Load what TRL's own script would, or a single file."""
        if mixture.datasets:
            return get_dataset(mixture)
        if script.dataset_name is None:
            self.refuse(
                "dataset_name", "a dataset of the Hub, a folder or a file", None,
                "Or list `datasets:` in the file of --config.",
            )  # fmt: skip
        builder = _BUILDERS.get(Path(script.dataset_name).suffix)
        if builder and Path(script.dataset_name).is_file():
            files = {script.dataset_train_split: script.dataset_name}
            return load_dataset(builder, data_files=files, streaming=script.dataset_streaming)
        return load_dataset(
            script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming
        )

    def loading(self, training: Any, model: ModelConfig) -> dict[str, Any]:
        """Return the keyword arguments with which the trainer loads the model."""
        return {
            "revision": model.model_revision,
            "trust_remote_code": training.trust_remote_code,
            "attn_implementation": model.attn_implementation,
            "dtype": model.dtype,
            **(training.model_init_kwargs or {}),
        }

    def run(self, make: Callable[[], Any]) -> int:
        """Make the trainer, train, save; return 0, or 2 if the arguments cannot be followed."""
        try:
            trainer = make()
        except (ValueError, OSError, ImportError) as error:
            own = str(error).startswith(f"{self.name}: ")
            sys.stderr.write(f"{'' if own else self.name + ': '}{error}\n")
            return 2
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
        trainer.save_model(trainer.args.output_dir)
        trainer.accelerator.print(f"Model saved to {trainer.args.output_dir}.")
        if trainer.args.push_to_hub:
            trainer.push_to_hub()
        if hasattr(trainer, "end"):  # transformers >= 5.18: closes trackers and the process group
            trainer.end()
        return 0

    def split(self, dataset: Any, name: str, argument: str) -> Any:
        """Return one split of the data."""
        if name not in dataset:
            self.refuse(
                argument, f"one of the splits {', '.join(dataset)}", repr(name),
                "A single file has only a training split: use a folder with train and test files, "
                "or eval_strategy=no.",
            )  # fmt: skip
        return dataset[name]


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # a bare word is a string: a shell eats quotes
