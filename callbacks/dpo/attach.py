"""Token weights in TRL's DPOTrainer.

DPOTrainer takes the log-probability of every token from its models and sums them over each answer.
Here the models' log-probabilities are multiplied by weights before that sum, for policy and
reference alike; the sum, the loss types and the metrics remain TRL's own code. As in
:mod:`onlinesel.callbacks.hf`, bound methods **of one trainer** are wrapped, and
:meth:`PreferenceSelection.detach` puts everything back. Wrapped are:

- ``compute_loss``: gets a stand-in for the model, whose output is weighted. The reference sums come
  from ``compute_ref_log_probs``, which gets a stand-in too, and reach the loss where precomputed
  ones would;
- ``get_train_dataloader``: values of tokens that the user gives with the data ride in the batches;
- ``_save_rng_state`` and ``_inner_training_loop``: the generator goes into the checkpoint and comes
  back from it.

Evaluation is the host's own: its losses compare with those of a run without weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from onlinesel.callbacks._shared.belonging import check_settings, warn_of_no_state
from onlinesel.callbacks._shared.hosts import TESTED_TRL, right_callback
from onlinesel.callbacks._shared.precision import warn_slow_bfloat16
from onlinesel.callbacks._shared.versions import check_version
from onlinesel.callbacks._shared.wrapping import overridden
from onlinesel.callbacks.dpo.weigh import TOKEN_VALUE, CarryTokenValues, WeighedModel, refuse
from onlinesel.data.randomness import seed_of_rank
from onlinesel.rl.preference import PreferenceTerms, PreferenceTokens, PreferenceWeights

try:
    from onlinesel.callbacks._shared.attached import AttachedCallback
    from onlinesel.callbacks._shared.checkpoint import load_selection, save_selection
except ImportError as error:
    raise ImportError(
        'onlinesel.callbacks.dpo needs transformers and TRL: pip install "onlinesel[trl]".'
    ) from error

__all__ = ["PreferenceSelection"]

_COMPUTED = ("policy", "reference")
_USED = (
    "compute_ref_log_probs", "loss_types", "precompute_ref_logps", "use_weighting", "_metrics",
    "_is_vision_dataset", "_tokenizer",
)  # fmt: skip
_COUNTING = ("ipo", "sigmoid_norm", "sft")  # divide by the number of tokens


class PreferenceSelection(AttachedCallback):
    """Weigh the tokens of preference pairs in TRL's DPOTrainer.

    With all weights 1 the run is the plain one, bit for bit. TRL's metrics of log-probabilities and
    rewards are of the weighted sums, and those of entropy, logits and accuracy of what the policy
    read. ``ld_alpha`` multiplies the weights of the tail. Losses that compare or sort sums, and
    divergences of them, take the weighted sums as they are. Each process draws with its own
    generator; nothing is exchanged. ``selection/token_weight`` and ``selection/ignored_share`` in
    the log are of the answers' tokens, on the process that logs.

    Args:
        trainer: A ``DPOTrainer`` on text. It is changed at once; add the callback to the same
            trainer.
        weights: The method. Values of tokens that it needs besides ``"policy"`` and
            ``"reference"`` are columns ``chosen_<name>`` and ``rejected_<name>`` of
            ``trainer.train_dataset``: lists as long as ``chosen_ids`` and ``rejected_ids``, which
            the trainer has put there.
        seed: Of the generators; the trainer's are never touched.

    Raises:
        ValueError: The trainer's settings cannot give the weighted loss; the message says what to
            change. Refused are ``precompute_ref_log_probs``, whose sums are taken already; the
            loss types ``ipo``, ``sigmoid_norm`` and ``sft``, which divide by a number of tokens
            that weights change; ``use_weighting``, which computes weights from the
            log-probabilities that are weighted here; image data; and parallelism that splits or
            repeats the rows of a batch.
        TypeError: ``weights`` is not a :class:`PreferenceWeights`.

    Example:
        ```python
        trainer = DPOTrainer(model, args=args, train_dataset=pairs, processing_class=tokenizer)
        trainer.add_callback(PreferenceSelection(trainer, TARS(share=0.1)))
        trainer.train()
        ```
    """

    _wrapped = (
        "compute_loss", "get_train_dataloader", "_save_rng_state", "_inner_training_loop",
    )  # fmt: skip

    def __init__(self, trainer: Any, weights: PreferenceWeights, *, seed: int = 0) -> None:
        _check_trainer(trainer)
        if not isinstance(weights, PreferenceWeights):
            raise TypeError(
                "PreferenceSelection: weights must be a PreferenceWeights instance, got "
                f"{weights!r}. Write TARS(), with parentheses."
            )
        self.trainer, self.weights, self.seed = trainer, weights, seed
        self._names = [name for name in weights.needs if name not in _COMPUTED]
        _check_columns(trainer, self._columns)
        tokenizer = trainer._tokenizer
        self._special = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.int64)
        self._vocabulary = len(tokenizer)
        self._generator = torch.Generator().manual_seed(seed)
        self._attach()

    @property
    def _columns(self) -> list[str]:
        return [f"{side}_{name}" for name in self._names for side in ("chosen", "rejected")]

    def _on_get_train_dataloader(self) -> Any:
        """Build the trainer's own loader, with the values of tokens in its batches."""
        trainer = self.trainer
        if not self._names:
            return self._call["get_train_dataloader"]()
        with overridden(trainer, {"_signature_columns": trainer._signature_columns}):
            trainer._set_signature_columns_if_needed()
            changes = {
                "_signature_columns": [*trainer._signature_columns, *self._columns],
                "data_collator": CarryTokenValues(trainer.data_collator, self._names),
            }
            with overridden(trainer, changes):
                return self._call["get_train_dataloader"]()

    def _on_compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Let the trainer compute its own loss, of weighted log-probabilities."""
        batch = {k: v for k, v in inputs.items() if not k.startswith(TOKEN_VALUE)}
        if not self.trainer.model.training:
            return self._call["compute_loss"](model, batch, *args, **kwargs)
        weighed = WeighedModel(
            model,
            self.trainer,
            batch,
            values={name: inputs[TOKEN_VALUE + name] for name in self._names},
            needs=self.weights.needs,
            decide=lambda values: self._decide(batch, values),
        )
        with overridden(self.trainer, {"precompute_ref_logps": True}):
            return self._call["compute_loss"](weighed, batch, *args, **kwargs)

    def _decide(self, batch: dict[str, Any], values: dict[str, Tensor]) -> PreferenceTerms:
        """Return the terms of one micro-batch, and note in the trainer's metrics what they are."""
        ids, mask = batch["input_ids"].cpu(), batch["completion_mask"].cpu() != 0
        mask[:, 0] = False  # truncated answers may begin there, and nothing predicts their token
        known = {k: torch.where(mask, v.cpu(), 0.0) for k, v in values.items()}
        tokens = PreferenceTokens(ids, mask, known, self._special, self._vocabulary)
        terms = self.weights.weigh(tokens, generator=self._generator)
        for name, found in (("weights", terms.weights), ("inputs", terms.inputs)):
            if found is not None and found.shape != ids.shape:
                refuse(
                    name, f"of the batch's shape {tuple(ids.shape)}", tuple(found.shape),
                    f"Let {type(self.weights).__name__} answer for every token, 0 where it has "
                    "nothing to say.",
                )  # fmt: skip
        used = terms.weights[mask]
        metrics = self.trainer._metrics["train"]
        if used.numel():
            metrics["selection/token_weight"].append(used.mean().item())
            metrics["selection/ignored_share"].append((used == 0).float().mean().item())
        return terms

    # Checkpoints ----------------------------------------------------------------------------

    @property
    def _rank(self) -> int | None:
        """The process that a state belongs to; None for the only one."""
        args = self.trainer.args
        return args.process_index if args.world_size > 1 else None

    def _facts(self) -> dict[str, Any]:
        world_size = self.trainer.args.world_size
        return {"weights": repr(self.weights), "seed": self.seed, "world_size": world_size}

    def _on__save_rng_state(self, output_dir: str) -> None:
        """Write the generator beside the trainer's own, before the checkpoint is complete."""
        self._call["_save_rng_state"](output_dir)
        state = {"generator": self._generator.get_state()}
        save_selection(output_dir, state, self._facts(), rank=self._rank)

    def _begin(self, checkpoint: str | None, trial: int | None = None) -> None:
        self._generator.manual_seed(seed_of_rank(self.seed, self._rank))
        if checkpoint is None:
            return
        found = load_selection(checkpoint, rank=self._rank, owner="PreferenceSelection")
        if found is None:
            warn_of_no_state("PreferenceSelection", checkpoint)
            return
        tensors, facts = found
        check_settings(refuse, facts, self._facts(), checkpoint)
        self._generator.set_state(tensors["generator"])


