"""What a refusal says can be done: by the one who reads it, with what is at hand."""

from __future__ import annotations

import ast
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("trl")

from transformers import Trainer  # noqa: E402
from trl import (  # noqa: E402
    DPOTrainer,
    GRPOTrainer,
    KTOTrainer,
    RewardTrainer,
    RLOOTrainer,
    SFTTrainer,
)

import onlinesel  # noqa: E402
from onlinesel.callbacks._shared import precision as _precision  # noqa: E402
from onlinesel.callbacks._shared.hosts import TESTED_TRL, right_callback  # noqa: E402
from onlinesel.callbacks.dpo import PreferenceSelection  # noqa: E402
from onlinesel.callbacks.grpo import RolloutSelection  # noqa: E402
from onlinesel.callbacks.hf import OnlineSelection  # noqa: E402
from onlinesel.report.runlog import RunLog  # noqa: E402
from onlinesel.rl.preference import TARS  # noqa: E402
from onlinesel.strategies import RHOLoss, TopLoss, Uniform  # noqa: E402
from tests.callbacks.hosts import attach, make_rows, make_trainer  # noqa: E402

ROOT = Path(__file__).parents[2]


class AsyncGRPOTrainer(Trainer):
    """As TRL's, which is no GRPOTrainer and needs vLLM to be imported."""


AsyncGRPOTrainer.__module__ = "trl.experimental.async_grpo.async_grpo_trainer"


class MyGRPOTrainer(GRPOTrainer):
    """A user's own."""


def without_init(kind: type) -> Any:
    return kind.__new__(kind)


# Which callback belongs to which trainer --------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (GRPOTrainer, "Use onlinesel.callbacks.grpo.RolloutSelection"),
        (MyGRPOTrainer, "Use onlinesel.callbacks.grpo.RolloutSelection"),
        (DPOTrainer, "Use onlinesel.callbacks.dpo.PreferenceSelection"),
        (RLOOTrainer, "Use TRL's GRPOTrainer with scale_rewards='none' and RolloutSelection"),
        (AsyncGRPOTrainer, "Use TRL's GRPOTrainer and RolloutSelection; it generates with vLLM"),
        (KTOTrainer, "There is no callback for it. In a loop of your own, onlinesel.steps"),
        (RewardTrainer, "There is no callback for it. In a loop of your own, onlinesel.steps"),
        (dict, "Pass the trainer itself; for a loop of your own there is onlinesel.steps."),
    ],
)
def test_rows_are_not_chosen_in_other_trainers(kind: type, says: str) -> None:
    with pytest.raises(ValueError) as caught:
        OnlineSelection(without_init(kind), TopLoss(), candidates=2)
    assert str(caught.value).startswith(
        "OnlineSelection: trainer must be a transformers Trainer or TRL SFTTrainer, got "
        f"{kind.__name__}. {says}"
    )


@pytest.mark.parametrize("kind", [SFTTrainer, Trainer, RLOOTrainer, AsyncGRPOTrainer, DPOTrainer])
def test_rollouts_are_not_chosen_in_other_trainers(kind: type) -> None:
    with pytest.raises(ValueError) as caught:
        RolloutSelection(without_init(kind))
    message = str(caught.value)
    assert message.endswith(right_callback(without_init(kind)))
    assert ("OnlineSelection" in message) == (kind in (SFTTrainer, Trainer))


def test_pairs_are_not_weighed_in_other_trainers() -> None:
    message = (
        "PreferenceSelection: trainer must be TRL's DPOTrainer, got SFTTrainer. Use onlinesel."
    )
    with pytest.raises(ValueError, match=message):
        PreferenceSelection(without_init(SFTTrainer), TARS())


def test_a_lightning_trainer_is_sent_to_its_own_callback() -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    with pytest.raises(ValueError, match=r"Use onlinesel\.callbacks\.lightning\.OnlineSelection"):
        OnlineSelection(without_init(lightning.Trainer), TopLoss(), candidates=2)


# A step of RLOO's advantages, for what the remedy claims ----------------------------------------


def test_unscaled_group_advantages_are_those_of_rloo_but_for_a_factor() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.0])
    size = len(rewards)
    others = (rewards.sum() - rewards) / (size - 1)
    assert torch.allclose(rewards - others, (rewards - rewards.mean()) * size / (size - 1))


# References, columns, words ---------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_name_of_the_hub_is_told_how_to_be_loaded(stream: bool, tmp_path: Path) -> None:
    from datasets import Dataset, IterableDataset

    rows: Any = Dataset.from_list(make_rows())
    if stream:
        rows = IterableDataset.from_generator(lambda: iter(make_rows()))
        assert rows.column_names is None
    trainer = make_trainer(tmp_path, rows=rows)
    message = (
        r"^OnlineSelection: reference must be a model, 'adapter' or a column of the training "
        r"dataset, got 'Qwen/Qwen2\.5-0\.5B'\. Load a model with AutoModelForCausalLM\."
        r"from_pretrained\('Qwen/Qwen2\.5-0\.5B'\), or name one of the columns "
    )
    with pytest.raises(ValueError, match=message):
        OnlineSelection(trainer, RHOLoss(), candidates=2, reference="Qwen/Qwen2.5-0.5B")


