"""What the recipes' command lines share: flags, parts named by flags, data as TRL loads them."""

from __future__ import annotations

import ast
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from datasets import load_dataset
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser, get_dataset

from onlinesel._base.words import did_you_mean

__all__ = ["CommandLine"]

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_PATHS = ("/", "./", "../", "~")


@dataclass(frozen=True)
class CommandLine:
    """Reads flags for one command.

    Attributes:
        name: Of the command; its errors carry it.
        trl: Command of TRL whose flags it takes as well.
        example: Flags that its usage shows.
    """

    name: str
    trl: str
    example: str

    def refuse(self, argument: str, rule: str, got: object, remedy: str) -> NoReturn:
        """Raise the designed error of the command."""
        raise ValueError(f"{self.name}: {argument} must be {rule}, got {got}. {remedy}")

    # Flags ----------------------------------------------------------------------------------

    def parser(self, kinds: Sequence[type], defaults: Mapping[str, Any]) -> TrlParser:
        """Return TRL's parser, whose help shows the groups that have a name first.

        Args:
            kinds: Dataclasses of flags.
            defaults: In place of those of the dataclasses.
        """
        usage = f"{self.name} {self.example} [flags]"
        parser = TrlParser(kinds, prog=self.name, usage=usage)
        parser.set_defaults(**defaults)
        groups = parser._action_groups  # argparse shows groups in the order of their making
        groups.sort(key=lambda group: group.title in ("positional arguments", "options"))
        return parser

    def parse(
        self, kinds: Sequence[type], argv: Sequence[str] | None, defaults: Mapping[str, Any]
    ) -> tuple[Any, ...]:
        """Return an object of each kind from words and from the YAML file of ``--config``.

        Args:
            kinds: Dataclasses of flags.
            argv: Words, or None for those of the process.
            defaults: In place of those of the dataclasses.

        Raises:
            ValueError: A flag that nothing takes, or a file that cannot be read.
        """
        words = list(sys.argv[1:] if argv is None else argv)
        file = _after(words, "--config")
        if file is not None and not Path(file).is_file():
            self.refuse(
                "config",
                "a YAML file that is there",
                repr(file),
                f"Write its path as seen from {Path.cwd()}.",
            )
        parser = self.parser(kinds, defaults)
        try:
            *parsed, left = parser.parse_args_and_config(words, return_remaining_strings=True)
        except yaml.YAMLError as error:
            self.refuse("config", "a YAML file", file, f"It says: {error}.")
        unknown = [word for word in left if word.startswith("--")] or left
        if unknown:
            flags = [flag for action in parser._actions for flag in action.option_strings]
            self.refuse(
                "flags", f"ours or those of `{self.trl}`", ", ".join(map(str, unknown)),
                did_you_mean(unknown[0], flags, f"`{self.name} --help` lists them."),
            )  # fmt: skip
        return tuple(parsed)

    def precision(self, argv: Sequence[str] | None) -> dict[str, Any]:
        """Return TRL's default precision as far as the machine has it.

        TRL trains in bfloat16 by default, which a CPU without instructions for it does ten times
        slower than float32, and which the trainer refuses on a CPU unless ``use_cpu`` is set.
        """
        words = list(sys.argv[1:] if argv is None else argv)
        asked = _after([word.replace("-", "_") for word in words], "__use_cpu")
        on_cpu = asked is not None and asked.lower() not in ("false", "no", "0", "f", "n")
        return {"bf16": False} if on_cpu or not torch.accelerator.is_available() else {}

    # Parts ----------------------------------------------------------------------------------

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
            near = did_you_mean(kind, kinds)
            self.refuse(
                argument, f"one of {', '.join(kinds)}", repr(kind), f"{near} {remedy}".strip()
            )
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
                known = f"{kind.__module__.rpartition('.')[0]}.{kind.__name__}"
                self.refuse(
                    argument, f"{rule} for {kind.__name__}", repr(name),
                    f"{did_you_mean(name, allowed)} In Python, help({known}) explains the "
                    "method.".lstrip(),
                )  # fmt: skip
        return dict(pairs)

    # Data and model -------------------------------------------------------------------------

    def check_path(self, argument: str, name: str) -> None:
        """Refuse what is written as a path and not there, before it is looked for on the Hub."""
        path = Path(name).expanduser()
        written = name.startswith(_PATHS) or path.suffix in _BUILDERS or name.count("/") > 1
        if written and not path.exists():
            self.refuse(
                argument, "a file or folder that is there, or a name of the Hub", repr(name),
                f"Write its path as seen from {Path.cwd()}.",
            )  # fmt: skip

    def load_data(self, script: ScriptArguments, mixture: DatasetMixtureConfig) -> Any:
        """Load what TRL's own script would, or a single file."""
        if mixture.datasets:
            return get_dataset(mixture)
        name = script.dataset_name
        if name is None:
            self.refuse(
                "dataset_name", "a dataset of the Hub, a folder or a file", None,
                "Or list `datasets:` in the file of --config.",
            )  # fmt: skip
        self.check_path("dataset_name", name)
        if Path(name).is_file():
            builder = _BUILDERS.get(Path(name).suffix)
            if builder is None:
                self.refuse(
                    "dataset_name", f"a file of {', '.join(_BUILDERS)}, or a folder", repr(name),
                    "Convert it, or name its folder and let the datasets library find out.",
                )  # fmt: skip
            files = {script.dataset_train_split: name}
            return load_dataset(builder, data_files=files, streaming=script.dataset_streaming)
        return load_dataset(name, name=script.dataset_config, streaming=script.dataset_streaming)

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


def _after(words: Sequence[str], flag: str) -> str | None:
    """Return the word that follows a flag, "" at the end, or None without the flag."""
    if flag not in words:
        return None
    return next(iter(words[words.index(flag) + 1 :]), "")


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # a bare word is a string: a shell eats quotes
