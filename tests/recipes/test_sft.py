"""The fine-tuning recipe: its flags, its refusals, and whole runs on a tiny model on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)
from trl import SFTConfig  # noqa: E402

from onlinesel import When  # noqa: E402
from onlinesel.recipes.sft import _COMMAND as COMMAND  # noqa: E402
from onlinesel.recipes.sft import (  # noqa: E402
    SelectionArguments,
    _check_columns,
    main,
    make_strategy,
)
from onlinesel.report import read_run  # noqa: E402
from onlinesel.strategies import RS2, UDS, TopLoss, Uniform  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and its tokenizer, as they would lie on disk."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["What is 1 plus 1? It is 2."], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>"
    )
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    )
    fast.save_pretrained(folder)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=280, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, pad_token_id=1, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with a training and a test file of prompts and completions."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split, count in (("train", 24), ("test", 4)):
        rows = ({"prompt": f"{i}+{i}=", "completion": f" {2 * i}."} for i in range(count))
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return folder


def arguments(model: Path, folder: Path, **flags: Any) -> list[str]:
    wanted = {
        "model_name_or_path": model, "output_dir": folder / "out", "bf16": False, "use_cpu": True,
        "max_steps": 3, "per_device_train_batch_size": 2, "report_to": "none", "max_length": 48,
        "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "candidates": 3,
        "dataloader_pin_memory": False,
    } | flags  # fmt: skip
    return [text for name, value in wanted.items() for text in (f"--{name}", str(value))]


# Flags --------------------------------------------------------------------------------------------


def test_arguments_of_the_method_are_literals_or_bare_words() -> None:
    options = SelectionArguments(
        "UDS", ["alpha=1.5", "capacity=64", "rows=response", "greedy=True", "time=None"]
    )
    expected = UDS(alpha=1.5, capacity=64, rows="response", greedy=True, time=None)
    assert make_strategy(options) == expected


def test_a_yaml_file_may_give_them_as_a_mapping() -> None:
    options = SelectionArguments("UDS", {"alpha": 0.5})  # type: ignore[arg-type]
    assert make_strategy(options) == UDS(alpha=0.5)


def test_a_window_puts_uniform_rows_around_the_method() -> None:
    options = SelectionArguments("TopLoss", selection_start=5, selection_stop=9)
    assert make_strategy(options) == When(TopLoss(), start=5, stop=9, otherwise=Uniform())
    assert make_strategy(SelectionArguments("RS2")) == RS2()


ALL = "GradNorm, InfoBatch, LossReweight, RHOLoss, RS2, SelectiveBackprop, TopLoss, UDS, Uniform"
FIELDS = (
    "alpha, capacity, rows, length, scale, vocab_dim, time_dim, time, compact, projector_seed, "
    "greedy"
)
REFUSALS = [
    (
        SelectionArguments("uds"),
        f"onlinesel sft: strategy must be one of {ALL}, got 'uds'. Did you mean UDS? A "
        "method of your own runs through the Python API.",
    ),
    (
        SelectionArguments("UDS", ["beta=1"]),
        f"onlinesel sft: strategy_args must be among {FIELDS} for UDS, got 'beta'. "
        "In Python, help(onlinesel.strategies.UDS) explains the method.",
    ),
    (
        SelectionArguments("UDS", ["lenght=sqrt"]),
        f"onlinesel sft: strategy_args must be among {FIELDS} for UDS, got 'lenght'. Did you mean "
        "length? In Python, help(onlinesel.strategies.UDS) explains the method.",
    ),
    (
        SelectionArguments("RHOLoss", ["alpha=1"]),
        "onlinesel sft: strategy_args must be empty for RHOLoss, got 'alpha'. "
        "In Python, help(onlinesel.strategies.RHOLoss) explains the method.",
    ),
    (
        SelectionArguments("UDS", ["alpha"]),
        "onlinesel sft: strategy_args must be name=value pairs, got 'alpha'. Write alpha=VALUE.",
    ),
    (
        SelectionArguments("UDS", ["alpha=1", "alpha=2"]),
        "onlinesel sft: strategy_args must be different names, got 'alpha' twice. Give it once.",
    ),
    (
        SelectionArguments("UDS", ["alpha=many"]),
        "onlinesel sft: strategy_args must be values that UDS takes, got {'alpha': 'many'}. "
        "It says: must be real number, not str.",
    ),
    (
        SelectionArguments("UDS", ["alpha=-1"]),
        "UDS: alpha must be finite and >= 0, got -1. Use 6.6, or 0 for the nuclear norm alone.",
    ),
    (
        SelectionArguments("UDS", selection_start=4, selection_stop=4),
        "When: start, stop and every must give a window 0 <= start < stop with every >= 1, got "
        "(4, 4, 1). Count optimizer steps from 0.",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSALS)
def test_flags_that_mean_nothing_are_refused(options: SelectionArguments, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make_strategy(options)
    assert str(caught.value) == message


LATE_REFUSALS = [
    ({"strategy": "Nothing"}, "onlinesel sft: strategy must be one of "),
    ({"dataset_name": None}, "onlinesel sft: dataset_name must be a dataset of the Hub, a folder"),
    ({"eval_strategy": "steps", "eval_steps": 1}, "onlinesel sft: dataset_test_split must be one"),
    ({"packing": True}, "onlinesel sft: OnlineSelection: padding_free must be off, got True. "),
    ({"reference": "x", "strategy": "UDS"}, "onlinesel sft: reference must be left out for UDS, "),
    ({"scope": "planet"}, "onlinesel sft: scope must be one of "),
    ({"config": "nowhere.yaml"}, "onlinesel sft: config must be a YAML file that is there, got"),
    (
        {"candidate_rows": 4},
        "onlinesel sft: flags must be ours or those of `trl sft`, got --candidate_rows. Did you "
        "mean --candidates?",
    ),
    (
        {"xyzzy": 4},
        "onlinesel sft: flags must be ours or those of `trl sft`, got --xyzzy. `onlinesel sft "
        "--help` lists them.",
    ),
    ({"model_name_or_path": "./gone"}, "model_name_or_path must be a file or folder that is there"),
    ({"dataset_name": "gone.jsonl"}, "dataset_name must be a file or folder that is there, or a "),
    ({"dataset_name": "rows/of/mine"}, "dataset_name must be a file or folder that is there, or"),
    ({"dataset_name": __file__}, "dataset_name must be a file of .jsonl, .json, .csv, .parquet, "),
    ({"reference": "/gone", "strategy": "RHOLoss"}, "reference must be a file or folder that is "),
    ({"candidates": 0}, "onlinesel sft: candidates must be an integer >= 1"),
]


@pytest.mark.parametrize(("flags", "start"), LATE_REFUSALS)
def test_what_cannot_be_done_is_one_message_and_status_2(
    flags: dict[str, Any],
    start: str,
    model: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {"dataset_name": data / "train.jsonl"} | flags
    given = {name: value for name, value in given.items() if value is not None}
    assert main(arguments(model, tmp_path, **given)) == 2
    assert start in capsys.readouterr().err
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_without_flags_it_asks_for_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().err.endswith(
        "onlinesel sft: model_name_or_path must be a model of the Hub or a folder, got None. For "
        "example --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name trl-lib/Capybara.\n"
    )


def test_help_shows_our_flags_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0 and len(text.split("\n\n")[0].splitlines()) <= 2
    flags = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    flags = [flag for flag in flags if not flag.startswith("--no_")]  # beside what is on
    ours = [f"--{f.name}" for f in fields(SelectionArguments)]
    assert flags[: len(ours)] == ours and "--model_name_or_path" in flags[len(ours) :]


@pytest.mark.parametrize(
    ("columns", "remedy"),
    [
        (["question", "answer"], "{'question': 'prompt', 'answer': 'completion'}"),
        (["id", "input", "target"], "{'input': 'prompt', 'target': 'completion'}"),
        (["prompt", "label"], "{'label': 'completion'}"),
        (["some", "other"], "{'some': 'prompt', 'other': 'completion'}"),
        (["body"], "{'body': 'text'}"),
    ],
)
def test_data_with_other_columns_is_told_which_it_needs(
    columns: list[str],
    remedy: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({name: "text" for name in columns}), "utf-8")
    assert main(arguments(model, tmp_path, dataset_name=file)) == 2
    assert capsys.readouterr().err.endswith(
        "onlinesel sft: dataset must be one with the columns messages, with prompt and completion, "
        f"or with text, got {', '.join(columns)}. Rename them, for example by "
        f"dataset.rename_columns({remedy}), or name the column of whole texts by "
        "--dataset_text_field.\n"
    )


def test_data_that_trl_reads_passes() -> None:
    chat = [{"role": "user", "content": "a"}]
    for row in (
        {"messages": chat}, {"prompt": "a", "completion": "b"}, {"text": "a"}, {"body": "a"},
        {"conversations": [{"from": "human", "value": "a"}]}, {"input_ids": [1]},
    ):  # fmt: skip
        field = "body" if "body" in row else "text"
        _check_columns(Dataset.from_list([row]), SFTConfig(bf16=False, dataset_text_field=field))
        stream = Dataset.from_list([row]).to_iterable_dataset()
        _check_columns(stream, SFTConfig(bf16=False, dataset_text_field=field))


@pytest.mark.parametrize(
    ("flags", "accelerator", "bf16"),
    [
        ([], False, False),
        (["--bf16", "True", "--use_cpu", "True"], False, True),
        ([], True, True),
        (["--use_cpu", "True"], True, False),
        (["--use-cpu"], True, False),
        (["--use_cpu", "False"], True, True),
    ],
)
def test_a_cpu_trains_in_float32_unless_it_is_told_otherwise(
    flags: list[str], accelerator: bool, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)

    @dataclass
    class Precision:
        bf16: bool | None = None
        use_cpu: bool = False

        def __post_init__(self) -> None:  # TRL's
            self.bf16 = True if self.bf16 is None else self.bf16

    (parsed,) = COMMAND.parse([Precision], flags, COMMAND.precision(flags))
    assert parsed.bf16 is bf16


# Whole runs ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_trains_the_best_rows_and_leaves_model_and_record(
    model: Path, data: Path, tmp_path: Path
) -> None:
    flags = {"dataset_name": data, "record": tmp_path / "record", "strategy": "TopLoss"}
    flags |= {"eval_strategy": "steps", "eval_steps": 3}
    assert main(arguments(model, tmp_path, **flags)) == 0
    run = read_run(tmp_path / "record")
    assert (run.name, run.candidates) == ("TopLoss", 3)
    assert [(s.rows, s.candidates) for s in run.steps] == [(2, 6), (4, 12), (6, 18)]
    for choice in run.choices:
        kept = [s for s, w in zip(choice.scores, choice.weights, strict=True) if w]
        dropped = [s for s, w in zip(choice.scores, choice.weights, strict=True) if not w]
        assert len(kept) == 2 and min(kept) >= max(dropped)
    assert len(run.evals) == 1 and 3 < run.evals[0].loss < 7
    assert run.rows[7].text.startswith("7+7= 14.")
    before = LlamaForCausalLM.from_pretrained(model).lm_head.weight
    assert not before.equal(LlamaForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight)


@pytest.mark.slow
def test_lora_compares_with_the_model_without_its_adapter(
    model: Path, data: Path, tmp_path: Path
) -> None:
    flags = {"dataset_name": data / "train.jsonl", "record": tmp_path / "record"}
    flags |= {"use_peft": True, "lora_r": 2, "strategy": "RHOLoss", "reference": "adapter"}
    assert main(arguments(model, tmp_path, learning_rate=0.1, **flags)) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    first, *_, last = read_run(tmp_path / "record").choices
    # The adapter begins as zero: until it has trained, a row has the same loss with and without.
    assert max(map(abs, first.scores)) < 1e-5 < 1e-2 < max(map(abs, last.scores))


@pytest.mark.slow
def test_a_yaml_file_a_reference_model_and_chats(model: Path, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    roles = ("user", "assistant")
    rows = (
        {"messages": [{"role": role, "content": f"{role} {i}"} for role in roles]}
        for i in range(20)
    )
    chats.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    (tmp_path / "run.yaml").write_text(
        f"strategy: RHOLoss\nreference: {model}\nselection_start: 1\nrecord: {tmp_path}/record\n"
        f"datasets:\n  - path: json\n    data_files: {chats}\n",
        "utf-8",
    )
    assert main(arguments(model, tmp_path, config=tmp_path / "run.yaml")) == 0
    run = read_run(tmp_path / "record")
    assert run.name == "When" and "start=1" in run.strategy
    # Uniform rows first, which have no scores; then differences from the model's own start.
    assert run.choices[0].scores is None and len(run.choices[1].scores) == 6
    assert [s.rows for s in run.steps] == [2, 4, 6]


@pytest.mark.slow
def test_a_column_of_reference_losses_and_names_of_sources(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = (
        {"text": f"row {i} of text", "known": float(i % 2), "source": f"s{i % 2}"}
        for i in range(24)
    )
    file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    flags = {"dataset_name": file, "record": tmp_path / "record"}
    flags |= {"strategy": "RHOLoss", "reference": "known"}
    assert main(arguments(model, tmp_path, **flags)) == 0
    run = read_run(tmp_path / "record")
    # A reference loss higher by 1 outweighs what rows of one kind differ by.
    trained = [i for c in run.choices for i, w in zip(c.ids, c.weights, strict=True) if w]
    assert len(trained) == 6 and all(run.rows[i].text.startswith(f"row {i} ") for i in trained)
    assert {run.rows[i].source for i in trained} == {"s0"}


@pytest.mark.slow
def test_reused_forwards_train_the_same_model_and_dropout_is_refused(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heads = []
    for reuse in (False, True):
        flags = {"dataset_name": data, "strategy": "TopLoss", "reuse_forward": reuse}
        folder = tmp_path / str(reuse)
        capsys.readouterr()
        assert main(arguments(model, folder, learning_rate=0.01, **flags)) == 0
        assert ("selection/reused_share': '1'" in capsys.readouterr().out) == reuse
        heads.append(LlamaForCausalLM.from_pretrained(folder / "out").lm_head.weight)
    assert torch.allclose(*heads, atol=1e-5)
    flags = {"dataset_name": data, "reuse_forward": True, "use_peft": True}
    assert main(arguments(model, tmp_path, **flags)) == 2
    assert "reuse_forward: model must be without dropout" in capsys.readouterr().err
