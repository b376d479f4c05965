"""What works in which host, found by trying it: ``docs/capabilities.md``.

    python -m onlinesel.recipes.capabilities docs/capabilities.md

Every cell is a run of two optimizer steps of a tiny model on a CPU (:mod:`_capability_hosts`). It
says ``yes``, ``refused`` with the words of the refusal below the table, or ``-`` where the host has
no such setting. Between ``<!-- capabilities -->`` and ``<!-- end -->`` the page holds what this
module writes and nothing else; a test makes it again and compares.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from onlinesel import rl, strategies
from onlinesel.strategies import TopLoss

try:
    import datasets
    import transformers

    from onlinesel.recipes._capability_hosts import Case, probe
except ImportError as error:
    raise ImportError(
        "onlinesel.recipes.capabilities needs TRL, PEFT and Lightning: "
        'pip install "onlinesel[trl,lightning]".'
    ) from error

__all__ = ["FEATURES", "METHODS", "PARTS", "Table", "filled", "main", "tables"]

Cells = Mapping[str, Case]
Probe = Callable[[str, Case], str | None]

_BLOCK = re.compile(r"(<!-- capabilities -->\n).*?(<!-- end -->)", re.DOTALL)
_ROW_HOSTS = ("Trainer", "Lightning", "steps")
_ALL_HOSTS = ("Trainer", "SFTTrainer", "DPOTrainer", "GRPOTrainer", "Lightning", "steps")
_OF_HF = ("Trainer", "SFTTrainer", "DPOTrainer", "GRPOTrainer")


def _with(hosts: Iterable[str], **changes: Any) -> Cells:
    """Return the same case for some hosts."""
    return dict.fromkeys(hosts, Case(TopLoss(), **changes))


def _arguments(hosts: Iterable[str], **arguments: Any) -> Cells:
    return _with(hosts, arguments=arguments)


METHODS: dict[str, Cells] = {
    name: dict.fromkeys(_ROW_HOSTS, Case(getattr(strategies, name)()))
    for name in strategies.__all__
}
"""Every row method in every host that takes one; ``SFTTrainer`` runs the code of ``Trainer``."""

PARTS: dict[str, Cells] = {
    name: {"GRPOTrainer": Case(parts)}
    for name, parts in {
        "`gate=ZeroVariance()`": {"gate": rl.ZeroVariance()},
        "`gate=PassRateBand()`, `refill=Refill()`": {
            "gate": rl.PassRateBand(), "refill": rl.Refill()
        },
        "`prompts=UniformPrompts()`": {"prompts": rl.UniformPrompts()},
        "`prompts=GRESO()`": {"prompts": rl.GRESO()},
        "`prompts=Thompson()`": {"prompts": rl.Thompson()},
        "`prompts=InformativeProbability()`": {"prompts": rl.InformativeProbability()},
        "`prompts=SharedDifficulty()`": {"prompts": rl.SharedDifficulty()},
        "`rollouts=MaxVariance(2)`": {"rollouts": rl.MaxVariance(2)},
        "`advantages=TokenAverage()`": {"advantages": rl.TokenAverage()},
        "`advantages=DRPO()`": {"advantages": rl.DRPO()},
        "`advantages=OneSided()`": {"advantages": rl.OneSided()},
        "`tokens=HAPO()`": {"tokens": rl.HAPO()},
        "`tokens=TopEntropy()`": {"tokens": rl.TopEntropy()},
        "`temperature=AdaptiveTemperature()`": {"temperature": rl.AdaptiveTemperature()},
    }.items()
}  # fmt: skip
"""Every part of ``RolloutSelection``."""

FEATURES: dict[str, Cells] = {
    "gradient accumulation": _arguments(_ALL_HOSTS, gradient_accumulation_steps=2),
    "LoRA": _with(_ALL_HOSTS, lora=True),
    "bfloat16 weights": _with(_ALL_HOSTS, dtype=torch.bfloat16),
    "rows from a stream": _with(_ALL_HOSTS, streamed=True),
    "gradient checkpointing": _arguments(_ALL_HOSTS, gradient_checkpointing=True),
    "`reuse_forward=True`, with checkpointing": _with(
        ("Trainer", "SFTTrainer", "Lightning", "steps"),
        options={"reuse_forward": True}, arguments={"gradient_checkpointing": True},
    ),
    "`train_sampling_strategy='group_by_length'`": _arguments(
        ("Trainer", "SFTTrainer"), train_sampling_strategy="group_by_length"
    ),
    "`label_smoothing_factor=0.1`": _arguments(_OF_HF, label_smoothing_factor=0.1),
    "`neftune_noise_alpha=5`": _arguments(_OF_HF, neftune_noise_alpha=5),
    "`auto_find_batch_size=True`": _arguments(_OF_HF[:3], auto_find_batch_size=True),
    "`dataloader_drop_last=True`": _arguments(_OF_HF, dataloader_drop_last=True),
    "`max_grad_norm=0`": _arguments(_OF_HF, max_grad_norm=0.0),
    "`packing=True`": _arguments(("SFTTrainer",), packing=True),
    "`padding_free=True`": {
        **_arguments(("SFTTrainer",), padding_free=True, max_length=None),
        **_arguments(("DPOTrainer",), padding_free=True),
    },
    "`loss_type='dft'`": _arguments(("SFTTrainer",), loss_type="dft"),
    "`loss_type='ipo'`": _arguments(("DPOTrainer",), loss_type="ipo"),
    "`precompute_ref_log_probs=True`": _arguments(
        ("DPOTrainer",), precompute_ref_log_probs=True
    ),
    "`num_iterations=2`": _arguments(("GRPOTrainer",), num_iterations=2),
    "`loss_type='grpo'`": _arguments(("GRPOTrainer",), loss_type="grpo"),
}  # fmt: skip
"""Settings that people's scripts have, with ``TopLoss``, ``PassRateBand`` or ``TARS``."""