def _check_trainer(trainer: Any) -> None:
    """Refuse trainers and settings whose loss would not be the weighted one."""
    is_dpo = any(cls.__name__ == "DPOTrainer" for cls in type(trainer).__mro__)
    if is_dpo:
        check_version("PreferenceSelection", "trl", "trl")
    if not is_dpo or not all(hasattr(trainer, name) for name in _USED):
        tested = f"Install the TRL it was tested with: pip install trl=={TESTED_TRL}."
        remedy = tested if is_dpo else right_callback(trainer)
        refuse("trainer", "TRL's DPOTrainer", type(trainer).__name__, remedy)
    args = trainer.args
    warn_slow_bfloat16("PreferenceSelection", args)
    attached = getattr(trainer.compute_loss, "__self__", trainer) is not trainer
    parallel = {n: getattr(trainer, f"get_{n}_size")() for n in ("tp", "cp", "sp")}
    counting = [name for name in trainer.loss_types if name in _COUNTING]
    for bad, argument, rule, got, remedy in (
        (attached, "trainer", "without another callback on its loss", "one that has it",
         "detach() the first."),
        (trainer.precompute_ref_logps, "precompute_ref_log_probs", "off", True,
         "Set it to False: its sums over tokens are taken before there are weights."),
        (bool(counting), "loss_type", f"none of {', '.join(_COUNTING)}", ", ".join(counting),
         "They divide by the number of tokens, which weights change. Use 'sigmoid'."),
        (trainer.use_weighting, "use_weighting", "off", True,
         "Set it to False: it would read the weighted log-probabilities as the policy's own."),
        (trainer._is_vision_dataset, "train_dataset", "of text", "images",
         "Train on text: places of tokens are known for tokenized text only."),
        (max(parallel.values()) > 1, "tensor, context and sequence parallel sizes", "1", parallel,
         "Use data parallelism (DDP, FSDP, DeepSpeed)."),
        (args.auto_find_batch_size, "auto_find_batch_size", "off", True,
         "A retried step would be drawn twice. Set the batch size yourself."),
    ):  # fmt: skip
        if bad:
            refuse(argument, rule, got, remedy)


def _check_columns(trainer: Any, columns: Sequence[str]) -> None:
    """Refuse values of tokens that the data does not hold."""
    known = getattr(trainer.train_dataset, "column_names", None)
    missing = [name for name in columns if known is not None and name not in known]
    if missing:
        refuse(
            "needs", "'policy', 'reference' or values in columns of trainer.train_dataset",
            f"no column {missing[0]!r}", f"The columns are {', '.join(known or ())}.",
        )  # fmt: skip
