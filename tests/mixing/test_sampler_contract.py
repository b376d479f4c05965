"""What DomainSampler must do with every mixture: constant epochs, whole cycles, exact resuming."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onlinesel.mixing import DomainSampler
from tests.mixing.contract_table import CASES, Case
from tests.mixing.hosts import DATA, LABELS, NUMBERS, ROWS, Host, same_state, travel

every = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@every
def test_an_epoch_has_the_same_length_whatever_the_proportions(case: Case) -> None:
    host = Host(case, ahead=2)
    for epoch in range(4):
        host.train(epoch)
        assert len(host.sampler) == 52 and len(host.batches) == 13 * (epoch + 1)
    sampler = DomainSampler(DATA, case.build(NUMBERS), seed=0)
    assert len(list(sampler)) == len(sampler) == ROWS


@every
@pytest.mark.parametrize("ahead", [0, 3])
def test_every_row_of_a_domain_is_seen_before_any_comes_back(case: Case, ahead: int) -> None:
    host = Host(case, ahead)
    drawn: dict[int, list[int]] = {label: [] for label in LABELS}
    for epoch in range(6):
        host.train(epoch)
    for row in (row for batch in host.batches for row in batch):
        drawn[int(DATA[row])].append(row)
    again = 0
    for label, rows in drawn.items():
        size = int((DATA == label).sum())
        cycles = [rows[i : i + size] for i in range(0, len(rows), size)]
        assert all(len(set(cycle)) == len(cycle) for cycle in cycles)
        again += sum(len(cycle) == size and cycle != cycles[0] for cycle in cycles[1:])
    assert again > 3  # cycles that were shuffled anew


@every
@settings(max_examples=12)
@given(stop=st.tuples(st.integers(0, 2), st.integers(0, 13)), ahead=st.integers(0, 3))
def test_a_resumed_run_equals_one_that_was_never_stopped(
    case: Case, stop: tuple[int, int], ahead: int
) -> None:
    whole, stopped = Host(case, ahead), Host(case, ahead)
    for epoch in range(3):
        whole.train(epoch)
    for epoch in range(stop[0]):
        stopped.train(epoch)
    stopped.train(stop[0], last=stop[1])
    resumed = Host(case, ahead, seed=99)
    list(islice(iter(resumed.sampler), 9))  # nothing of which counts after loading
    resumed.sampler.load_state_dict(travel(stopped.sampler.state_dict()))
    assert resumed.sampler.epoch == stop[0]
    resumed.train(stop[0], first=stop[1])
    for epoch in range(stop[0] + 1, 3):
        resumed.train(epoch)
    assert stopped.batches + resumed.batches == whole.batches
    for got, want in zip(stopped.shares + resumed.shares, whole.shares, strict=True):
        assert torch.equal(got, want)
    assert same_state(resumed.sampler.state_dict(), whole.sampler.state_dict())
    # Which would mean nothing if the losses had not moved what is drawn.
    assert case.adapts != torch.equal(whole.shares[0], whole.shares[-1])


@every
def test_the_state_is_not_changed_by_what_comes_after(case: Case) -> None:
    host = Host(case, ahead=1)
    host.train(0, last=5)
    state = host.sampler.state_dict()
    copy = travel(state)
    host.train(1)
    assert same_state(state, copy)
    other = Host(case, ahead=1)
    other.sampler.load_state_dict(state)
    other.train(0, first=5)
    assert same_state(state, copy)
