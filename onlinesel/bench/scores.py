"""Scores of a sample from its hidden states against the same scores from its logits.

Compares the scores of UDS (nuclear norm and embedding of the logits) computed from hidden states
and the LM head with the same scores computed from the logits, as the paper (arXiv 2510.16882) does:
logits, singular values, and two Fourier transforms. It also compares ``token_scores`` with a plain
log-softmax. Both sides run in one process, on one sample of synthetic states, with the same number
of threads. Peak memory is measured in a fresh process each.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from onlinesel.bench._settings import machine, threads_set
from onlinesel.kernels import HeadGram, JLProjector, LMHead, logit_nuclear_norm, token_scores

__all__ = ["add_arguments", "bench_scores", "run"]

_PROJECTOR_TIME = 512  # the fixed length of the paper's code


def bench_scores(
    tokens: int = 256,
    width: int = 896,
    vocab: int = 151936,
    repeats: int = 3,
    *,
    threads: int | None = None,
    memory: bool = True,
) -> dict[str, Any]:
    """Time UDS scoring and token scores against the plain way.

    Args:
        tokens: Rows of the sample.
        width: Hidden size.
        vocab: Vocabulary size.
        repeats: Runs of each side after one warm-up; the median is reported.
        threads: Threads of torch for both sides, or None to leave them. Restored at the end.
        memory: Measure peak memory as well, in fresh processes.

    Returns:
        Settings, seconds, speed ratios, relative errors and mebibytes, ready for JSON.

    Raises:
        ValueError: A size or the number of repeats is below 1.

    Example:
        >>> result = bench_scores(tokens=4, width=8, vocab=50, repeats=1, memory=False)
        >>> result["error"]["nuclear_norm"] < 1e-4
        True
    """
    for name, value in (
        ("tokens", tokens), ("width", width), ("vocab", vocab), ("repeats", repeats)
    ):  # fmt: skip
        if value < 1:
            raise ValueError(
                f"bench_scores: {name} must be at least 1, got {value}. Pass a positive integer."
            )
    with threads_set(threads):
        result = _settings(tokens, width, vocab, repeats)
        result.update(_time_all(_inputs(tokens, width, vocab), repeats))
        if memory:
            sizes = (tokens, width, vocab)
            names = ("plain", "uds", "once", "plain_token_scores", "token_scores")
            result["peak_mib"] = {name: _peak_mib(name, sizes) for name in names}
        return result


class _Inputs:
    """One synthetic sample: states with a power-law spectrum and a common mean, and a head."""

    def __init__(self, tokens: int, width: int, vocab: int) -> None:
        generator = torch.Generator().manual_seed(0)
        decay = torch.arange(1, width + 1).float().rsqrt()
        self.hidden = torch.randn(1, tokens, width, generator=generator) * decay
        self.hidden += 0.5 * torch.randn(width, generator=generator) * decay
        self.hidden *= width**0.5 / self.hidden.norm(dim=2, keepdim=True)
        self.head = LMHead(torch.randn(vocab, width, generator=generator).mul_(0.02))
        self.labels = torch.randint(0, vocab, (1, tokens), generator=generator)
        self.projector = JLProjector(vocab, max(_PROJECTOR_TIME, tokens))


def _inputs(tokens: int, width: int, vocab: int) -> _Inputs:
    return _Inputs(tokens, width, vocab)


def _plain_uds(data: _Inputs) -> tuple[Tensor, Tensor]:
    """The paper's way: logits, their singular values, and a transform along each axis."""
    logits = data.hidden[0] @ data.head.weight.T
    norm = torch.linalg.svdvals(logits).sum()
    p = data.projector
    assert p.signs_vocab is not None and p.index_vocab is not None
    assert p.signs_time is not None and p.index_time is not None
    right = torch.fft.fft(logits * p.signs_vocab, dim=1).real[:, p.index_vocab]
    right = right * (p.vocab / p.vocab_dim) ** 0.5
    padded = torch.nn.functional.pad(right, (0, 0, 0, p.time - len(right)))
    left = torch.fft.fft(padded * p.signs_time.unsqueeze(1), dim=0).real[p.index_time]
    return norm, (left * (p.time / p.time_dim) ** 0.5).flatten()


def _plain_tokens(data: _Inputs) -> tuple[Tensor, Tensor]:
    """Loss and entropy from the log-softmax of whole logits."""
    log_p = torch.log_softmax(data.hidden[0] @ data.head.weight.T, dim=1)
    nll = -log_p.gather(1, data.labels[0].unsqueeze(1)).squeeze(1)
    return nll, -(log_p.exp() * log_p).sum(1)


def _once(data: _Inputs) -> tuple[HeadGram, Tensor]:
    """What is paid once per weight version: the factor of the head and the fold."""
    gram = HeadGram(data.head)
    gram.root()
    return gram, data.projector.fold(data.head)


