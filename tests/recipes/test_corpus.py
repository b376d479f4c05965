"""The demo's data: parts that share no file, the same every time, and corruption as described."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("tokenizers")

from onlinesel.recipes._corpus import (  # noqa: E402
    PARTS,
    CorpusSettings,
    build_corpus,
    corrupt,
    library_files,
    part_of,
    split_files,
    train_tokenizer,
)

SMALL = CorpusSettings(vocab=300, length=16, intact=4, held_out=5, warm=20, pool=12)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A library of 40 files, each with a word of its own, beside what is to be skipped."""
    for number in range(40):
        folder = tmp_path / ("package" if number % 2 else "")
        folder.mkdir(exist_ok=True)
        text = f"def function_{number}(x):\n    return x + {number}\n" * 12
        (folder / f"module_{number}.py").write_text(text, "utf-8")
    for skipped in (
        "test/test_a.py",
        "package/tests/a.py",
        "encodings/cp1.py",
        "site-packages/b.py",
    ):
        path = tmp_path / skipped
        path.parent.mkdir(parents=True)
        path.write_text("skipped = 1\n", "utf-8")
    (tmp_path / "notes.txt").write_text("not source", "utf-8")
    return tmp_path


def test_files_are_sources_outside_of_tests_and_tables(library: Path) -> None:
    files = library_files(library)
    assert len(files) == 40
    assert files == sorted(files) and not any(path.is_absolute() for path in files)


def test_every_file_is_in_exactly_one_part() -> None:
    files = library_files()
    parts = split_files(files, seed=0)
    assert sorted(file for part in parts.values() for file in part) == files
    assert set(parts) == set(PARTS) and all(parts.values())
    shares = {part: len(found) / len(files) for part, found in parts.items()}
    assert shares == pytest.approx(PARTS, abs=0.06)


def test_the_part_of_a_file_depends_on_its_name_and_the_seed_alone() -> None:
    names = [Path(f"package/module_{i}.py") for i in range(200)]
    before = {name: part_of(name, 0) for name in names}
    assert {name: part_of(name, 0) for name in reversed(names)} == before
    moved = sum(part_of(name, 1) != part for name, part in before.items())
    assert 60 < moved < 160


def test_corruption_keeps_the_start_and_the_tokens_of_every_row() -> None:
    rows = torch.randint(50, (30, 24), generator=torch.Generator().manual_seed(1))
    noisy = corrupt(rows, 8, torch.Generator().manual_seed(2))
    assert torch.equal(noisy[:, :8], rows[:, :8])
    assert torch.equal(noisy.sort(dim=1).values, rows.sort(dim=1).values)
    assert (noisy[:, 8:] != rows[:, 8:]).any(dim=1).all()


def test_rows_are_not_all_shuffled_alike() -> None:
    noisy = corrupt(torch.arange(24).repeat(6, 1), 8, torch.Generator().manual_seed(2))
    assert len({tuple(row) for row in noisy.tolist()}) == 6


def test_the_corpus_is_the_same_every_time(library: Path) -> None:
    first, second = build_corpus(SMALL, library), build_corpus(SMALL, library)
    for name in ("held_out", "warm", "pool", "corrupted"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert first.tokenizer.to_str() == second.tokenizer.to_str()


def test_the_parts_of_the_corpus_come_from_their_own_files(library: Path) -> None:
    corpus = build_corpus(SMALL, library)
    assert corpus.pool.shape == (12, 16) and corpus.held_out.shape == (5, 16)
    assert corpus.corrupted.tolist() == [False, True] * 6
    files = split_files(library_files(library), SMALL.seed)
    texts = {part: "".join((library / f).read_text("utf-8") for f in files[part]) for part in PARTS}
    clean = corpus.pool[~corpus.corrupted]
    for part, rows in (("held_out", corpus.held_out), ("warm", corpus.warm), ("train", clean)):
        own = "<|endoftext|>".join((library / f).read_text("utf-8") for f in files[part])
        for text in corpus.tokenizer.decode_batch(rows.tolist(), skip_special_tokens=False):
            assert text in own + "<|endoftext|>"
    assert all(texts.values())


def test_the_tokenizer_gives_back_any_text() -> None:
    tokenizer = train_tokenizer(["def f(x): return x"] * 5, 270)
    text = "  Übung\t水\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.get_vocab_size() <= 270


def test_too_little_source_is_refused(library: Path) -> None:
    settings = CorpusSettings(vocab=300, length=16, held_out=5, warm=10**6, pool=12)
    with pytest.raises(ValueError) as caught:
        build_corpus(settings, library)
    assert str(caught.value).startswith(
        f"build_corpus: the standard library must give 1000000 rows for warm in {library}, got "
    )
    assert str(caught.value).endswith(
        "Use a Python that carries its library as source files, or ask for fewer rows."
    )
