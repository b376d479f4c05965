"""Online selection in a loop of your own: plain PyTorch, Accelerate, DDP, FSDP2, DeepSpeed.

``steps`` gives one item per optimizer step; candidates and plans come from
``onlinesel.callbacks._shared.source``.
"""

from onlinesel.callbacks.loop.steps import MicroBatch, Step, Steps, steps

__all__ = [
    "MicroBatch",
    "Step",
    "Steps",
    "steps",
]