def _time_all(data: _Inputs, repeats: int) -> dict[str, Any]:
    gram, folded = _once(data)
    runs: dict[str, Callable[[], Any]] = {
        "plain": lambda: _plain_uds(data),
        "nuclear_norm": lambda: logit_nuclear_norm(data.hidden, data.head, gram=gram),
        "embedding": lambda: data.projector.project(data.hidden, folded),
        "once_gram": lambda: HeadGram(data.head).root(),
        "once_fold": lambda: data.projector.fold(data.head),
        "plain_token_scores": lambda: _plain_tokens(data),
        "token_scores_same": lambda: token_scores(
            data.hidden, data.head, data.labels, outputs=("nll", "entropy")
        ),
        "token_scores_all": lambda: token_scores(data.hidden, data.head, data.labels),
    }
    outputs: dict[str, Any] = {}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        # The sides take turns, so that what else the machine does falls on all of them. The first
        # turn warms up.
        for _ in range(repeats + 1):
            for name, run in runs.items():
                start = time.perf_counter()
                outputs[name] = run()
                taken[name].append(time.perf_counter() - start)
    seconds = {name: sorted(t[1:])[repeats // 2] for name, t in taken.items()}
    seconds["uds"] = seconds["nuclear_norm"] + seconds["embedding"]
    once = seconds["once_gram"] + seconds["once_fold"]
    norm, embedding = outputs["plain"]
    nll, entropy = outputs["plain_token_scores"]
    scores = outputs["token_scores_all"]
    return {
        "seconds": seconds,
        "speedup": {
            "uds": seconds["plain"] / seconds["uds"],
            "uds_paying_once_every_sample": seconds["plain"] / (seconds["uds"] + once),
            "token_scores": seconds["plain_token_scores"] / seconds["token_scores_same"],
        },
        "error": {
            "nuclear_norm": _relative(outputs["nuclear_norm"], norm),
            "embedding": _relative(outputs["embedding"], embedding),
            "nll": _relative(scores.nll, nll),
            "entropy": _relative(scores.entropy, entropy),
        },
    }


def _relative(ours: Tensor, theirs: Tensor) -> float:
    difference = ours.reshape(-1).double() - theirs.reshape(-1).double()
    return float(difference.norm() / theirs.double().norm())


def _peak_mib(name: str, sizes: tuple[int, int, int]) -> float | None:
    """Run one side in a fresh process; return by how much its memory peaked over its inputs."""
    if not sys.platform.startswith("linux"):
        return None  # the peak of a process is kept in other units, or not at all
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_grow, (name, sizes, torch.get_num_threads()))


def _grow(name: str, sizes: tuple[int, int, int], threads: int) -> float:
    torch.set_num_threads(threads)
    with torch.no_grad():
        data = _inputs(*sizes)
        gram, folded = (HeadGram(data.head), None) if name != "uds" else _once(data)
        torch.linalg.eigvalsh(torch.eye(8))  # loads the solver before the count starts
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the peak to the present size
        start = _status_kib("VmRSS")
        if name == "plain":
            _plain_uds(data)
        elif name == "once":
            _once(data)
        elif name == "plain_token_scores":
            _plain_tokens(data)
        elif name == "token_scores":
            token_scores(data.hidden, data.head, data.labels)
        else:
            assert folded is not None
            logit_nuclear_norm(data.hidden, data.head, gram=gram)
            data.projector.project(data.hidden, folded)
    return (_status_kib("VmHWM") - start) / 1024


def _status_kib(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field + ":"))


def _settings(tokens: int, width: int, vocab: int, repeats: int) -> dict[str, Any]:
    return {
        "what": "UDS scores of one sample: nuclear norm and embedding of its logits",
        "command": f"python -m onlinesel.bench scores --tokens {tokens} --width {width} "
        f"--vocab {vocab} --repeats {repeats} --threads {torch.get_num_threads()}",
        "tokens": tokens,
        "width": width,
        "vocab": vocab,
        "repeats": repeats,
        **machine(),
    }


def _table(result: dict[str, Any]) -> str:
    seconds, peak = result["seconds"], result.get("peak_mib", {})
    rows = [
        ("UDS: logits + svdvals + FFT", "plain", "plain"),
        ("UDS: from the hidden states", "uds", "uds"),
        ("  nuclear norm", "nuclear_norm", ""),
        ("  embedding", "embedding", ""),
        ("once per weight: factor", "once_gram", "once"),
        ("once per weight: fold", "once_fold", ""),
        ("nll, entropy: log_softmax", "plain_token_scores", "plain_token_scores"),
        ("nll, entropy: token_scores", "token_scores_same", ""),
        ("all six: token_scores", "token_scores_all", "token_scores"),
    ]
    lines = [
        f"{result['tokens']} tokens, width {result['width']}, vocabulary {result['vocab']}; "
        f"{result['threads']} threads, {result['processor']}, torch {result['torch']}",
        f"{'':30}{'seconds':>12}{'peak MiB':>12}",
    ]
    for label, timed, sized in rows:
        size = peak.get(sized)
        lines.append(f"{label:30}{seconds[timed]:12.5f}" + (f"{size:12.1f}" if size else ""))
    lines += [f"speed ratio, {name}: {value:.1f}" for name, value in result["speedup"].items()]
    lines += [f"relative difference, {name}: {x:.1e}" for name, x in result["error"].items()]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onlinesel bench scores``."""
    parser.add_argument("--tokens", type=int, default=256, help="rows of the sample")
    parser.add_argument("--width", type=int, default=896, help="hidden size")
    parser.add_argument("--vocab", type=int, default=151936, help="vocabulary size")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each side")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Return the result and its table."""
    result = bench_scores(
        args.tokens, args.width, args.vocab, args.repeats,
        threads=args.threads, memory=not args.no_memory,
    )  # fmt: skip
    return result, _table(result)
