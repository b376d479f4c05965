"""What callbacks of transformers' trainers share: wrapping one trainer, a run, coming off it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from transformers import TrainerCallback

from onlinesel.callbacks._shared.belonging import check_added, check_own
from onlinesel.callbacks._shared.wrapping import take_off, wrap

__all__ = ["AttachedCallback"]


class AttachedCallback(TrainerCallback):
    """Wraps methods of one trainer until :meth:`detach`.

    A subclass names them in ``_wrapped``, ``_inner_training_loop`` among them, and has an
    ``_on_<name>`` for each other one, which finds the trainer's own in ``self._call``.

    Attributes:
        trainer: The trainer.
    """

    _wrapped: ClassVar[tuple[str, ...]]
    _instead: ClassVar[str] = "Wait for the end of the run."
    trainer: Any
    _running = False

    def _attach(self) -> None:
        """Wrap the trainer's methods; the last thing that a constructor does."""
        self._call = {name: getattr(self.trainer, name) for name in self._wrapped}
        ours = {name: getattr(self, f"_on_{name}") for name in self._wrapped}
        self._before = wrap(self.trainer, ours)

    def detach(self) -> None:
        """Take the callback off its trainer, which is then as it was before.

        Raises:
            ValueError: The trainer is training, with what the callback gave it.
        """
        if self._running:
            raise ValueError(
                f"{type(self).__name__}: detach must be called before or after train(), got a call "
                f"during training. {self._instead}"
            )
        take_off(self, self._before)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse another trainer than the one that is wrapped."""
        check_own(self, self._running, args)

    def _on__inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Start or resume the selection together with the run; only here is the checkpoint told."""
        check_added(self)
        trial = getattr(kwargs.get("trial"), "number", None)
        self._begin(kwargs.get("resume_from_checkpoint"), trial)
        self._running = True
        try:
            with self._during():
                return self._call["_inner_training_loop"](*args, **kwargs)
        finally:
            self._running = False
            self._end()

    def _begin(self, checkpoint: str | None, trial: int | None = None) -> None:
        """Make ready for a run, which goes on from a checkpoint or is a numbered trial."""
        raise NotImplementedError

    def _during(self) -> AbstractContextManager[None]:
        """Return what is to hold as long as the trainer trains."""
        return nullcontext()

    def _end(self) -> None:
        """Close what :meth:`_begin` opened; also after an error."""