def test_a_loop_says_it_before_the_first_step() -> None:
    from tests.callbacks.hosts import collate, make_model

    loader = DataLoader(make_rows(), batch_size=2, collate_fn=collate)
    message = (
        r"^steps: reference must be a model or 'adapter', got 'Qwen/x'\. RHOLoss compares the loss "
        r"with it: load a model with AutoModelForCausalLM\.from_pretrained\(\.\.\.\)"
    )
    with pytest.raises(ValueError, match=message):
        onlinesel.steps(loader, make_model(), RHOLoss(), candidates=2, reference="Qwen/x")


def test_a_column_that_nearly_fits_is_asked_about(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = Dataset.from_list([{**row, "source": 1} for row in make_rows()])
    trainer = make_trainer(tmp_path, rows=rows)
    message = "groups must be a column of the training dataset, got 'sorce'. Did you mean source?"
    with pytest.raises(ValueError, match=message):
        OnlineSelection(trainer, Uniform(), groups="sorce")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "planet"}, "scope must be one of global, rank, batch, got 'planet'. With 'glob"),
        ({"normalize": "mean"}, "normalize must be 'tokens', 'samples', 'rows' or None, got 'me"),
        ({"candidates": 2.0}, "candidates must be an integer >= 1, got 2.0. Use 1 to weigh"),
        ({"candidates": True}, "candidates must be an integer >= 1, got True. Use 1 to weigh"),
    ],
)
def test_both_hosts_say_what_the_words_mean(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"^OnlineSelection: {message}"):
        OnlineSelection(make_trainer(tmp_path), Uniform(), **options)
    with pytest.raises(ValueError, match=f"^steps: {message}"):
        onlinesel.steps([], torch.nn.Linear(1, 1), Uniform(), **options)


def test_a_folder_with_another_run_says_what_a_caller_can_do(tmp_path: Path) -> None:
    for again in (False, True):
        trainer = make_trainer(tmp_path / "out")
        attach(trainer, Uniform(), record=tmp_path / "run")
        if not again:
            trainer.train()
            continue
        with pytest.raises(ValueError) as caught:
            trainer.train()
    assert str(caught.value) == (
        f"record: folder must hold no run, got {tmp_path / 'run'}, which holds one. Record this "
        "run elsewhere, remove that folder, or resume the run from its checkpoint."
    )
    RunLog(tmp_path / "run", resume_step=1)


def test_the_version_to_install_is_the_tested_one() -> None:
    pinned = re.search(r"^trl==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned is not None and pinned[1] == TESTED_TRL


# Precision --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bf16", "native", "warned"), [(True, False, 1), (True, True, 0), (False, False, 0)]
)
def test_bfloat16_on_a_cpu_without_it_is_told(
    bf16: bool, native: bool, warned: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capabilities = {"avx2": True, "avx512_bf16": native, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    trainer = make_trainer(tmp_path, bf16=bf16)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        OnlineSelection(trainer, Uniform())
    texts = [str(w.message) for w in found if "bf16" in str(w.message)]
    assert len(texts) == warned
    if warned:
        assert texts[0].startswith("OnlineSelection: bf16 must be False for full speed on this CPU")
        assert texts[0].endswith(
            "Set bf16=False in TrainingArguments, where TRL's default is True."
        )


def test_a_torch_that_cannot_tell_warns_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert _precision._computes_bfloat16()


# All of them ------------------------------------------------------------------------------------

ELSEWHERE = re.compile(
    r"docstring|method card|See (the|fold)|Look at|capital letters|as the documentation|"
    r"constraints\.txt|as it is\.$"
)


def texts_of_errors(source: str) -> list[str]:
    """Return the text of every error that a module raises, through helpers of the name as well."""
    found = []
    for node in ast.walk(ast.parse(source)):
        called = ""
        if isinstance(node, ast.Call):
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if isinstance(node, ast.Raise) or "refuse" in called:
            parts = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant))
            found.append("".join(part for part in parts if isinstance(part, str)))
    return found


def test_no_remedy_sends_its_reader_elsewhere() -> None:
    texts = {
        path.name: text
        for folder in ("onlinesel", "callbacks", "recipes")
        for path in (ROOT / folder).rglob("*.py")
        for text in texts_of_errors(path.read_text("utf-8"))
        if ELSEWHERE.search(text)
    }
    assert texts == {}


def test_that_rule_can_fail() -> None:
    source = 'def f(x):\n    refuse("x", "one of a", x, "See the docstring.")\n'
    assert [bool(ELSEWHERE.search(text)) for text in texts_of_errors(source)] == [True]
