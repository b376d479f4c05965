"""`onlinesel grpo`: parts from flags, the embedded problems, and any model and data from disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onlinesel import rl
from onlinesel.recipes import grpo
from onlinesel.recipes._rl_warm import RLWarmSettings
from onlinesel.recipes.grpo import RolloutArguments, main, make_parts
from onlinesel.recipes.rewards import final_number
from onlinesel.report import read_run
from tests.callbacks.hosts import make_model, make_tokenizer


def test_flags_become_parts() -> None:
    options = RolloutArguments(
        gate="ZeroVariance",
        prompts="Thompson",
        prompts_args=["target=0.4", "candidates=None"],
        tokens="HAPO",
        tokens_args=["neutral=base"],
        advantages="TokenAverage",
        rollouts="MaxVariance",
        rollouts_args=["keep=4"],
        adaptive_temperature=0.1,
        max_rounds=1,
        on_short="top_up",
    )
    assert make_parts(options) == {
        "gate": rl.ZeroVariance(),
        "prompts": rl.Thompson(target=0.4, candidates=None),
        "rollouts": rl.MaxVariance(keep=4),
        "advantages": rl.TokenAverage(),
        "tokens": rl.HAPO(neutral="base"),
        "refill": rl.Refill(max_rounds=1, on_short="top_up"),
        "temperature": rl.AdaptiveTemperature(tau=0.1),
    }
    assert make_parts(RolloutArguments(gate="none", prompts="none")) == {}


def test_every_method_has_its_flag() -> None:
    """A new method of the package must be reachable from the command line."""
    named = {name for names in grpo._KINDS.values() for name in names}
    bases = (rl.PromptSampler, rl.Advantages, rl.TokenWeights)
    for name in rl.__all__:
        kind = getattr(rl, name)
        if isinstance(kind, type) and issubclass(kind, bases) and kind not in bases:
            assert name in named, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "Band"}, "onlinesel grpo: gate must be one of PassRateBand, ZeroVariance, got"),
        ({"gate_args": ["wide=1"]}, "gate_args must be among low, high, inclusive, anneal for Pas"),
        ({"gate_args": ["low"]}, "gate_args must be name=value pairs, got 'low'. Write low=VALUE"),
        ({"gate_args": ["low=0.9"]}, "PassRateBand: low and high must be shares"),
        ({"on_short": "wait"}, "Refill: on_short must be one of partial"),
    ],
)
def test_flags_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_parts(RolloutArguments(**options))


@given(st.integers(-10_000_000, 10_000_000), st.integers(0, 99))
def test_the_last_number_decides(number: int, other: int) -> None:
    answers = [f"We add {other} and get\n#### {number}"] * 3
    given_ = [f"{other}, so {number:,}", f"#### {number}.0 apples", f"{number} or {number + 1}"]
    assert final_number(given_, answers) == [1.0, 1.0, 0.0]


def test_conversations_are_scored_and_no_number_scores_nothing() -> None:
    said = [[{"role": "assistant", "content": "It is 7."}], [{"role": "assistant", "content": "?"}]]
    assert final_number(said, ["#### 7", "none"]) == [1.0, None]
    assert final_number(said[1:], ["#### 7"]) == [0.0]


def test_embedded_problems_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grpo, "RLWarmSettings", lambda task: RLWarmSettings(task, limit=2))
    flags = ["--max_steps", "2", "--record", "runs/a", "--gate", "none", "--disable_tqdm", "True"]
    flags += ["--output_dir", "out", "--per_device_train_batch_size", "16", "--save_strategy", "no"]
    assert main(flags) == 0
    assert "Practised sums" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").exists()
    run = read_run(tmp_path / "runs" / "a")
    assert run.name == "SharedDifficulty"
    assert [g.rollouts for g in run.generations] == [16, 32]
    assert len(run.prompts) == len(run.rows) == 2000
    assert sum(p.visits for p in run.prompts.values()) == 4
    assert main([*flags[:2], "--task", "chess"]) == 2
    assert "task must be one of mixed, digits, got 'chess'" in capsys.readouterr().err


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A model with a chat template, and questions with answers, as GSM8K has them."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    make_model().save_pretrained(tmp_path / "model")
    rows = [{"question": f"w{i} w{i + 1}", "answer": f"so #### {i % 9}"} for i in range(2, 22)]
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


def graded(completions: Any, difficulty: Any, scale: float = 1.0, **_: Any) -> list[float]:
    """A reward function of another data set."""
    return [scale * d for d in difficulty]


def flags_of(disk: Path, **changes: Any) -> list[str]:
    values = {
        "model_name_or_path": disk / "model", "dataset_name": disk / "train.jsonl",
        "prompt_column": "question", "instruction": "w60", "output_dir": disk / "out",
        "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 5,
        "max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none", "gate": "none",
        "prompts": "Thompson", "save_strategy": "no", "disable_tqdm": True,
        "gradient_checkpointing": False, **changes,
    }  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def test_any_model_and_data_from_disk(disk: Path) -> None:
    assert main(flags_of(disk, record=disk / "record")) == 0
    run = read_run(disk / "record")
    assert run.generations[0].rollouts == 8
    assert run.rows[0].text == "w2 w3\nw60"
    assert len(run.prompts) == 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_column": "problem"}, "prompt_column must be a column of the data (question, "),
        ({"prompt_column": "qestion"}, "got 'qestion'. Did you mean question?"),
        ({"dataset_name": "gone.jsonl"}, "dataset_name must be a file or folder that is there, or"),
        ({"model_name_or_path": "./gone"}, "model_name_or_path must be a file or folder that is "),
        ({"gate": "zerovariance"}, "got 'zerovariance'. Did you mean ZeroVariance? Use none to"),
        (
            {"reward": "tests.recipes.test_grpo.graded"},
            "reward must be a function of the data's columns (question, answer), got "
            "graded, which reads difficulty. Rename the column, or",
        ),
        ({"reward": "final_number"}, "reward must be module.function, got 'final_number'"),
        ({"reward": "no.such.reward"}, "reward must be a function that can be imported"),
        ({"eval_strategy": "steps"}, "dataset_test_split must be one of the splits train"),
        ({"outcome": "other"}, "outcome must be one of final_number, got 'other'"),
    ],
)
def test_data_that_do_not_fit_are_refused(
    disk: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags_of(disk, **changes)) == 2
    assert message in capsys.readouterr().err


def test_a_column_of_questions_is_asked_for_by_its_flag(
    disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = flags_of(disk)
    del flags[flags.index("--prompt_column") : flags.index("--prompt_column") + 2]
    assert main(flags) == 2
    assert "The columns are question, answer: write --prompt_column question." in (
        capsys.readouterr().err
    )


def test_an_unknown_flag_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--max_rollout_rounds", "3", "--nosuch"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "onlinesel grpo: flags must be ours or those of `trl grpo`, got --max_rollout_rounds, "
        "--nosuch. Did you mean --max_rollouts?"
    )


def test_the_config_for_a_gpu_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key of the shipped file is known; only the model and vLLM need a GPU and the Hub."""
    seen: dict[str, Any] = {}

    def stop(script: Any, training: Any, model: Any, mixture: Any, options: Any) -> Any:
        seen.update(training=training, model=model, options=options)
        raise ValueError("onlinesel grpo: far enough")

    monkeypatch.setattr(grpo, "make_trainer", stop)
    config = Path(__file__).parents[2] / "recipes" / "configs" / "grpo_gsm8k.yaml"
    assert main(["--config", str(config), "--bf16", "false", "--use_cpu", "true"]) == 2
    assert seen["training"].use_vllm and seen["model"].model_name_or_path.startswith("Qwen/")
    parts = make_parts(seen["options"])
    assert parts["gate"] == rl.PassRateBand(0.25, 0.75)
    assert parts["prompts"] == rl.SharedDifficulty(target=0.5)
