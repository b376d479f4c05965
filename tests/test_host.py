"""What is decided on a device is what would be decided on the host, and takes one or two waits."""

from __future__ import annotations

import pytest
import torch

from onlinesel._base.host import Arriving, host_columns, to_host, upload
from onlinesel.bench._measure import in_fresh_process
from tests.bench.simulated_kinds import SIMULATES
from tests.simulated_plans import CASES, copies, plans

simulated = pytest.mark.skipif(not SIMULATES, reason="torch takes no device written in Python")


@simulated
@pytest.mark.slow
def test_a_plan_is_the_same_wherever_its_batches_are() -> None:
    for case, found in zip(CASES, in_fresh_process(plans), strict=True):
        assert found["device"] == found["host"], case
        assert found["known"] == found["host"], case
        # One copy of labels, masks and ids, where the host has them not, and one of the scores.
        assert (found["device waits"], found["known waits"]) == (2, 1), case


@simulated
def test_copies_bring_the_values_and_wait_as_often_as_they_say() -> None:
    found = in_fresh_process(copies)
    waits = {name: value for name, value in found.items() if name.endswith("waits")}
    assert waits == {
        "to_host waits": 1, "upload waits": 0, "arriving waits": 0, "scores waits": 0,
        "taken waits": 0, "joined waits": 1, "trimmed waits": 1,
    }  # fmt: skip
    assert all(value is True for name, value in found.items() if name not in waits), found


def test_nothing_is_copied_on_the_host() -> None:
    batch = {"labels": torch.ones(1, 2), "attention_mask": torch.ones(1, 2)}
    ids = torch.tensor([7])
    assert host_columns([batch], [ids])[0] == [{}]
    assert host_columns([batch], [ids])[1][0][0] is ids
    assert to_host([ids])[0] is ids and upload(ids, "cpu") is ids and Arriving(ids).get() is ids
