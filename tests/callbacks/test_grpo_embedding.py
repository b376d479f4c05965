"""Prompts are embedded exactly, in batches by tokens, and once for the same policy and prompts."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from onlinesel.callbacks.grpo import embed as _grpo_embedding
from onlinesel.callbacks.grpo import prompts as _grpo_prompts
from onlinesel.callbacks.grpo.cache import FeatureCache, fingerprint
from onlinesel.callbacks.grpo.embed import embed_prompts, token_batches, tokenize_prompts
from onlinesel.callbacks.grpo.prompts import make_pool
from onlinesel.rl import PromptPool, SharedDifficulty
from tests.callbacks.grpo_hosts import attach, make_grpo_trainer

WORDS = [1 + (5 * i) % 13 for i in range(30)]


def make(folder: Path, words: list[int] | None = None, **setting: Any) -> Any:
    """A trainer on prompts of these numbers of words."""
    trainer = make_grpo_trainer(folder, **setting)
    prompts = [
        " ".join(f"w{2 + (7 * i + 3 * j) % 60}" for j in range(count))
        for i, count in enumerate(WORDS if words is None else words)
    ]
    trainer.train_dataset = Dataset.from_dict({"prompt": prompts, "rights": [2.0] * len(prompts)})
    return trainer


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep embeddings in a folder of the test's own."""
    place = tmp_path / "kept"
    place.mkdir()
    monkeypatch.setattr(FeatureCache, "_path", lambda self: place / f"{self._key}.safetensors")
    return place


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count how many prompts are embedded."""
    counted: list[int] = []
    embed = _grpo_prompts.embed_prompts

    def noted(trainer: Any, ids: Any) -> Any:
        counted.append(len(ids))
        return embed(trainer, ids)

    monkeypatch.setattr(_grpo_prompts, "embed_prompts", noted)
    return counted


def texts_of(trainer: Any) -> list[str]:
    return list(trainer.train_dataset["prompt"])


def alone(trainer: Any, ids: list[int]) -> torch.Tensor:
    """The reference: one prompt, without padding."""
    with torch.no_grad():
        hidden = trainer.model.base_model(torch.tensor([ids])).last_hidden_state[0]
    return torch.cat([hidden[-1], hidden.mean(dim=0)])


@pytest.mark.parametrize("tokens", [1, 24, 16384])
def test_every_prompt_is_embedded_as_if_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    monkeypatch.setattr(_grpo_embedding, "_TOKENS", tokens)
    monkeypatch.setattr(_grpo_embedding, "_PROMPTS", 7)
    trainer = make(tmp_path)
    ids = tokenize_prompts(trainer)
    assert ids == [trainer.processing_class(text)["input_ids"] for text in texts_of(trainer)]
    assert len({len(row) for row in ids}) > 8
    found = embed_prompts(trainer, ids)
    assert trainer.model.training
    wanted = torch.stack([alone(trainer, row) for row in ids])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@given(lengths=st.lists(st.integers(1, 40), max_size=30), most=st.integers(1, 100))
def test_batches_hold_every_row_once_and_no_more_tokens_than_asked(
    lengths: list[int], most: int
) -> None:
    batches = token_batches(lengths, most)
    assert sorted(row for rows in batches for row in rows) == list(range(len(lengths)))
    sizes = [[lengths[row] for row in rows] for rows in batches]
    for size in sizes:
        assert len(size) == 1 or len(size) * max(size) <= most
    flat = [length for size in sizes for length in size]
    assert flat == sorted(flat, reverse=True)
    # No batch could have taken the first row of the next one.
    for size, after in zip(sizes, sizes[1:], strict=False):
        assert (len(size) + 1) * size[0] > most, (size, after)


def test_prompts_longer_than_the_positions_are_embedded_by_their_end(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    )
    trainer = make(tmp_path, [3, 12, 4, 9], model=model)
    with pytest.warns(UserWarning, match=r"2 of 4 prompts have more .* \(8\), the first is row 1"):
        ids = tokenize_prompts(trainer)
    whole = [trainer.processing_class(text)["input_ids"] for text in texts_of(trainer)]
    assert [len(row) > 8 for row in whole] == [False, True, False, True]
    assert ids == [row[-8:] for row in whole]
    found = embed_prompts(trainer, ids)
    trainer.model.eval()
    torch.testing.assert_close(found[1], alone(trainer, whole[1][-8:]))
    callback = attach(trainer, prompts=SharedDifficulty())
    with pytest.warns(UserWarning, match="more tokens than the model has positions"):
        callback._begin(None)
    assert len(callback.prompt_table()) == 4


def pool_of(trainer: Any, sampler: Any = None, seed: int = 0) -> PromptPool:
    pool = make_pool(trainer, sampler or SharedDifficulty(), seed, {})
    assert pool is not None
    return pool


def test_the_same_policy_and_prompts_are_embedded_once(tmp_path: Path, calls: list[int]) -> None:
    first = pool_of(make(tmp_path))
    second = pool_of(make(tmp_path))
    assert calls == [30]
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    ids = torch.arange(10)
    for pool in (first, second):
        pool.observe(ids, ids % 5, torch.full((10,), 4))
    assert torch.equal(first.propose(6), second.propose(6))
    assert first.table() == second.table()
    # Another seed draws otherwise from the same features.
    third = pool_of(make(tmp_path), seed=1)
    assert calls == [30]
    assert not torch.equal(third.propose(20), pool_of(make(tmp_path)).propose(20))


def changes() -> list[Any]:
    def weight(trainer: Any) -> None:
        with torch.no_grad():
            parameter = next(trainer.model.base_model.parameters())
            parameter[3, 1] = torch.nextafter(parameter[3, 1], torch.tensor(9.0))

    def prompt(trainer: Any) -> None:
        rows = trainer.train_dataset.to_list()
        rows[29]["prompt"] = rows[29]["prompt"] + " w5"
        trainer.train_dataset = Dataset.from_list(rows)

    def order(trainer: Any) -> None:
        trainer.train_dataset = trainer.train_dataset.select([1, 0, *range(2, 30)])

    def settings(trainer: Any) -> None:
        trainer.model.config.rms_norm_eps = 0.1

    return [weight, prompt, order, settings]


@pytest.mark.parametrize("change", changes(), ids=lambda change: change.__name__)
def test_anything_that_matters_is_embedded_anew(
    tmp_path: Path, calls: list[int], change: Any
) -> None:
    pool_of(make(tmp_path))
    trainer = make(tmp_path)
    change(trainer)
    pool_of(trainer)
    assert calls == [30, 30]


def test_another_method_has_features_of_its_own(tmp_path: Path, calls: list[int]) -> None:
    assert pool_of(make(tmp_path))._state["x"].shape[1] > 3
    assert pool_of(make(tmp_path), SharedDifficulty(components=2))._state["x"].shape[1] == 3
    assert len(calls) == 2


@dataclasses.dataclass(frozen=True)
class Mine(SharedDifficulty):
    """What a method of one's own makes of the features may change without a word."""


