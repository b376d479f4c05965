"""Online selection in a loop of your own: plain PyTorch, Accelerate, DDP, FSDP2, DeepSpeed.

``iterate`` gives one item per optimizer step, as ``steps``; candidates and plans come from
``onlinesel.callbacks._shared.source``.
"""

from onlinesel.callbacks.loop.iterate import MicroBatch, Step, Steps, steps

__all__ = [
    "MicroBatch",
    "Step",
    "Steps",
    "steps",
]
