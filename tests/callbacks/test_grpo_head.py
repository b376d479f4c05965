"""fused_logprobs: what TRL's head computes, by ``policy_logprobs``, and nothing left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from trl.trainer import utils

from onlinesel.callbacks.grpo import RolloutSelection
from onlinesel.rl import HAPO, AdaptiveTemperature, TopEntropy
from tests.callbacks.grpo_hosts import (
    attach,
    make_grpo_trainer,
    make_ramp,
    spy,
    weights,
    word_parity,
)
from tests.callbacks.hosts import make_model, make_tokenizer

TRLS_OWN = utils._ChunkedLogProbFunction
SAMPLED = {"known": False, "rewards": word_parity}
SHARP = {"initializer_range": 0.3}  # entropies from 0 to 4, so that HAPO's statistics are settled

CASES: dict[str, dict[str, Any]] = {
    "dapo": {"num_iterations": 2, "max_steps": 2},
    "grpo": {"loss_type": "grpo", "temperature": 0.7},
    "dr_grpo": {"loss_type": "dr_grpo", "delta": 1.5, "num_iterations": 2, "max_steps": 2},
    "bnpo": {"loss_type": "bnpo", "pad_to_multiple_of": 8},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo"},
    "sequence": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "entropy-bonus": {"entropy_coef": 0.1},
    "entropy-mask": {"top_entropy_quantile": 0.5},
    "reference": {"beta": 0.5, "max_steps": 2},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "checkpointing": {"gradient_checkpointing": True},
    "lora": {"lora": True},
    "lora-checkpointing": {"lora": True, "gradient_checkpointing": True, "num_iterations": 2},
    "head-in-float32": {"cast_lm_head_to_fp32": True},
    "softcap-bias": {"config": {"final_logit_softcapping": 3.0}, "bias": True},
    "hapo": {"parts": {"tokens": HAPO()}, "config": SHARP},
    "top-entropy": {"parts": {"tokens": TopEntropy(0.25)}, "gradient_accumulation_steps": 2,
                    "per_device_train_batch_size": 4},
    "temperature": {"parts": {"temperature": make_ramp, "tokens": HAPO()}, "config": SHARP,
                    "temperature": 0.8, "num_iterations": 2, **SAMPLED},
}  # fmt: skip


def make(folder: Path, fused: bool, case: dict[str, Any]) -> tuple[Any, RolloutSelection]:
    case = dict(case)
    model = make_model(lora=case.pop("lora", False), **case.pop("config", {}))
    if case.pop("bias", False):
        offsets = torch.linspace(-1, 1, model.config.vocab_size)
        model.lm_head.bias = torch.nn.Parameter(offsets)
    if "beta" in case:  # the trainer loads its reference from where the model came from
        model.save_pretrained(folder / "model")
        make_tokenizer().save_pretrained(folder / "model")
        model = type(model).from_pretrained(folder / "model")
    parts = {k: v() if callable(v) else v for k, v in case.pop("parts", {}).items()}
    rights = case.pop("rights", (2, 1, 3, 2))
    trainer = make_grpo_trainer(folder, rights, model=model, **{"max_steps": 1, **case})
    return trainer, attach(trainer, fused_logprobs=fused, **parts)


def train(folder: Path, fused: bool, case: dict[str, Any]) -> tuple[list[Any], Tensor]:
    """Return every pair of log-probabilities and entropies, and what the weights moved by."""
    trainer, _ = make(folder, fused, case)
    seen, original = [], trainer._get_per_token_logps_and_entropies

    def noted(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        seen.append([None if x is None else x.detach() for x in result[:2]])
        return result

    trainer._get_per_token_logps_and_entropies = noted
    before = weights(trainer)
    trainer.train()
    return seen, before - weights(trainer)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_:FutureWarning")  # TRL's own call
@pytest.mark.parametrize("name", CASES)
def test_it_trains_what_trls_head_trains(tmp_path: Path, name: str) -> None:
    theirs, wanted = train(tmp_path / "trl", False, CASES[name])
    ours, moved = train(tmp_path / "fused", True, CASES[name])
    assert len(ours) == len(theirs) > 0
    for one, two in zip(ours, theirs, strict=True):
        assert one[0].dtype == torch.float32
        for found, expected in zip(one, two, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert any(not torch.equal(one[0], two[0]) for one, two in zip(ours, theirs, strict=True))
    assert wanted.norm() > 0
    assert (moved - wanted).norm() / wanted.norm() < 1e-5


# What reaches the head, and what both heads make of it -------------------------------------


def scored(
    trainer: Any, callback: RolloutSelection, factor: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log-probabilities and entropies of some rows, the states, and their labels."""
    g = torch.Generator().manual_seed(1)
    ids, keep = torch.randint(2, 64, (6, 20), generator=g), 12
    caught: list[Tensor] = []
    handle = trainer.model.base_model.register_forward_hook(
        lambda _, __, output: caught.append(output.last_hidden_state.detach())
    )
    callback._tokens._factor = factor
    try:
        with torch.no_grad():
            logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, torch.ones_like(ids), keep, batch_size=4, compute_entropy=True
            )
    finally:
        handle.remove()
        callback._tokens._factor = None
    return logps, entropies, torch.cat(caught)[:, -keep - 1 : -1], ids[:, -keep:]


