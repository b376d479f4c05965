"""What one run of either demo has: a single thread, a seed, and nothing on the screen."""

from __future__ import annotations

from typing import Any

import torch
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

__all__ = ["QUIET", "begin_run"]

QUIET: dict[str, Any] = {
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
}
"""Arguments of the trainer."""


def begin_run(seed: int) -> None:
    """Set up a worker process for a run.

    Args:
        seed: Of the program's generators.
    """
    set_verbosity_error()
    disable_progress_bar()
    torch.set_num_threads(1)
    set_seed(seed)
