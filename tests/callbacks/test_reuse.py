"""With ``reuse_forward`` a row is forwarded once for its score and once more for its gradient."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    set_seed,
)

from onlinesel import When
from onlinesel.callbacks._shared.replay import Audit, HeldRows, Replay
from onlinesel.strategies import UDS, LossReweight, RHOLoss, TopLoss, Uniform
from tests.callbacks.hosts import (
    ASKED,
    attach,
    choices,
    collate,
    make_model,
    make_rows,
    make_sft_trainer,
    make_trainer,
    parameters,
    reference_gradient,
    relative_error,
)

FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 4}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"head_dim": 8, "sliding_window": 4}),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {"head_dim": 8, "sliding_window": 4}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4}),
}
LAYERS = 3


def build(family: str = "llama", attention: str = "sdpa", lora: bool = False) -> Any:
    set_seed(0)
    config, model, extra = FAMILIES[family]
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": LAYERS}
    built = model(config(**sizes, **heads, **extra, attn_implementation=attention))
    if lora:
        built = get_peft_model(built, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        for name, parameter in built.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return built


def watch(model: Any) -> dict[str, int]:
    """Count the rows that enter the attention and the MLP of each layer."""
    rows: dict[str, int] = {}

    def count(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        rows[name] = rows.get(name, 0) + states.shape[0]

    for name, module in model.named_modules():
        if name.endswith(("self_attn", ".mlp", "block_sparse_moe")):
            module.register_forward_pre_hook(partial(count, name), with_kwargs=True)
    return rows


def step(folder: Path, reuse: bool, **options: Any) -> tuple[dict[str, Any], dict[str, int], Any]:
    """Train; return how the parameters moved, the rows that were forwarded, and the trainer."""
    host, model = options.pop("host", make_trainer), options.pop("model", build)()
    strategy, changes = options.pop("strategy", TopLoss()), options.pop("trainer", {})
    trainer = host(folder / str(reuse), model=model, gradient_checkpointing=True, **changes)
    if reuse:
        options["reuse_forward"] = True
    else:
        options.pop("reuse_limit", None)
    attach(trainer, strategy, record=folder / f"{reuse}-record", **options)
    rows, before = watch(trainer.model), parameters(trainer.model)
    trainer.train()
    after = parameters(trainer.model)
    steps = {name: count - ASKED for name, count in rows.items()}
    return {name: before[name] - after[name] for name in before}, steps, trainer


def apart(one: dict[str, Any], two: dict[str, Any]) -> float:
    first, second = (torch.cat([x.flatten() for x in d.values()]) for d in (one, two))
    assert float(first.norm()) > 1e-3
    return float((first - second).norm() / first.norm())


def compare(folder: Path, **options: Any) -> tuple[dict[str, int], Any]:
    """The step with reuse is the step without; returns what it forwarded."""
    plain, _, _ = step(folder, False, **options)
    reused, rows, trainer = step(folder, True, **options)
    assert apart(plain, reused) < 1e-5
    assert choices(folder / "False-record") == choices(folder / "True-record")
    return rows, trainer


@pytest.mark.parametrize(
    ("family", "attention", "lora"),
    [(name, "eager", False) for name in FAMILIES]
    + [(name, "sdpa", lora) for name in FAMILIES if name != "gemma2" for lora in (False, True)]
    + [("gemma2", "eager", True)],  # which transformers does not let use SDPA
)
def test_every_layer_forwards_a_row_once_and_a_trained_row_once_more(
    tmp_path: Path, family: str, attention: str, lora: bool
) -> None:
    model = partial(build, family, attention, lora)
    rows, trainer = compare(tmp_path, model=model, candidates=4)
    assert rows and set(rows.values()) == {8 + 2}, rows
    assert len(rows) == LAYERS * (2 if family != "mixtral" else len(rows) // LAYERS)
    assert trainer.state.log_history[0]["selection/reused_share"] == 1.0


@pytest.mark.parametrize(
    ("host", "scope", "side"),
    [
        *((make_trainer, scope, "right") for scope in ("global", "rank", "batch")),
        (make_trainer, "global", "left"),
        (make_sft_trainer, "global", "right"),
    ],
)
def test_rows_that_move_between_micro_batches(
    tmp_path: Path, host: Any, scope: str, side: str
) -> None:
    """Of other widths, padded on either side: 24 candidates in three micro-batches, six train."""
    changes: dict[str, Any] = {"gradient_accumulation_steps": 3}
    if host is make_trainer:
        changes["collator"] = partial(collate, side=side)
    rows, trainer = compare(tmp_path, host=host, trainer=changes, scope=scope, candidates=4)
    assert set(rows.values()) == {24 + 6}
    assert trainer.state.log_history[0]["selection/reused_share"] == 1.0


CASES: dict[str, dict[str, Any]] = {
    "weights": {"strategy": LossReweight(min_rows=2)},
    "samples": {"candidates": 3, "normalize": "samples"},
    "uds": {"strategy": UDS(), "candidates": 3},
    "rho-model": {
        "strategy": RHOLoss(), "candidates": 3, "reference": make_model(initializer_range=0.1)
    },
    "rho-adapter": {
        "strategy": RHOLoss(), "candidates": 3, "reference": "adapter",
        "model": partial(build, lora=True),
    },
    "every-other-layer": {
        "candidates": 3, "trainer": {"activation_checkpointing_kwargs": {"every_n_layers": 2}}
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_step_is_the_step_without(tmp_path: Path, case: str) -> None:
    rows, _ = compare(tmp_path, **CASES[case])
    candidates = 2 * CASES[case].get("candidates", 1)
    # The adapter's reference is a second forward of all candidates by the same layers.
    twice = 2 if case == "rho-adapter" else 1
    assert set(rows.values()) == {candidates * twice + 2}


@pytest.mark.parametrize("held", [0, 1, 2])
def test_what_does_not_fit_is_forwarded_again(tmp_path: Path, held: int) -> None:
    """The limit holds so many of three micro-batches; their rows are mixed by the choice."""
    rows = [{"input_ids": r["input_ids"][:4], "labels": r["input_ids"][:4]} for r in make_rows()]
    size = LAYERS * 8 * 4 * 32 * 4 / 2**30  # layers, rows, tokens, width, bytes
    counted, trainer = compare(
        tmp_path, trainer={"gradient_accumulation_steps": 3, "rows": rows}, candidates=4,
        reuse_limit=(held + 0.5) * size,
    )  # fmt: skip
    log = trainer.state.log_history[0]
    assert log["selection/held_gib"] == pytest.approx(held * size)
    # The order of an epoch says which micro-batch a row was in.
    choice = choices(tmp_path / "True-record")[0]
    again = sum(w > 0 for w in choice["weights"][8 * held :])
    assert 0 < again <= 6 and (held == 0) == (again == 6)
    assert log["selection/reused_share"] == pytest.approx(1 - again / 6)
    assert set(counted.values()) == {24 + 6 + again}


def test_the_gradient_is_the_contract(tmp_path: Path) -> None:
    """Against the naive loop, not only against ourselves."""
    reference = build()
    moved, _, _ = step(tmp_path, True, candidates=4, trainer={"gradient_accumulation_steps": 2})
    choice = choices(tmp_path / "True-record")[0]
    gradient, _ = reference_gradient(
        reference, make_rows(), choice["ids"], choice["weights"], "tokens"
    )
    before = parameters(reference)
    after = {name: before[name] - moved[name] for name in before}
    assert relative_error(before, after, gradient) < 1e-6


def test_a_run_with_evaluations_and_unscored_steps(tmp_path: Path) -> None:
    """Six steps of AdamW, of which two choose by chance and hold nothing."""
    options = {
        "strategy": When(TopLoss(), start=2, otherwise=Uniform()),
        "candidates": 3,
        "trainer": {
            "max_steps": 6, "optim": "adamw_torch", "learning_rate": 1e-3,
            "gradient_accumulation_steps": 2,
        },
    }  # fmt: skip
    rows, trainer = compare(tmp_path, **options)
    # Without a score: four rows forward, then again in the backward.
    assert set(rows.values()) == {2 * (4 + 4) + 4 * (12 + 4)}
    shares = [log["selection/reused_share"] for log in trainer.state.log_history[:-1]]
    assert shares == [0, 0, 1, 1, 1, 1]


def test_it_resumes_bit_identically(tmp_path: Path) -> None:
    def run(folder: str, steps: int, **kwargs: Any) -> Any:
        trainer = make_trainer(
            tmp_path / folder, model=build(), gradient_checkpointing=True, max_steps=steps,
            save_strategy="steps", save_steps=2, optim="adamw_torch", learning_rate=1e-3,
            lr_scheduler_type="constant",
        )  # fmt: skip
        attach(trainer, UDS(), candidates=3, reuse_forward=True)
        trainer.train(**kwargs)
        return trainer.model

    whole = run("whole", 4)
    run("parts", 2)
    resumed = run("parts", 4, resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    for one, two in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)


def test_bfloat16_autocast(tmp_path: Path) -> None:
    """The recomputation runs in the autocast of the forward."""
    kinds: list[torch.dtype] = []

    def spied() -> Any:
        model = build()
        for layer in model.model.layers:
            layer.mlp.up_proj.register_forward_hook(lambda _, args, out: kinds.append(out.dtype))
        return model

    options = {"candidates": 4, "model": spied, "trainer": {"bf16": True}}
    plain, _, _ = step(tmp_path, False, **options)
    reused, rows, _ = step(tmp_path, True, **options)
    assert apart(plain, reused) < 0.02
    assert set(rows.values()) == {8 + 2} and set(kinds) == {torch.bfloat16}


@pytest.mark.parametrize("tokens", [2, 3], ids=["other", "as-many"])
def test_rows_to_forward_are_taken_from_what_has_rows(tokens: int) -> None:
    """Two of three rows are fresh; a table with one entry a token is not cut to them."""
    layer = nn.Linear(2, 2)
    table, heat = torch.arange(2.0 * tokens).view(tokens, 2), torch.tensor([[1.0], [2.0], [3.0]])
    states = torch.randn(3, tokens, 2, generator=torch.Generator().manual_seed(0))

    def forward(module: Any, x: Any, table: Any, pair: Any) -> Any:
        return module(x) * pair[0].unsqueeze(2) + table

    function = partial(forward, layer, table=table, pair=(heat, "plain"))
    whole = function(states)
    held = torch.zeros_like(whole).index_copy(0, torch.tensor([1]), whole[[1]].detach())
    layer._gradient_checkpointing_func = None  # type: ignore[assignment]
    known = torch.tensor([False, True, False])[:, None].expand(3, tokens)
    rows = HeldRows([layer], [held], known, torch.tensor([0, 2]), audit=Audit())
    with Replay(rows):
        given = layer._gradient_checkpointing_func(function, states)  # type: ignore[misc]
    assert torch.allclose(given, whole)
    wanted = torch.autograd.grad(whole.square().sum(), list(layer.parameters()))
    found = torch.autograd.grad(given.square().sum(), list(layer.parameters()))
    assert all(torch.allclose(one, two) for one, two in zip(wanted, found, strict=True))


def test_only_the_rows_that_train_are_held_until_their_backward(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, model=build(), gradient_checkpointing=True)
    callback = attach(trainer, TopLoss(), candidates=4, reuse_forward=True)
    assert callback._reuse is not None
    keep, sizes = callback._reuse.keep, []

    def spy(batches: Any) -> Any:
        outputs = [o for c in callback._reuse._candidates for o in c.outputs]
        sizes.append(sum(o.nbytes for o in outputs))
        result = keep(batches)
        values = batches[0]["onlinesel_held"].values
        sizes.append(sum(v.untyped_storage().nbytes() for v in values))
        width = batches[0]["input_ids"].shape[1]
        sizes.append(LAYERS * 2 * width * 32 * 4)
        assert result["held_gib"] * 2**30 == sizes[0]
        assert all(not o.numel() for c in callback._reuse._candidates for o in c.outputs)
        return result

    callback._reuse.keep = spy  # type: ignore[method-assign]
    trainer.train()
    assert sizes[1] == sizes[2] and sizes[0] >= 4 * sizes[1]
