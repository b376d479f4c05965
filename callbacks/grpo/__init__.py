"""Online selection in TRL's GRPOTrainer: which problems, which groups, which tokens.

The way of a generation batch through this room:

1. ``attach``: the callback; wraps the trainer's methods (``seams``), refuses what it cannot do
   exactly (``checks``), and puts them back;
2. ``order``, ``prompts``: problems are dealt in the loader's order, or by a sampler, which may know
   their embeddings (``embed``, kept by ``cache``);
3. ``generate``: the trainer generates for them, images included (``images``);
4. ``rewards``, ``outcomes``: errors of reward functions reach all ranks; rewards become right or
   wrong;
5. ``decide``: which groups train, which completions of them, and whether to generate again;
6. ``assemble``: as many rows (``rows``) on every rank, and their advantages;
7. ``loss``, ``tokens``, ``head``: what each micro-batch and each token counts;
8. ``meter``, ``watch``, ``state``: what is logged, warned of, and saved.
"""

from onlinesel.callbacks.grpo.attach import RolloutSelection

__all__ = [
    "RolloutSelection",
]
