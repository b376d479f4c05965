"""Where the scoring forward is not the training forward, ``reuse_forward`` is refused."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

from onlinesel import Signals
from onlinesel.bench._measure import CountedProducts
from onlinesel.callbacks._shared.reuse import SOURCE, ReusedForward
from onlinesel.callbacks.hf import OnlineSelection
from onlinesel.strategies import TopLoss
from tests.callbacks.hosts import (
    arguments,
    attach,
    checkpointed,
    collate,
    make_model,
    make_rows,
    make_sft_trainer,
    make_trainer,
)
from tests.counting import Operations

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


def lora_with_dropout() -> Any:
    return get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"], lora_dropout=0.05))


def router() -> Any:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_local_experts": 2}
    depth = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    return MixtralForCausalLM(MixtralConfig(**sizes, **depth, output_router_logits=True))


def normalised() -> Any:
    model = make_model()
    model.model.layers[0].extra = nn.BatchNorm1d(4)
    return model


def scorer(model: Any, batch: Any) -> Signals:
    return Signals(loss=torch.zeros(2))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            {"gradient_checkpointing": False},
            {},
            "reuse_forward: gradient_checkpointing must be on, got False",
        ),
        (
            {"model": make_model(attention_dropout=0.1)},
            {},
            r"got .*self_attn.attention_dropout=0.1",
        ),
        ({"model": lora_with_dropout()}, {}, r"got .*lora_dropout.default with p=0.05"),
        (
            {"model": normalised()},
            {},
            "batch statistics and rotations .*, got BatchNorm1d",
        ),
        ({"model": make_model(rope_parameters=DYNAMIC)}, {}, "model.rotary_emb of type dynamic"),
        ({"model": router()}, {}, "output_router_logits must be off, got True"),
        ({"neftune_noise_alpha": 5.0}, {}, "neftune_noise_alpha must be None, got 5.0"),
        ({}, {"shadow": True}, "shadow must be off, got True"),
        ({}, {"score": scorer}, "score must be None, got function"),
        ({}, {"reuse_limit": 0.0}, "reuse_limit must be positive, and None without"),
        (
            {},
            {"reuse_limit": 1.0, "reuse_forward": False},
            "reuse_limit must be positive, and None wi",
        ),
    ],
)
def test_refused_before_the_first_step(
    tmp_path: Path, changes: Any, options: Any, message: str
) -> None:
    trainer = make_trainer(tmp_path, **{"gradient_checkpointing": True, **changes})
    before = dict(trainer.__dict__)
    with pytest.raises(ValueError, match=message):
        OnlineSelection(trainer, TopLoss(), **{"reuse_forward": True, **options})
    assert trainer.__dict__ == before


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=3)}, "ZeRO stage must be at most 2"),
        ({"fsdp_plugin": SimpleNamespace(fsdp_version=1)}, "fsdp_version must be 2, got 1"),
    ],
    ids=["zero3", "fsdp1"],
)
def test_engines_that_gather_module_by_module_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugin: Any, message: str
) -> None:
    trainer = make_trainer(tmp_path, gradient_checkpointing=True)
    state = SimpleNamespace(**{"deepspeed_plugin": None, **plugin})
    monkeypatch.setattr(type(trainer.accelerator), "state", state, raising=False)
    monkeypatch.setattr(trainer.accelerator, "state", state)
    with pytest.raises(ValueError, match=message):
        OnlineSelection(trainer, TopLoss(), reuse_forward=True)


def test_parts_of_layers_that_are_sharded_alone_are_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = make_model()
        checkpointed(model)
        fully_shard(model.model.layers[1].mlp, mesh=init_device_mesh("cpu", (1,)))
        reuse, batch = ReusedForward(model), {"input_ids": torch.ones(1, 2, dtype=torch.long)}
        reuse.mark([batch])
        with pytest.raises(
            ValueError, match="FSDP must be one that shards whole layers, got parts"
        ):
            with reuse.scoring(batch):
                pass
    finally:
        dist.destroy_process_group()


def test_activation_offloading_is_refused(tmp_path: Path) -> None:
    trainer = make_sft_trainer(tmp_path, gradient_checkpointing=True)
    trainer.args.activation_offloading = True
    with pytest.raises(ValueError, match="activation_offloading must be off, got True"):
        OnlineSelection(trainer, TopLoss(), reuse_forward=True)


def test_a_model_without_checkpointing_layers_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, gradient_checkpointing=True)
    trainer.model.model.layers = nn.ModuleList()
    with pytest.raises(ValueError, match="model must be made of transformers' checkpointing lay"):
        OnlineSelection(trainer, TopLoss(), reuse_forward=True)


def train(folder: Path, change: Any) -> None:
    trainer = make_trainer(folder, gradient_checkpointing=True)
    attach(trainer, TopLoss(), candidates=3, reuse_forward=True)
    change(trainer.model)
    trainer.train()


def replace_call(model: Any, output: Any = None, **more: Any) -> None:
    """Let the first layer take or give something else than hidden states."""
    layer = model.model.layers[0]
    if output is not None:
        forward = layer.forward
        layer.forward = lambda *args, **kwargs: output(forward(*args, **kwargs))
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, **more}), with_kwargs=True
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: replace_call(m, shared={}), "got LlamaDecoderLayer that takes a dict"),
        (lambda m: replace_call(m, lambda x: (x,)), "got LlamaDecoderLayer that gives a tuple"),
        (lambda m: replace_call(m, lambda x: x[:, 1:]), r"that gives \(6, \d+, 32\) for \(6, \d+"),
    ],
    ids=["state", "tuple", "width"],
)
def test_layers_with_state_of_the_batch_are_refused(
    tmp_path: Path, change: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(tmp_path, change)


def test_layers_that_are_called_otherwise_in_training_are_refused(tmp_path: Path) -> None:
    def skip_last(model: Any) -> None:
        whole = model.model.config.num_hidden_layers

        def shorten(module: Any, args: Any) -> None:
            module.config.num_hidden_layers = whole - int(torch.is_grad_enabled())

        model.model.register_forward_pre_hook(shorten)

    with pytest.raises(ValueError, match=r"as often as in the scoring forward \(2 times\).*got 1"):
        train(tmp_path, skip_last)


@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "in-a-tuple"])
def test_a_keyword_with_gradient_is_refused(tmp_path: Path, wrapped: bool) -> None:
    def change(model: Any) -> None:
        bias = nn.Parameter(torch.zeros(1))
        model.model.layers[0].bias = bias
        replace_call(model, extra=(bias, 1) if wrapped else bias)

    with pytest.raises(
        ValueError, match="given what needs gradients by position, got the keyword extra"
    ):
        train(tmp_path, change)


def test_batches_without_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"batches must be made of tokens, got \['pixels'\]"):
        ReusedForward(make_model()).mark([{"pixels": torch.zeros(2, 3)}])


def test_numbers_of_tokens_differ_between_micro_batches() -> None:
    batches: list[dict[str, Tensor]] = [{"input_ids": torch.zeros(2, n)} for n in (3, 5)]
    ReusedForward(make_model()).mark(batches)
    numbers = torch.cat([batch[SOURCE].flatten() for batch in batches])
    assert numbers.unique().numel() == 16 and int(numbers.min()) > 2**39


def test_nested_and_compiled_layers_are_refused(tmp_path: Path) -> None:
    def nest(model: Any) -> None:
        model.model.layers[0].inner = model.model.layers[1]

    with pytest.raises(ValueError, match="must be side by side, got some inside of LlamaDecoderLa"):
        train(tmp_path, nest)
    model = make_model()
    model.model.layers[1].mlp._compiled_call_impl = lambda x: x  # what compile() leaves
    with pytest.raises(ValueError, match="one that is not compiled, got model.layers.1.mlp"):
        ReusedForward(model)
    outer = type(
        "OptimizedModule", (nn.Module,), {}
    )()  # torch.compile's, by whose name it is known
    with pytest.raises(ValueError, match="one that is not compiled, got LlamaForCausalLM"):
        ReusedForward(make_model(), outer=outer)


def test_what_is_held_is_let_go_after_an_error(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, gradient_checkpointing=True)
    callback = attach(trainer, TopLoss(), candidates=3, reuse_forward=True)
    held = []

    def fail(module: Any, args: Any, output: Any) -> None:
        held.append(callback._reuse._candidates[0].outputs)
        raise MemoryError("no more")

    trainer.model.model.norm.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        trainer.train()
    assert len(held[0]) == 2 and callback._reuse is not None and not callback._reuse._candidates


def test_a_trainer_that_makes_its_model_itself(tmp_path: Path) -> None:
    args = TrainingArguments(**arguments(tmp_path, gradient_checkpointing=True, max_steps=2))
    trainer = Trainer(
        args=args, model_init=lambda: make_model(), train_dataset=make_rows(), data_collator=collate
    )
    attach(trainer, TopLoss(), candidates=3, reuse_forward=True)
    before = trainer.model
    trainer.train()
    assert trainer.model is not before
    assert trainer.state.log_history[0]["selection/reused_share"] == 1.0


def test_the_import_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.modeling_layers", None)
    monkeypatch.delitem(sys.modules, "onlinesel.callbacks._shared.reuse")
    with pytest.raises(ImportError, match=r'reuse_forward needs transformers: pip install "onlin'):
        importlib.import_module("onlinesel.callbacks._shared.reuse")


def test_detaching_leaves_the_layers_as_they_were(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, gradient_checkpointing=True)
    callback = attach(trainer, TopLoss(), candidates=3, reuse_forward=True)
    trainer.train()
    callback.detach()
    for layer in trainer.model.model.layers:
        assert not layer._forward_hooks and layer._gradient_checkpointing_func.func is not None
        assert "checkpoint" in layer._gradient_checkpointing_func.func.__name__


def test_a_step_is_less_work_than_with_scoring_apart(tmp_path: Path) -> None:
    """Keeping a quarter, forwards say 7 of 8, and a little more with the head, which is not
    recomputed, and the questions of the first step. What holding outputs adds must not eat it up:
    fewer operations, on fewer elements.
    """

    def run(reuse: bool) -> tuple[int, Counter[str]]:
        tokens = torch.randint(1, 64, (32, 64), generator=torch.Generator().manual_seed(0))
        rows = [{"input_ids": row, "labels": row} for row in tokens.tolist()]
        trainer = make_trainer(tmp_path, rows=rows, max_steps=4, gradient_checkpointing=True)
        attach(trainer, TopLoss(), candidates=4, reuse_forward=reuse)
        seen: Counter[str] = Counter()
        with CountedProducts() as products, Operations(seen):
            trainer.train()
        return products.flops, seen

    (reused, seen), (apart, wanted) = run(True), run(False)
    assert 0.8 < reused / apart < 0.91
    assert seen["operations"] < wanted["operations"]
    assert seen["elements"] < 0.95 * wanted["elements"]