def exact(states: Tensor, weight: Tensor, labels: Tensor, heat: Any = 1.0) -> tuple[Tensor, Tensor]:
    logits = states.double() @ weight.double().T / heat
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, labels[..., None])[..., 0], entropy


def bfloat16_trainer(folder: Path, std: float, autocast: bool) -> Any:
    """Return a trainer whose logits over 5,003 words have this standard deviation."""
    model = make_model(vocab_size=5003)
    torch.nn.init.normal_(model.lm_head.weight, std=std / 32**0.5)  # the states have rms 1
    model = model if autocast else model.bfloat16()
    return make_grpo_trainer(folder, model=model, bf16=autocast)


@pytest.mark.parametrize("tempered", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("std", [7.0, 14.0])
def test_it_errs_a_hundredth_of_trls_head_in_bfloat16(
    tmp_path: Path, std: float, autocast: bool, tempered: bool
) -> None:
    errors = []
    factor = torch.linspace(0.6, 1.9, 72).reshape(6, 12) if tempered else None
    for fused in (False, True):
        trainer = bfloat16_trainer(tmp_path, std, autocast)
        callback = attach(trainer, fused_logprobs=fused)
        logps, entropies, states, labels = scored(trainer, callback, factor)
        weight = trainer.model.lm_head.weight.detach()
        if autocast:
            states, weight = states.bfloat16(), weight.bfloat16()
        heat = 1.0 if factor is None else factor[..., None].double()
        true = exact(states, weight, labels, heat)
        spread = (states.double() @ weight.double().T).std()
        assert 0.8 * std < spread < 1.25 * std
        pairs = zip((logps, entropies), true, strict=True)
        errors.append([float((one - two).abs().max()) for one, two in pairs])
    for theirs, ours in zip(*errors, strict=True):
        assert theirs > 0.01  # or there would be nothing to win
        assert ours < theirs / 100, errors


@pytest.mark.parametrize("tempered", [False, True])
def test_on_a_gpu_trl_hands_over_the_positions_with_a_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tempered: bool
) -> None:
    """TRL drops the others there before it calls its head; here it is told that this is one."""
    factor = torch.linspace(0.5, 1.5, 72).reshape(6, 12) if tempered else None
    found = []
    for compact in (False, True):
        monkeypatch.setattr(utils, "_use_triton", lambda _, compact=compact: compact)
        trainer = make_grpo_trainer(tmp_path)
        callback = attach(trainer, fused_logprobs=True)
        *pair, states, labels = scored(trainer, callback, factor)
        found.append(pair)
    heat = 1.0 if factor is None else factor[..., None].double()
    true = exact(states, trainer.model.lm_head.weight.detach(), labels, heat)
    for pair in found:
        for one, two in zip(pair, true, strict=True):
            torch.testing.assert_close(one.double(), two, rtol=1e-5, atol=1e-5)


