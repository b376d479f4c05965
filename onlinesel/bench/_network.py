"""How long collectives take: the alpha-beta model of messages, on nodes of several GPUs.

A message of ``b`` bytes takes ``alpha + b / beta``. Hops within a node and between nodes have each
their own. The counts of hops are those by which NCCL itself predicts its times (``src/graph/
tuning.cc``), and so are the default latencies: those of its low-latency protocol, by which it sends
small messages, and a quarter of the bandwidth of a link, which is what that protocol leaves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Network"]


@dataclass(frozen=True)
class Network:
    """A cluster of equal nodes.

    Args:
        gpus: GPUs (ranks) of a node.
        alpha_intra: Seconds a hop within a node takes, however little it carries.
        alpha_inter: The same between nodes.
        beta_intra: Bytes a second within a node.
        beta_inter: Bytes a second of one rank to another node.
        start: Seconds that every collective costs before its first hop: the launch, and waiting for
            what it brought to be on the CPU.
        gather: ``"ring"``: the time of an all-gather grows with the ranks, as NCCL's does;
            ``"tree"``: with their logarithm, as recursive doubling's.

    Raises:
        ValueError: An unknown way to gather.

    Example:
        >>> network = Network()
        >>> round(network.all_gather(1024, 64) * 1e3, 1)  # milliseconds, 64 bytes from each rank
        1.6
        >>> round(network.all_reduce(1024, 8) * 1e3, 2)
        0.11
    """

    gpus: int = 8
    alpha_intra: float = 1e-6
    alpha_inter: float = 5e-6
    beta_intra: float = 50e9
    beta_inter: float = 10e9
    start: float = 30e-6
    gather: str = "ring"

    def __post_init__(self) -> None:
        if self.gather not in ("ring", "tree"):
            raise ValueError(
                f"Network: gather must be 'ring' or 'tree', got {self.gather!r}. NCCL uses a ring."
            )

    def _hops(self, ranks: int) -> tuple[int, int]:
        """Return ranks of a node beside oneself, and nodes beside one's own."""
        return min(self.gpus, ranks) - 1, -(-ranks // self.gpus) - 1

    def _beta(self, ranks: int) -> float:
        return self.beta_inter if ranks > self.gpus else self.beta_intra

    def all_gather(self, ranks: int, sent: float) -> float:
        """Return the seconds in which all ranks get the ``sent`` bytes of each."""
        if ranks == 1:
            return 0.0
        inside, nodes = self._hops(ranks)
        if self.gather == "ring":
            hops = (ranks - 1 - nodes) * self.alpha_intra + nodes * self.alpha_inter
        else:
            hops = math.ceil(math.log2(inside + 1)) * self.alpha_intra
            hops += math.ceil(math.log2(nodes + 1)) * self.alpha_inter
        return self.start + hops + (ranks - 1) * sent / self._beta(ranks)

    def all_reduce(self, ranks: int, sent: float) -> float:
        """Return the seconds in which ``sent`` bytes are reduced: up a tree of nodes, and down."""
        if ranks == 1:
            return 0.0
        inside, nodes = self._hops(ranks)
        hops = inside * self.alpha_intra + math.ceil(math.log2(nodes + 1)) * self.alpha_inter
        return self.start + 2 * (hops + sent / self._beta(ranks))

    def all_to_all(self, ranks: int, messages: int, sent: float) -> float:
        """Return the seconds that the busiest rank needs.

        Args:
            ranks: Number of ranks.
            messages: Ranks to which, or from which, it has something; nothing is sent else.
            sent: Bytes of it all; all of it is taken to cross nodes.
        """
        if ranks == 1 or not messages:
            return 0.0
        alpha = self.alpha_inter if ranks > self.gpus else self.alpha_intra
        return self.start + messages * alpha + sent / self._beta(ranks)
