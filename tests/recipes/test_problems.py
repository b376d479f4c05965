"""The tasks: parts that share no prompt, right answers, what is paid, how held-out is scored."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from onlinesel.recipes import _rl_warm as warm  # noqa: E402
from onlinesel.recipes._problems import (  # noqa: E402
    PARTS,
    TASKS,
    Accuracy,
    Problem,
    build_tokenizer,
    columns,
    correct,
    draw,
    evaluate,
    greedy,
    held_out,
    part_of,
    pass_rates,
    pool,
)

TASK_NAMES = tuple(TASKS)


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(build_tokenizer()),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.5,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    )


# Problems -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASK_NAMES)
def test_training_and_held_out_share_no_prompt(name: str) -> None:
    task = TASKS[name]
    train, test = pool(task), held_out(task)
    prompts, others = [p.prompt for p in train], [p.prompt for p in test]
    assert len(set(prompts)) == len(prompts) == 2000
    assert len(set(others)) == len(others) >= 400
    assert not set(prompts) & set(others)
    rng = random.Random(0)
    practised = {draw(task, kind, "warm", rng).prompt for kind in task.practice for _ in range(300)}
    assert not practised & set(prompts) and not practised & set(others)


@pytest.mark.parametrize("name", TASK_NAMES)
def test_the_seed_alone_decides_which_problems(name: str) -> None:
    task = TASKS[name]
    assert pool(task) == pool(task) and held_out(task) == held_out(task)
    assert pool(task, seed=1) != pool(task)
    # Another seed draws others from the same part, so it may be used for a second test.
    assert not {p.prompt for p in pool(task, seed=1)} & {p.prompt for p in held_out(task)}


def test_parts_have_their_shares() -> None:
    found = Counter(part_of(f"a{one}+{other}=") for one in range(10, 99) for other in range(10, 99))
    assert {part: found[part] / 89**2 for part in PARTS} == pytest.approx(PARTS, abs=0.02)


def test_mixed_has_its_shares_and_right_answers() -> None:
    rows = pool(TASKS["mixed"])
    assert Counter(p.kind for p in rows) == {"copy": 800, "sum": 400, "riddle": 800}
    assert [p.kind for p in rows[:50]] != sorted(p.kind for p in rows[:50])  # in random order
    for p in rows:
        if p.kind == "copy":
            assert p.prompt[0] == "c" and len(p.prompt) == 6 and p.answer == p.prompt[4]
        elif p.kind == "sum":
            one, other = p.prompt[1:-1].split("+")
            assert p.prompt[0] == "a" and len(one) == len(other) == 2
            assert int(one) + int(other) == int(p.answer)
        else:
            assert p.prompt[0] == "h" and p.answer == ""
    assert {p.kind for p in held_out(TASKS["mixed"])} == {"copy", "sum"}


def test_digits_have_their_lengths_and_right_answers() -> None:
    rows = pool(TASKS["digits"])
    assert Counter(p.kind for p in rows) == {"1": 25} | dict.fromkeys("23456", 395)
    for p in [*rows, *held_out(TASKS["digits"])]:
        one, other = (int(text[::-1]) for text in p.prompt[:-1].split("+"))
        assert int(p.answer[::-1]) == one + other
        assert len(str(one)) == len(str(other)) == int(p.kind)
        assert len(p.prompt) == 14 and len(p.answer) == 7


@pytest.mark.parametrize("name", TASK_NAMES)
def test_every_answer_and_its_end_fit_into_a_completion(name: str) -> None:
    task = TASKS[name]
    assert max(len(p.answer) for p in pool(task)) + 1 == task.tokens


def test_columns_are_those_of_a_dataset() -> None:
    rows = [Problem("sum", "a12+34=", "46"), Problem("riddle", "h3821=", "")]
    assert columns(rows) == {
        "prompt": ["a12+34=", "h3821="], "answer": ["46", ""], "kind": ["sum", "riddle"],
    }  # fmt: skip


# Rewards and tokens -------------------------------------------------------------------------------


def test_only_the_whole_answer_is_paid_and_a_riddle_never() -> None:
    given = ["46", "47", "4", "460", "", "", "7"]
    right = ["46", "46", "46", "46", "46", "", ""]
    paid = correct(completions=given, answer=right, prompts=["?"] * 7, kind=["sum"] * 7)
    assert paid == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert all(isinstance(value, float) for value in paid)


@pytest.mark.parametrize("name", TASK_NAMES)
def test_the_tokenizer_gives_back_every_prompt_with_one_token_a_character(name: str) -> None:
    tokenizer = build_tokenizer()
    for p in pool(TASKS[name])[:200]:
        ids = tokenizer(p.prompt)["input_ids"]
        assert len(ids) == len(p.prompt) and min(ids) > 1
        assert tokenizer.decode(ids) == p.prompt


def test_padding_goes_left_and_the_end_is_left_out_of_the_text() -> None:
    tokenizer = build_tokenizer()
    batch = tokenizer(["c1=", "a12+34="], padding=True)
    assert batch["attention_mask"][0] == [0, 0, 0, 0, 1, 1, 1]
    assert batch["input_ids"][0][:4] == [tokenizer.pad_token_id] * 4
    ids = tokenizer("46" + tokenizer.eos_token)["input_ids"]
    assert len(ids) == 3 and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "46"
    assert tokenizer.batch_decode([ids, ids[:1]], skip_special_tokens=True) == ["46", "4"]


# Held-out accuracy --------------------------------------------------------------------------------


def test_greedy_completions_are_those_of_generate() -> None:
    model, tokenizer = tiny_model(), build_tokenizer()
    prompts = [p.prompt for p in held_out(TASKS["mixed"])[:40]] + ["c1=", "1+2="]
    model.train()
    texts = greedy(model, tokenizer, prompts, 5)
    assert model.training  # as it was
    model.eval()
    for prompt, text in zip(prompts, texts, strict=True):
        ids = tokenizer([prompt], return_tensors="pt")
        out = model.generate(
            input_ids=ids["input_ids"], attention_mask=ids["attention_mask"],
            do_sample=False, max_new_tokens=5,
        )  # fmt: skip
        assert text == tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
    assert len(set(texts)) > 5  # the model says different things, so the comparison can fail


def test_accuracy_counts_the_kinds_of_the_goal(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [
        Problem("sum", "a12+34=", "46"), Problem("sum", "a11+11=", "22"),
        Problem("sum", "a10+10=", "20"), Problem("copy", "c1234=", "4"),
    ]  # fmt: skip
    said = ["46", "23", "20", "4"]
    monkeypatch.setattr("onlinesel.recipes._problems.greedy", lambda *_: said)
    found = evaluate(tiny_model(), build_tokenizer(), TASKS["mixed"], problems)
    assert found == Accuracy(goal=pytest.approx(2 / 3), kinds={"copy": 1.0, "sum": 2 / 3})


def test_the_pass_rate_is_the_probability_of_the_answer() -> None:
    model, tokenizer = tiny_model(3).eval(), build_tokenizer()
    problem = Problem("sum", "a12+34=", "46")
    expected, text = 1.0, problem.prompt
    for step in (*problem.answer, tokenizer.eos_token):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(tokenizer([text])["input_ids"])).logits[0, -1]
        expected *= float(logits.softmax(0)[tokenizer(step)["input_ids"][0]])
        text += step
    others = [Problem("copy", "c1234=", "4"), Problem("riddle", "h3821=", "")]
    rates = pass_rates(model, tokenizer, [others[0], problem, others[1]])
    assert rates[1] == pytest.approx(expected, rel=1e-4) and 0 < expected < 1
    assert rates[2] == 0.0 and rates[0] != rates[1]


# The start of the runs ----------------------------------------------------------------------------

SMALL = warm.RLWarmSettings("mixed", target=0.0, layers=1, width=16, batch=4, limit=20)


def test_practice_ends_at_its_target_or_its_limit() -> None:
    _, facts = warm.practise(SMALL)
    assert facts["steps"] == 10  # the first look
    _, facts = warm.practise(
        warm.RLWarmSettings("digits", target=1.1, layers=1, width=16, batch=4, limit=20)
    )
    assert facts["steps"] == 20 and set(facts["kinds"]) == set("123456")


def test_practice_teaches_the_answer_and_the_end_alone() -> None:
    tokenizer = build_tokenizer()
    problems = [Problem("sum", "a12+34=", "46"), Problem("copy", "c1=", "1")]
    ids, labels = warm._rows(problems, tokenizer)
    assert tokenizer.decode(ids[0, :9]) == "a12+34=46" and ids.shape == (2, 10)
    assert labels[0].tolist() == [-100] * 7 + ids[0, 7:].tolist()
    assert labels[1].tolist() == [-100] * 3 + ids[1, 3:5].tolist() + [-100] * 5
    assert ids[0, 9] == ids[1, 4] == tokenizer.eos_token_id


def test_the_start_is_made_once_and_read_again(tmp_path: Path) -> None:
    first, cached = warm.prepare_rl(SMALL, tmp_path)
    assert not cached and [path.name for path in tmp_path.iterdir()] == [SMALL.key()]
    second, cached = warm.prepare_rl(SMALL, tmp_path)
    assert cached and second == first
    assert first.task is TASKS["mixed"]
    assert json.loads((first.folder / "facts.json").read_text())["settings"]["seed"] == 0
    again, _ = warm.practise(SMALL)
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, second.model().state_dict()[name])


def test_other_settings_have_another_folder() -> None:
    other = warm.RLWarmSettings("mixed", target=0.0, layers=1, width=16, batch=4, limit=20, seed=1)
    assert other.key() != SMALL.key() and SMALL.key().startswith("mixed-")
    assert warm.RLWarmSettings("digits").target == warm.TARGETS["digits"]


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError) as caught:
        warm.RLWarmSettings("chess")
    assert str(caught.value) == (
        "RLWarmSettings: task must be one of mixed, digits, got 'chess'. Choose one of them."
    )