def test_temperatures_under_a_soft_cap_are_exact(tmp_path: Path) -> None:
    """TRL's head could only be given scaled states, which a cap does not forgive."""
    from transformers import Gemma2Config, Gemma2ForCausalLM, set_seed

    set_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
    depth = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Gemma2ForCausalLM(
        Gemma2Config(**sizes, **depth, final_logit_softcapping=2.0, initializer_range=0.5,
                     pad_token_id=0, attn_implementation="eager")
    )  # fmt: skip
    trainer = make_grpo_trainer(
        tmp_path, (2, 1), model=model, max_steps=1, num_iterations=2, **SAMPLED
    )
    with pytest.raises(ValueError, match="plain logits for temperature=.*Set fused_logprobs=True"):
        RolloutSelection(trainer, temperature=AdaptiveTemperature())
    attach(trainer, temperature=make_ramp(), fused_logprobs=True)
    made = spy(trainer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.train()
    model.load_state_dict(before)
    batch = made[0]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    mask = batch["completion_mask"].bool()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=attention).logits
    heat = 1 + 0.5 * (torch.arange(mask.shape[1]) + 1)
    log_p = (logits[:, -mask.shape[1] - 1 : -1] / heat[:, None]).log_softmax(-1)
    wanted = log_p.gather(-1, batch["completion_ids"][..., None])[..., 0]
    torch.testing.assert_close(
        batch["old_per_token_logps"][mask], wanted[mask], rtol=1e-4, atol=1e-5
    )


# The work of the backward pass --------------------------------------------------------------


class HeadRows(TorchDispatchMode):
    """Count the tokens in products with the vocabulary, which is as wide as nothing else."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.vocab, self.width, self.rows = vocab, width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            one, two = [leaf for leaf in args if isinstance(leaf, Tensor)][-2:]
            sizes = (*one.shape, two.shape[1])
            if self.vocab in sizes:
                self.rows += one.shape[0] * one.shape[1] * two.shape[1] // (self.vocab * self.width)
        return func(*args, **(kwargs or {}))


def backward_rows(trainer: Any) -> tuple[int, Tensor]:
    """Train one step; return the rows of its backward's products with the head, and which tokens
    of the completions had a gradient."""
    vocab, width = trainer.model.get_output_embeddings().weight.shape
    mode, last = HeadRows(vocab, width), []
    original, backward = trainer._get_per_token_logps_and_entropies, trainer.accelerator.backward

    def noted(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if result[0].requires_grad:
            result[0].retain_grad()
            last.append(result[0])
        return result

    def counted(loss: Tensor, **kwargs: Any) -> None:
        with mode:
            backward(loss, **kwargs)

    trainer._get_per_token_logps_and_entropies = noted
    trainer.accelerator.backward = counted
    trainer.train()
    assert len(last) == 1
    return mode.rows, last[0].grad != 0


def test_groups_without_advantage_cost_no_backward_of_the_head(tmp_path: Path) -> None:
    """Three groups of four were all right or all wrong: their tokens have no gradient."""
    case = {"rights": (4, 2, 0, 4), "per_device_train_batch_size": 16, "config": {"vocab_size": 67}}
    counts = []
    for fused in (False, True):
        trainer, _ = make(tmp_path, fused, case)
        made = spy(trainer)
        count, pushed = backward_rows(trainer)
        mask = made[0]["completion_mask"].bool()
        mask[:4] = mask[8:] = False
        # The trainer shuffles the rows between generation and loss.
        assert sorted(pushed.tolist()) == sorted(mask.tolist())
        counts.append(count)
    positions = made[0]["prompt_ids"].shape[1] + mask.shape[1] - 1
    # The logits again, the gradient of the states, the gradient of the weight.
    assert counts == [3 * 16 * positions, 3 * int(mask.sum())]


def test_tokens_that_are_dropped_cost_no_backward_of_the_head(tmp_path: Path) -> None:
    case = {"rights": (2, 1, 3, 2), "per_device_train_batch_size": 16, "config": {"vocab_size": 67}}
    trainer, _ = make(tmp_path, True, {**case, "parts": {"tokens": TopEntropy(0.2)}})
    made = spy(trainer)
    count, pushed = backward_rows(trainer)
    batch = made[0]
    tokens = batch["onlinesel_entropy"][batch["completion_mask"].bool()]
    fifth = int((tokens >= tokens.quantile(0.8)).sum())
    assert 0.15 * len(tokens) < fifth < 0.25 * len(tokens)
    assert count == 3 * fifth == 3 * int(pushed.sum())


def test_a_frozen_head_gets_no_gradient(tmp_path: Path) -> None:
    case = {"lora": True, "config": {"vocab_size": 67}, "per_device_train_batch_size": 16}
    trainer, _ = make(tmp_path, True, case)
    made = spy(trainer)
    assert backward_rows(trainer)[0] == 2 * int(made[0]["completion_mask"].sum())


# Nothing is left behind -----------------------------------------------------------------------
