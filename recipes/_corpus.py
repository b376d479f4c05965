"""Real text that every Python carries: the sources of its standard library, as rows of tokens.

The files, not the rows, are split into held-out, warm-up and training parts, so no part has seen
the neighbourhood of another part's rows. Half of the pool is corrupted on purpose.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

__all__ = [
    "PARTS",
    "Corpus",
    "CorpusSettings",
    "build_corpus",
    "corrupt",
    "library_files",
    "part_of",
    "split_files",
    "train_tokenizer",
]

PARTS = {"held_out": 0.10, "warm": 0.50, "train": 0.40}
"""Share of the files in each part."""

# Tests, character tables and help texts packed into one literal are not code and prose.
_SKIPPED = {
    "__pycache__", "dist-packages", "encodings", "idle_test", "pydoc_data", "site-packages",
    "test", "tests",
}  # fmt: skip
_END = "<|endoftext|>"


@dataclass(frozen=True)
class CorpusSettings:
    """How the corpus is cut; the same settings and the same Python give the same corpus.

    Args:
        seed: Of the split, of the order of the rows and of the corruption.
        vocab: Size of the tokenizer's vocabulary.
        length: Tokens of a row.
        intact: Tokens at the start of a corrupted row that stay in place.
        held_out: Rows of the held-out part.
        warm: Rows of the warm-up part.
        pool: Rows of the pool to fine-tune on; every second one is corrupted.
    """

    seed: int = 0
    vocab: int = 2048
    length: int = 128
    intact: int = 32
    held_out: int = 200
    warm: int = 3600
    pool: int = 3072


@dataclass(frozen=True)
class Corpus:
    """Rows of tokens, ``(rows, length)`` int64; ``corrupted`` is a ``(pool,)`` mask."""

    tokenizer: Tokenizer
    held_out: Tensor
    warm: Tensor
    pool: Tensor
    corrupted: Tensor


def library_files(root: Path | None = None) -> list[Path]:
    """Return the source files of the standard library, relative to its folder, sorted.

    Args:
        root: Folder to look in; that of the running Python by default.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    found = (path.relative_to(root) for path in root.rglob("*.py"))
    return sorted(path for path in found if not _SKIPPED & set(path.parts[:-1]))


def part_of(file: Path, seed: int) -> str:
    """Return the part that a file belongs to, from a hash of its name alone.

    A Python that has some files more or fewer keeps the others where they are.

    Example:
        >>> part_of(Path("json/decoder.py"), 0) in PARTS
        True
    """
    digest = hashlib.sha256(f"{seed}:{file.as_posix()}".encode()).digest()
    at = int.from_bytes(digest[:8], "big") / 2**64
    for part, share in PARTS.items():
        at -= share
        if at < 0:
            return part
    return part


def split_files(files: Iterable[Path], seed: int) -> dict[str, list[Path]]:
    """Return the files of each part; every file is in exactly one."""
    parts: dict[str, list[Path]] = {part: [] for part in PARTS}
    for file in files:
        parts[part_of(file, seed)].append(file)
    return parts


def train_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer made from the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def corrupt(rows: Tensor, intact: int, generator: torch.Generator) -> Tensor:
    """Return the rows with the tokens after the first ``intact`` shuffled, each row on its own.

    Example:
        >>> rows = torch.arange(8).view(1, 8)
        >>> noisy = corrupt(rows, 4, torch.Generator().manual_seed(0))
        >>> noisy[0, :4].tolist(), noisy[0].sort().values.tolist()
        ([0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7])
    """
    tail = rows[:, intact:]
    order = torch.rand(tail.shape, generator=generator).argsort(dim=1)
    return torch.cat([rows[:, :intact], tail.gather(1, order)], dim=1)


def build_corpus(settings: CorpusSettings, root: Path | None = None) -> Corpus:
    """Read the standard library and cut it into rows.

    Args:
        settings: Sizes and seed.
        root: Folder of the sources; that of the running Python by default.

    Raises:
        ValueError: The folder has too little source for the rows asked for.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files = split_files(library_files(root), settings.seed)
    texts = {part: [_text(root / file) for file in names] for part, names in files.items()}
    # The held-out files may not even shape the vocabulary.
    tokenizer = train_tokenizer(texts["warm"], settings.vocab)
    generator = torch.Generator().manual_seed(settings.seed)
    wanted = {"held_out": settings.held_out, "warm": settings.warm, "train": settings.pool}
    rows = {
        part: _rows(tokenizer, texts[part], settings.length, count, generator, f"{part} in {root}")
        for part, count in wanted.items()
    }
    corrupted = torch.arange(settings.pool) % 2 == 1
    pool = rows["train"].clone()
    pool[corrupted] = corrupt(pool[corrupted], settings.intact, generator)
    return Corpus(tokenizer, rows["held_out"], rows["warm"], pool, corrupted)


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", errors="replace")


def _rows(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    length: int,
    count: int,
    generator: torch.Generator,
    where: str,
) -> Tensor:
    """Return ``count`` rows in random order, cut from the files laid end to end."""
    end = tokenizer.token_to_id(_END)
    encoded = tokenizer.encode_batch(list(texts))
    stream = [token for one in encoded for token in (*one.ids, end)]
    found = len(stream) // length
    if found < count:
        raise ValueError(
            f"build_corpus: the standard library must give {count} rows for {where}, got {found}. "
            "Use a Python that carries its library as source files, or ask for fewer rows."
        )
    rows = torch.tensor(stream[: found * length]).view(found, length)
    return rows[torch.randperm(found, generator=generator)[:count]]
