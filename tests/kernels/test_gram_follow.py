"""HeadGram.follow over the optimizers and wrappers that people train with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from onlinesel.kernels import HeadGram, LMHead
from onlinesel.scoring import CausalLMScorer
from tests.callbacks.hosts import collate, make_model, make_rows
from tests.kernels.made_heads import in_memory
from tests.kernels.test_lm_head import build

Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "plain": lambda p: AdamW(p, lr=0.1, foreach=False),
    "foreach": lambda p: AdamW(p, lr=0.1, foreach=True),
    "fused": lambda p: AdamW(p, lr=0.1, fused=True),
}


def model() -> Any:
    torch.manual_seed(0)
    layer = nn.Linear(6, 30)
    return SimpleNamespace(get_output_embeddings=lambda: layer, parameters=layer.parameters)


def push(parameters: Any, size: float = 1.0) -> None:
    for p in parameters:
        p.grad = size * torch.linspace(-1, 2, p.numel()).reshape(p.shape)


def is_fresh(gram: HeadGram, head: LMHead) -> bool:
    true = HeadGram(head).root()
    return torch.allclose(gram.root(), true, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_implementation_of_a_step(name: str) -> None:
    scored = model()
    weight = scored.get_output_embeddings().weight
    head = LMHead.from_model(scored)
    gram, optimizer = HeadGram(head), OPTIMIZERS[name](scored.parameters())
    gram.follow(optimizer, every=2)
    found, versions = [is_fresh(gram, head)], [weight._version]
    for _ in range(5):
        push(scored.parameters())
        optimizer.step()
        found.append(is_fresh(gram, head))
        versions.append(weight._version)
    assert found == [True, False, True, False, True, False]
    # Why it follows the optimizer: a fused step cannot be seen on the weight itself.
    assert (len(set(versions)) == 1) == (name == "fused")


@pytest.fixture
def accelerate() -> Iterator[Any]:
    """State is shared by all accelerators of a process: neither take nor leave any."""
    module = pytest.importorskip("accelerate")

    def forget() -> None:
        module.state.GradientState._reset_state()
        module.state.AcceleratorState._reset_state(True)

    forget()
    yield module
    forget()


def test_the_wrapper_of_accelerate_counts_steps_and_not_calls(accelerate: Any) -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    layer = nn.Linear(6, 30)
    layer, optimizer = accelerator.prepare(layer, AdamW(layer.parameters(), lr=0.1))
    scored = SimpleNamespace(get_output_embeddings=lambda: layer)
    gram, found = HeadGram(LMHead.from_model(scored)), []
    handle = gram.follow(optimizer, every=1)
    for _ in range(4):
        gram.root()
        with accelerator.accumulate(layer):
            push(layer.parameters())
            optimizer.step()
        found.append(is_fresh(gram, LMHead.from_model(scored)))
    assert found == [True, True, True, True]
    before = gram._root
    with accelerator.accumulate(layer):
        optimizer.step()  # between two steps of the optimizer itself
    assert gram._root is before
    handle.remove()
    with accelerator.accumulate(layer):
        push(layer.parameters())
        optimizer.step()
    assert gram._root is before and not is_fresh(gram, LMHead.from_model(scored))


def test_a_step_that_a_scaler_skips_does_not_count() -> None:
    scored = model()
    gram = HeadGram(LMHead.from_model(scored))
    optimizer = SGD(scored.parameters(), lr=0.1)
    gram.follow(optimizer, every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for size, forgets in ((float("inf"), False), (1.0, True)):
        root = gram.root()
        scaler.scale(torch.ones(()))  # a scaler scales before it steps
        push(scored.parameters(), size)
        scaler.step(optimizer)
        scaler.update()
        assert (gram.root() is not root) == forgets


def test_wrappers_are_opened_to_the_innermost() -> None:
    scored = model()
    gram, inner = HeadGram(LMHead.from_model(scored)), SGD(scored.parameters(), lr=0.1)
    gram.follow(SimpleNamespace(optimizer=SimpleNamespace(optimizer=inner)), every=1)
    root = gram.root()
    push(scored.parameters())
    inner.step()
    assert gram.root() is not root


@pytest.mark.parametrize("wrong", [SimpleNamespace(), SimpleNamespace(optimizer=None)])
def test_what_is_no_optimizer_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=(
        "HeadGram.follow: optimizer must be one of torch, or keep one as .optimizer, got "
        r"SimpleNamespace. Call invalidate\(\) after its steps."
    )):  # fmt: skip
        HeadGram(LMHead(torch.eye(2))).follow(wrong)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_adapters_are_followed_over_a_kept_base(name: str) -> None:
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    adapted = peft.get_peft_model(build("Llama"), options)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 2
    head = LMHead.from_model(adapted)
    gram, optimizer = HeadGram(head), OPTIMIZERS[name](trained)
    gram.follow(optimizer, every=1)
    kept = []
    for _ in range(3):
        root, weight = gram.root().double(), in_memory(head, torch.float64).weight
        true = weight.T @ weight
        assert float((root.T @ root - true).norm() / true.norm()) < 1e-6
        kept.append(gram._base)
        push(trained)
        optimizer.step()
    assert kept[0] is not None and torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])


def test_a_scorer_renews_fold_and_gram_together() -> None:
    scored, batch = make_model().eval(), collate(make_rows(3))
    options = {"vocab_dim": 8, "time_dim": 2}
    scorer = CausalLMScorer(("nuclear_norm", "embedding"), projector=options, refresh_every=2)
    first, factors = scorer(scored, batch), []
    scored.lm_head.weight.data.mul_(3.0)  # all that is linear in the head triples
    for _ in range(3):
        found = scorer(scored, batch)
        factors.append((
            float((found.nuclear_norm / first.nuclear_norm).mean()),
            float(found.embedding.norm() / first.embedding.norm()),
        ))  # fmt: skip
        scorer.advance()
    assert [pytest.approx(pair, rel=1e-4) for pair in factors] == [(1, 1), (1, 1), (3, 3)]
