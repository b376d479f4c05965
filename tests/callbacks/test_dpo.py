"""Token weights in DPOTrainer: the loss and its gradient are those of weighted sums, row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType

from onlinesel.rl.preference import TARS, PreferenceTerms, PreferenceTokens, PreferenceWeights
from tests.callbacks.dpo_hosts import (
    HIDE,
    ByColumn,
    ById,
    Ones,
    Spy,
    assert_resumes,
    attach,
    by_hand,
    history,
    log_probs,
    make_dpo_trainer,
    pairs_of,
    reference_log_probs,
    retrained,
    same_answers,
    same_parameters,
    step_by_hand,
    train_in_parts,
    with_columns,
)
from tests.callbacks.hosts import parameters, relative_error
from tests.callbacks.test_hf_distributed import torchrun

# TRL 1.16 turns checkpointing off around the reference by the name that transformers 5.23 renamed,
# and is about to drop 'keep_end'.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_(dis|en)able` is deprecated:FutureWarning",
    "ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning",
)

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.2)
PROMPT = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
SETTINGS: dict[str, dict[str, Any]] = {
    "accumulated": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    "tail": {"ld_alpha": 0.3},
    "mixed": {"loss_type": ["hinge", "bco_pair", "sppo_hard"], "loss_weights": [1.0, 0.5, 0.1]},
    "sorted": {"loss_type": ["aot", "aot_unpaired"], "per_device_train_batch_size": 4},
    "smoothed": {"loss_type": ["robust", "exo_pair"], "label_smoothing": 0.1},
    "divergence": {"f_divergence_type": "js_divergence"},
    "synced": {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "lora": {"adapter": LORA, "disable_dropout": False},
    "prompt": {"adapter": PROMPT},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_ones_change_nothing(tmp_path: Path, name: str) -> None:
    """Losses, metrics and parameters are those of the plain run, bit for bit."""
    settings = {"max_steps": 3, "learning_rate": 0.01, **SETTINGS[name]}
    plain = make_dpo_trainer(tmp_path / "plain", **settings)
    before = parameters(plain.model)
    plain.train()
    weighed = make_dpo_trainer(tmp_path / "weighed", **settings)
    attach(weighed, Ones())
    weighed.train()
    assert history(weighed) == history(plain) and len(history(plain)) == 4
    assert same_parameters(plain, weighed)
    assert any(not torch.equal(before[n], p) for n, p in parameters(plain.model).items())


@pytest.mark.parametrize("needs", [("policy",), ("policy", "reference")])
def test_ones_change_nothing_whatever_they_read(tmp_path: Path, needs: Any) -> None:
    settings: dict[str, Any] = {"adapter": LORA, "max_steps": 3, "learning_rate": 0.01}
    trainers = [make_dpo_trainer(tmp_path / str(i), **settings) for i in range(2)]
    attach(trainers[1], Ones(needs))
    for trainer in trainers:
        trainer.train()
    assert history(trainers[0]) == history(trainers[1])
    assert same_parameters(*trainers)


# The loss by hand ---------------------------------------------------------------------------

MASK = TARS(differing=1.0, share=0.4, replace_with=63)
RANDOM = TARS(share=0.4, relevance="reference", replace_with="random")
STEPS: dict[str, tuple[PreferenceWeights, dict[str, Any]]] = {
    "by id": (ById(), {}),
    "by id, accumulated": (ById(), SETTINGS["accumulated"]),
    "by id, tail": (ById(), {"ld_alpha": 0.3}),
    "by id, lora": (ById(), {"adapter": LoraConfig(r=4)}),
    "by id, prompt": (ById(), {"adapter": PROMPT}),
    "by id, retrained": (ById(), {"model": retrained}),
    "hidden": (HIDE, {"gradient_accumulation_steps": 2}),
    "masked": (MASK, {"gradient_accumulation_steps": 2}),
    "masked, retrained": (MASK, {"model": retrained}),
    "random": (RANDOM, {}),
    "random, lora": (RANDOM, {"adapter": LoraConfig(r=4)}),
}


@pytest.mark.parametrize("name", STEPS)
def test_loss_and_gradient_by_hand(tmp_path: Path, name: str) -> None:
    weights, settings = STEPS[name]
    settings = {k: v() if k == "model" else v for k, v in settings.items()}
    error, spy = step_by_hand(make_dpo_trainer(tmp_path, **settings), weights, seed=3)
    # An embedding of size 1 that moves by 0.01 has lost two digits to rounding.
    assert error < (1e-4 if "prompt" in name else 1e-5)
    drawing = torch.Generator().manual_seed(3)
    for tokens, terms in zip(spy.asked, spy.answers, strict=True):
        used = terms.weights[tokens.mask]
        assert not bool((used == used[0]).all())
        assert (terms.inputs is not None) == (weights in (MASK, RANDOM))
        again = weights.weigh(tokens, generator=drawing)  # one generator, in the order of the run
        assert torch.equal(terms.weights, again.weights)


@pytest.mark.parametrize("part", ["weights", "inputs"])
def test_the_hand_would_notice(tmp_path: Path, part: str) -> None:
    """Meta-test: without the weights, or without what the models read, the error is large."""
    trainer = make_dpo_trainer(tmp_path)
    spy, before = Spy(MASK), parameters(trainer.model)
    attach(trainer, spy).trainer.train()
    after = parameters(trainer.model)
    trainer.model.load_state_dict(before)
    (terms,) = spy.answers
    kept = torch.ones_like(terms.weights) if part == "weights" else terms.weights
    spy.answers = [PreferenceTerms(kept, None if part == "inputs" else terms.inputs)]
    gradient, _ = by_hand(trainer, spy)
    assert relative_error(before, after, gradient) > 0.05


@pytest.mark.parametrize(
    ("weights", "forwards"), [(HIDE, 1), (Ones(("policy", "reference")), 1), (RANDOM, 2)]
)
def test_the_reference_runs_once_unless_it_decides_what_it_reads(
    tmp_path: Path, weights: PreferenceWeights, forwards: int
) -> None:
    trainer = make_dpo_trainer(tmp_path, gradient_accumulation_steps=3)
    counted: list[int] = []
    trainer.ref_model.model.register_forward_hook(lambda *_: counted.append(1))
    attach(trainer, weights).trainer.train()
    assert len(counted) == 3 * forwards


def test_what_the_weights_are_told(tmp_path: Path) -> None:
    trainer = make_dpo_trainer(tmp_path)
    spy, before = Spy(Ones(("policy", "reference"))), parameters(trainer.model)
    attach(trainer, spy).trainer.train()
    trainer.model.load_state_dict(before)
    (tokens,) = spy.asked
    assert set(tokens.special.tolist()) == {0, 1, 2}  # <pad>, <eos> and w2 as the unknown
    assert tokens.vocabulary == 64
    pairs = pairs_of(trainer, tokens)  # checks ids and mask
    texts = [p[0] for p in pairs] + [p[1] for p in pairs]
    for row, text in enumerate(texts):
        for name, found in (
            ("policy", log_probs(trainer.model, text)),
            ("reference", reference_log_probs(trainer, text)),
        ):
            wanted = torch.zeros(tokens.ids.shape[1])
            wanted[: len(text)] = found.detach()
            wanted[~tokens.mask[row]] = 0.0
            torch.testing.assert_close(tokens.values[name][row], wanted, rtol=1e-5, atol=1e-5)
            assert not tokens.values[name].requires_grad
    assert not torch.allclose(tokens.values["policy"], tokens.values["reference"], atol=1e-2)


@pytest.mark.slow
def test_two_processes_train_on_the_mean_of_both(tmp_path: Path) -> None:
    assert "same" in torchrun("dpo_hosts", str(tmp_path), port=29613).splitlines()
    trainer, spy = make_dpo_trainer(tmp_path), Spy(HIDE)
    for rank in (0, 1):
        asked, weights, before, after = torch.load(tmp_path / f"{rank}.pt")
        drawing = torch.Generator().manual_seed(3 + 1_000_003 * rank)
        for (ids, mask, special), found in zip(asked, weights, strict=True):
            spy.asked.append(PreferenceTokens(ids, mask, {}, special, 64))
            spy.answers.append(HIDE.weigh(spy.asked[-1], generator=drawing))
            assert torch.equal(spy.answers[-1].weights, found)
    trainer.model.load_state_dict(before, strict=False)
    gradient, _ = by_hand(trainer, spy)
    assert relative_error(before, after, gradient) < 1e-5


# Values of tokens that come with the data ---------------------------------------------------


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("unused", [True, False])
def test_columns_arrive_at_their_tokens(tmp_path: Path, mode: str, unused: bool) -> None:
    """Also where the collator cuts: no row keeps its prompt, or none its end."""
    trainer = make_dpo_trainer(
        tmp_path,
        max_length=6,
        truncation_mode=mode,
        pad_to_multiple_of=4,
        max_steps=4,
        remove_unused_columns=unused,
    )
    spy = Spy(ByColumn())
    attach(with_columns(trainer), spy).trainer.train()
    assert len(spy.asked) == 4
    for tokens in spy.asked:
        assert bool(tokens.mask.any(dim=1).all()) and not bool(tokens.mask[:, 0].any())
        clarity = torch.where(tokens.mask, tokens.ids / 7, 0.0)
        torch.testing.assert_close(tokens.values["clarity"], clarity)
        assert torch.equal(tokens.values["doubt"], torch.where(tokens.mask, -tokens.ids, 0).float())


# What is logged, and evaluation -------------------------------------------------------------


def test_metrics_are_means_over_the_answers(tmp_path: Path) -> None:
    trainer = make_dpo_trainer(tmp_path, gradient_accumulation_steps=2)
    spy = Spy(ById())
    attach(trainer, spy).trainer.train()
    used = [w.weights[t.mask] for t, w in zip(spy.asked, spy.answers, strict=True)]
    logs = trainer.state.log_history[0]
    ignored = [(u == 0).float() for u in used]
    for name, found in (("token_weight", used), ("ignored_share", ignored)):
        mean = sum(f.mean().item() for f in found) / 2
        assert logs[f"selection/{name}"] == pytest.approx(mean) and mean > 0


def test_evaluation_is_not_weighted(tmp_path: Path) -> None:
    plain, weighed = (
        make_dpo_trainer(tmp_path / name, evaluates=True, max_steps=2) for name in ("a", "b")
    )
    callback = attach(weighed, HIDE)
    before = callback._generator.get_state()
    assert weighed.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    assert torch.equal(callback._generator.get_state(), before)
    weighed.train()
    assert not torch.equal(callback._generator.get_state(), before)


# Resuming -----------------------------------------------------------------------------------


def test_resume_is_bit_identical(tmp_path: Path) -> None:
    assert_resumes(tmp_path)


def test_the_comparison_sees_a_lost_generator(tmp_path: Path) -> None:
    """Meta-test: without the state, the resumed run starts its draws again."""
    _, whole = train_in_parts(tmp_path, resume=False)
    found = list((tmp_path / "checkpoint-2").glob("selection*"))
    assert sorted(p.name for p in found) == ["selection.json", "selection.safetensors"]
    for file in found:
        file.unlink()
    with pytest.warns(UserWarning, match="PreferenceSelection: .* has no state of the selection"):
        _, resumed = train_in_parts(tmp_path, resume=True)
    assert not same_answers(whole[4:], resumed)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    train_in_parts(tmp_path, resume=False)
    with pytest.raises(ValueError, match=r"weights must be the checkpoint's \(TARS\(.*, got ById"):
        train_in_parts(tmp_path, resume=True, weights=ById())
    (tmp_path / "checkpoint-2" / "selection.json").unlink()
    with pytest.raises(ValueError, match="^PreferenceSelection: checkpoint must hold selection.js"):
        train_in_parts(tmp_path, resume=True)