def test_methods_of_ones_own_are_not_kept(tmp_path: Path, folder: Path, calls: list[int]) -> None:
    for _ in range(2):
        pool_of(make(tmp_path), Mine())
    assert calls == [30, 30] and not list(folder.iterdir())


def test_a_cache_that_does_not_work_costs_a_warning(
    tmp_path: Path, folder: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = pool_of(make(tmp_path)).state_dict()
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.warns(UserWarning, match="kept embeddings of prompts could not be read"):
        found = pool_of(make(tmp_path)).state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert len(calls) == 2
    monkeypatch.setattr(FeatureCache, "_path", lambda _: tmp_path / "nowhere" / "file")
    with pytest.warns(UserWarning, match="could not be written .* Set HF_ASSETS_CACHE to a folder"):
        pool_of(make(tmp_path))


def test_the_fingerprint_sees_names_shapes_and_types() -> None:
    def of(**tensors: torch.Tensor) -> str:
        module = torch.nn.Module()
        for name, value in tensors.items():
            module.register_buffer(name, value)
        return fingerprint(module, [[1, 2], [3]])

    one = torch.arange(4.0)
    assert of(a=one) == of(a=one.clone())
    different = [
        of(a=one), of(b=one), of(a=one.reshape(2, 2)), of(a=one.view(torch.int32)), of(a=-one),
        of(a=one[:0]), of(a=one.bfloat16()), of(a=one, b=one),
        fingerprint(torch.nn.Module(), [[1], [2, 3]]), fingerprint(torch.nn.Module(), [[1, 2, 3]]),
    ]  # fmt: skip
    assert len(set(different)) == len(different)


def test_progress_is_shown_where_the_trainer_shows_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[Any, ...]] = []

    class Bar:
        def __init__(self, **options: Any) -> None:
            shown.append((options["total"], options["disable"]))

        def __enter__(self) -> None: ...
        def __exit__(self, *_: Any) -> None: ...
        def update(self, count: int) -> None:
            shown.append((count,))

    monkeypatch.setattr(_grpo_embedding, "tqdm", Bar)
    monkeypatch.setattr(_grpo_embedding, "_TOKENS", 40)
    for quiet in (False, True):
        trainer = make(tmp_path, disable_tqdm=quiet)
        embed_prompts(trainer, tokenize_prompts(trainer))
        assert shown[0] == (30, quiet) and sum(entry[0] for entry in shown[1:]) == 30
        assert len(shown) > 4
        shown.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize_prompts(trainer)