class Table:
    """One table of the page: its cells are tried when it is made.

    Args:
        corner: Heading of the first column.
        rows: By name the cases, by host.
        hosts: The columns.
        run: Tries a case, :func:`onlinesel.recipes._capability_hosts.probe`.

    Attributes:
        refusals: Host, row and words of every refusal.
    """

    def __init__(
        self, corner: str, rows: Mapping[str, Cells], hosts: Sequence[str], run: Probe = probe
    ) -> None:
        self.refusals: list[tuple[str, str, str]] = []
        self._lines = [f"| {corner} | {' | '.join(hosts)} |", f"|---|{'---|' * len(hosts)}"]
        for name, cells in rows.items():
            words = [self._cell(name, host, cells.get(host), run) for host in hosts]
            self._lines.append(f"| {name} | {' | '.join(words)} |")

    def _cell(self, name: str, host: str, case: Case | None, run: Probe) -> str:
        if case is None:
            return "-"
        refusal = run(host, case)
        if refusal is None:
            return "yes"
        self.refusals.append((host, name, refusal))
        return "refused"

    def __str__(self) -> str:
        lines = [*self._lines, *([""] if self.refusals else [])]
        lines += [f"- {host}, {name}: *{words}*" for host, name, words in self.refusals]
        return "\n".join(lines)


def tables(run: Probe = probe) -> str:
    """Try everything, and return the tables.

    Example:
        >>> "| TopLoss | yes | yes | yes |" in tables(lambda host, case: None)
        True
    """
    parts = (
        ("Row methods", "method", METHODS, _ROW_HOSTS),
        ("Reinforcement learning", "part", PARTS, ("GRPOTrainer",)),
        ("Settings", "setting", FEATURES, _ALL_HOSTS),
    )
    return "\n\n".join(
        f"## {title}\n\n{Table(corner, rows, hosts, run)}" for title, corner, rows, hosts in parts
    )


def filled(text: str, made: str) -> str:
    """Return a page with these tables in it.

    Raises:
        ValueError: The page has no place for them.

    Example:
        >>> filled("<!-- capabilities -->\\nold\\n<!-- end -->", "new")
        '<!-- capabilities -->\\nnew\\n<!-- end -->'
    """
    if not _BLOCK.search(text):
        raise ValueError(
            "capabilities: the page must hold `<!-- capabilities -->` and `<!-- end -->`, got "
            "neither. Write both where the tables are to be."
        )
    return _BLOCK.sub(lambda match: f"{match[1]}{made}\n{match[2]}", text)


def quiet() -> None:
    """Silence what the hosts say about each of some hundred tiny runs."""
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables into a page."""
    quiet()
    (page,) = map(Path, sys.argv[1:] if argv is None else argv)
    page.write_text(filled(page.read_text("utf-8"), tables()), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
