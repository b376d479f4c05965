"""Online selection in the Hugging Face Trainer and TRL's SFTTrainer.

The way of a step through this room:

1. ``attach``: the callback; refuses what it cannot do exactly (``checks``), wraps the trainer's
   methods, decides at every step, and puts them back;
2. ``order``, ``columns``, ``data``: which rows the trainer loads, which of their columns ride in
   the batches, and where in its data a run stands;
3. ``batches``: its batches as columns of rows, and back in the structure that its collator gave;
4. ``fused``: scores where the trainer's head is fused;
5. ``loss``, ``loss_check``: row weights inside the trainer's own loss, and whether it takes them;
6. ``observed``: the losses of the rows that trained, for methods and mixtures that learn from them;
7. ``state``: what a checkpoint holds.
"""

from onlinesel.callbacks.hf.attach import OnlineSelection

__all__ = [
    "OnlineSelection",
]
