"""Make one generation batch that is worth training on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from onlinesel.callbacks.grpo.assemble import assemble, carry, final_advantages
from onlinesel.callbacks.grpo.decide import Filled, Filler, Round
from onlinesel.callbacks.grpo.images import media_of
from onlinesel.callbacks.grpo.order import LoaderOrder
from onlinesel.callbacks.grpo.rows import ROWS, TRAINS, Rows, check_text, loss_mask
from onlinesel.callbacks.grpo.tokens import TokenTerm
from onlinesel.callbacks.grpo.watch import Watch
from onlinesel.data.rows import ROW_ID
from onlinesel.parallel.distributed import check_agreement, rank, world_size
from onlinesel.rl.prompts import PromptPool
from onlinesel.selector import Selector

__all__ = ["BatchMaker"]


class BatchMaker:
    """Choose problems, generate, choose groups, and put the final batch together.

    Args:
        trainer: A GRPO trainer.
        parts: The callback's parts by the name of their argument.
        tokens: What the tokens count.
        generate: The trainer's own ``_generate_and_score_completions``.
        log_probs: The trainer's own ``_get_per_token_logps_and_entropies``.
        pool: Chooses the problems; None takes the loader's.
        order: Deals out the loader's problems, where there is a refill and no pool; else None.
        seed: Of every choice.
    """

    def __init__(
        self,
        trainer: Any,
        parts: Mapping[str, Any],
        tokens: TokenTerm,
        *,
        generate: Callable[..., Any],
        log_probs: Callable[..., Any],
        pool: PromptPool | None,
        order: LoaderOrder | None,
        seed: int,
    ) -> None:
        self.trainer, self.parts, self.tokens = trainer, parts, tokens
        self.scored: tuple[Tensor, Tensor] | None = None
        """Rewards and outcome of the last generation call, over all ranks; the callback puts them
        here."""
        self._call, self._log_probs = generate, log_probs
        self._incoming: list[dict[str, Any]] = []
        self._compares = False
        size = trainer.num_generations
        choosers = {name: parts[name] for name in ("gate", "rollouts")}
        self.filler = Filler(
            self._generate,
            **{n: None if s is None else Selector(s, seed=seed) for n, s in choosers.items()},
            refill=parts["refill"],
            pool=pool,
            order=order,
            generations=size,
            groups=trainer.args.generation_batch_size // size,
            ranks=world_size(),
            seed=seed,
        )
        self.watch = Watch(parts["gate"] is not None, self.filler.refill.patience)

    def make(self, inputs: list[dict[str, Any]], step: int) -> tuple[dict[str, Any], Filled]:
        """Return this rank's part of a generation batch, and how it came about.

        Args:
            inputs: The loader's rows.
            step: Optimizer steps done.
        """
        self._incoming = inputs
        order = self.filler.order
        if order is not None:
            self._compares = not order.drawn and step == 0
            order.begin(step)
        filled = self.filler.fill(step)
        if self.parts["gate"] is not None or self.parts["rollouts"] is not None:
            for batch in filled.batches:
                check_text(batch)
        made = self._assembled(filled)
        if filled.leftover and self.filler.refill.leftover == "carry":
            self.filler.carried = carry(filled, self.trainer._tokenizer.pad_token_id)
        return made, filled

    def _generate(self, ids: Tensor | None) -> Round:
        """Make one generation call, for the loader's rows or for these problems."""
        if ids is not None:
            check_agreement("RolloutSelection", ids, device=self.trainer.accelerator.device)
        rows = self._incoming if ids is None else self._fetch(ids)
        if self._compares and self.filler.order is not None:
            self.filler.order.check(self._incoming, rows)
        self._compares = False
        numbers = [int(row.get(ROW_ID, -1)) for row in rows]
        rows = [{k: v for k, v in row.items() if k != ROW_ID} for row in rows]
        with self.tokens.sampling():
            batch = self._call(rows)
            self.tokens.label(batch)
        assert self.scored is not None
        (rewards, outcome), self.scored = self.scored, None
        lengths = loss_mask(batch).sum(dim=1)
        facts = torch.stack([torch.tensor(numbers).to(lengths), lengths], dim=1)
        prompts, counts = self.trainer.accelerator.gather(facts).cpu().unbind(dim=1)
        return Round(batch, rewards.float().cpu(), outcome, prompts, counts)

    def _fetch(self, ids: Tensor) -> list[dict[str, Any]]:
        """Return this rank's rows of the data set: every problem as often as a group is large."""
        repeated = ids.repeat_interleave(self.trainer.num_generations).tolist()
        share = len(repeated) // world_size()
        mine, order = repeated[rank() * share : (rank() + 1) * share], self.filler.order
        if order is not None:
            return [order.row(i) for i in mine]
        dataset = self.trainer.train_dataset
        return [{**dataset[i], ROW_ID: i} for i in mine]

    def _assembled(self, filled: Filled) -> dict[str, Any]:
        """Put the final rows, their advantages and their number of tokens into a batch."""
        trainer, first = self.trainer, filled.batches[0]
        rows, where = assemble(
            filled,
            slices=trainer.args.steps_per_generation,
            pad_id=trainer._tokenizer.pad_token_id,
            multiple=trainer.pad_to_multiple_of,
        )
        media = media_of(first, self._log_probs)  # rows of images are as the trainer made them
        own = self.tokens.measure(self._log_probs, rows, self._gather, media)
        scores = None if own is None else self._scattered(own, where)
        values = final_advantages(filled.groups, trainer, self.parts["advantages"], scores)
        self.watch.saw(filled, values)
        if len(where) * world_size() != len(values):
            rows[TRAINS], rows[ROWS] = where >= 0, torch.tensor(len(values))
        if self._as_it_was(filled, rows):
            rows["advantages"] = first["advantages"]  # on a GPU the last bit may differ from ours
        else:
            mine = torch.cat([values, values.new_zeros(1)])[where]  # -1, a muted row, is the zero
            rows["advantages"] = mine.to(first["advantages"])
        tokens = sum(int(group.lengths.sum()) for group in filled.groups)
        items = torch.full_like(first["num_items_in_batch"], tokens)
        return {**first, **rows, "num_items_in_batch": items}

    def _as_it_was(self, filled: Filled, rows: Rows) -> bool:
        """Return whether the batch is what the trainer made, and its advantages are wanted."""
        untouched = rows["prompt_ids"] is filled.batches[0]["prompt_ids"]
        weighed = any(bool((group.weights != 1).any()) for group in filled.groups)
        return self.parts["advantages"] is None and untouched and not weighed

    def _scattered(self, own: Tensor, where: Tensor) -> Tensor:
        """Return the values of all ``K`` final rows from those of each rank's own."""
        gather = self.trainer.accelerator.gather
        at, values = gather(where.to(own.device)).cpu(), gather(own).cpu()
        result = torch.zeros(max(int(at.max()) + 1, 0))
        result[at[at >= 0]] = values[at >= 0]
        return result

    def _gather(self, values: Tensor) -> Tensor:
        """Concatenate non-negative values of all ranks, of which each may have another number."""
        padded = self.trainer.accelerator.pad_across_processes(values, dim=0, pad_index=-1)
        whole = self.trainer.accelerator.gather(padded)
        return whole[whole >= 0]
