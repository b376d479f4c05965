"""Run by torchrun on two processes: heads of which each rank holds half of the rows.

Prints a line for each case that holds; the test counts them.
"""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from onlinesel.kernels import HeadGram, JLProjector, LMHead, VocabShard, token_scores
from onlinesel.scoring import CausalLMScorer
from tests.callbacks.hosts import collate, make_model, make_rows
from tests.kernels.no_logits import LargestTensor
from tests.launching import leave

VOCAB = 65  # not divisible by two: one rank holds 33 rows, the other 32
NEEDS = ("loss", "entropy", "el2n", "nuclear_norm", "embedding")
OPTIONS = {"projector": {"vocab_dim": 8, "time_dim": 2, "scale": "unit"}}


def batch() -> dict[str, torch.Tensor]:
    return collate(make_rows(10)[dist.get_rank() :: 2])


def scored(tied: bool, apart: bool, mesh: Any) -> None:
    """Scores of a sharded model are those of the whole one, before and after a step."""
    model = make_model(vocab_size=VOCAB, tie_word_embeddings=tied)
    alone = copy.deepcopy(model)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if apart:  # a head of its own is sharded again as soon as it has been used
        fully_shard(model.lm_head, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert model.lm_head.weight.to_local().shape[0] == (33, 32)[dist.get_rank()]
    scorers = [CausalLMScorer(NEEDS, **OPTIONS) for _ in range(2)]
    for step in range(2):
        found, expected = (s(m, batch()) for s, m in zip(scorers, (model, alone), strict=True))
        for name in NEEDS:
            ours, theirs = getattr(found, name), getattr(expected, name)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=f"{name} {step}")
        # One step of plain descent on a loss that is the same on both ranks.
        for m in (model, alone):
            whole = collate(make_rows(4))
            m.train()(**whole, use_cache=False).loss.backward()
            torch.optim.SGD(m.parameters(), lr=0.5).step()
            m.zero_grad()
        for scorer in scorers:
            scorer.advance()
    assert all(isinstance(p, DTensor) for p in model.parameters())
    same(f"scored tied={tied} apart={apart}")


class Biased(nn.Module):
    def __init__(self, vocab: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.lm_head = nn.Linear(32, vocab, dtype=torch.float64)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.lm_head(states)


def reduced(vocab: int, mesh: Any) -> None:
    """W^T W and W^T P come from each rank's own rows; no rank builds the head."""
    model = Biased(vocab)
    projector = JLProjector(vocab, 16, vocab_dim=4, time_dim=2)
    plain = LMHead.from_model(model)
    expected = HeadGram(plain).root(), projector.fold(plain)
    fully_shard(model, mesh=mesh)
    head = LMHead.from_model(model, sharded=True)
    assert isinstance(head.weight, DTensor)
    with LargestTensor() as largest:
        root, folded = HeadGram(head).root(), projector.fold(head)
    if vocab > 100:
        assert largest.numel <= (vocab + 1) // 2 * 33, largest.numel
    for ours, theirs in ((root.T @ root, expected[0].T @ expected[0]), (folded, expected[1])):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-12
    assert torch.equal(LMHead.from_model(model).weight, plain.weight)
    assert torch.equal(head.whole().weight, plain.weight)
    for use in (lambda: head.logits(torch.ones(1, 32)), lambda: head.part(0, 1, torch.float32)):
        with pytest.raises(TypeError, match="LMHead: weight must be whole where logits are made"):
            use()
    same(f"reduced {vocab}")


def adapted(vocab: int, mesh: Any) -> None:
    """Under adapters, whose factors are sharded too, each rank works on its rows of the base."""
    model = Biased(vocab)
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, lora_alpha=6, target_modules=["lm_head"], init_lora_weights=False),
        model,
    )
    model.double()
    projector = JLProjector(vocab, 16, vocab_dim=4, time_dim=2)
    plain = LMHead.from_model(model)
    expected = HeadGram(plain).root(), projector.fold(plain)
    fully_shard(model, mesh=mesh)
    with LargestTensor() as largest:
        head = LMHead.from_model(model, sharded=True)
        gram = HeadGram(head)
        root, folded = gram.root(), projector.fold(head)
    assert isinstance(head.base, DTensor) and head.frozen
    if vocab > 100:
        assert largest.numel <= (vocab + 1) // 2 * 35, (largest.numel, largest.where)
    for ours, theirs in ((root.T @ root, expected[0].T @ expected[0]), (folded, expected[1])):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-12
    gram.invalidate()
    torch.testing.assert_close(gram.root(), root)
    states = torch.ones(1, 32).double()
    torch.testing.assert_close(head.whole().logits(states), plain.logits(states))
    with pytest.raises(TypeError, match="LMHead: weight must be whole where logits are made"):
        token_scores(states, head, torch.tensor([0]))
    same(f"adapted {vocab}")


def followed(mesh: Any) -> None:
    """The Gram matrix of a sharded weight follows the steps that its own shards take."""
    for options in ({"foreach": True}, {"fused": True}, {"foreach": False}):
        model = Biased(65)
        fully_shard(model, mesh=mesh)
        head = LMHead.from_model(model, sharded=True)
        gram = HeadGram(head)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
        gram.follow(optimizer, every=2)
        found = []
        for _ in range(5):
            weight = LMHead.from_model(model)
            true, root = HeadGram(weight).root(), gram.root()
            found.append(torch.allclose(root, true, rtol=1e-9, atol=1e-9))
            model(torch.ones(1, 32).double()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert found == [True, False, True, False, True], (options, found)
    same("followed")


def cut_otherwise(mesh: Any) -> None:
    """A weight that is cut by columns, or not cut, gives the same through the whole one."""
    weight = torch.randn(65, 32, generator=torch.Generator().manual_seed(2))
    expected = HeadGram(LMHead(weight)).root()
    for placement in (Shard(1), Replicate()):
        head = LMHead(distribute_tensor(weight, mesh, [placement]))
        torch.testing.assert_close(HeadGram(head).root(), expected)
    same("cut otherwise")


def scored_in_parts() -> None:
    """Each rank holds some entries of the vocabulary; all get the scores of the whole head."""
    g = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(65, 32, generator=g), torch.randn(65, generator=g)
    hidden, labels = torch.randn(2, 9, 32, generator=g), torch.randint(65, (2, 9), generator=g)
    labels[0, 3] = -100
    temperature = torch.rand(2, 9, generator=g) + 0.5
    rank = dist.get_rank()
    held = slice(0, 20) if rank == 0 else slice(20, 65)
    part = LMHead(weight[held], bias[held], 2.0, 6.0)
    whole = LMHead(weight, bias, 2.0, 6.0)
    expected = token_scores(hidden, whole, labels, temperature=temperature)
    for padded in (False, True):
        found = token_scores(
            hidden, part, labels, temperature=temperature, padded=padded,
            shard=VocabShard(held.start, 65),
        )  # fmt: skip
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    sums = [torch.empty(()) for _ in range(2)]
    assert found.nll is not None
    dist.all_gather(sums, found.nll.sum())
    assert torch.equal(sums[0], sums[1])  # to the bit
    same("scored in parts")


def same(case: str) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        print("same", case, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    two = init_device_mesh("cpu", (2,))
    for vocabulary in (1, 3, 65, 4097):
        reduced(vocabulary, two)
    for vocabulary in (3, 4097):
        adapted(vocabulary, two)
    followed(two)
    cut_otherwise(two)
    scored_in_parts()
    for ties, alone_sharded in ((False, False), (True, False), (False, True)):
        scored(ties, alone_sharded, two)
    leave()
