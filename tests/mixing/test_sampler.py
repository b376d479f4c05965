from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from onlinesel.mixing import ODM, DomainSampler, DoReMi, FixedMixture, Mixture
from tests.mixing.contract_table import DOMAINS
from tests.mixing.hosts import DATA, same_state


@dataclass(frozen=True)
class Switch(Mixture):
    """Draws from domain 0 alone, and after n observations from domain n alone."""

    domains: int

    def init(self, sizes: Tensor) -> dict[str, Tensor]:
        return {"now": torch.tensor(0)}

    def proportions(self, state: dict[str, Tensor]) -> Tensor:
        return torch.eye(self.domains, dtype=torch.float64)[state["now"]]

    def observe(self, domain, loss, state, *, reference_loss=None):  # type: ignore[no-untyped-def]
        return {"now": state["now"] + 1}


def switching(rows: int = 30, domains: int = 3, **kwargs: Any) -> DomainSampler:
    return DomainSampler(torch.arange(rows) % domains, Switch(domains), seed=0, **kwargs)


def tell(sampler: DomainSampler, **kwargs: Any) -> None:
    sampler.observe(torch.tensor([0]), torch.tensor([1.0]), **kwargs)


def places(rows: list[int], domains: int = 3) -> list[int]:
    return [row % domains for row in rows]


# Draws ----------------------------------------------------------------------------------------


def test_domains_come_in_their_proportions() -> None:
    domains = torch.arange(300) % 3
    sampler = DomainSampler(domains, FixedMixture((0.7, 0.2, 0.1)), seed=0, length=20_000)
    counts = Counter(places(list(sampler)))
    for place, share in enumerate((0.7, 0.2, 0.1)):
        spread = (20_000 * share * (1 - share)) ** 0.5
        assert abs(counts[place] - 20_000 * share) < 4 * spread


def test_a_domain_of_share_0_is_never_drawn() -> None:
    for weights in ((0.0, 1.0, 2.0), (1.0, 0.0, 2.0), (1.0, 2.0, 0.0)):
        sampler = DomainSampler(torch.arange(30) % 3, FixedMixture(weights), seed=1, length=9_000)
        drawn = set(places(list(sampler)))
        assert drawn == {place for place, weight in enumerate(weights) if weight}


def test_in_the_proportions_of_the_data_a_long_epoch_is_nearly_the_data() -> None:
    sampler = DomainSampler(torch.arange(900) % 3, FixedMixture(), seed=0)
    assert len(set(sampler)) > 800  # a draw with replacement would see 569


def test_draws_of_domains_are_independent_of_each_other_across_epochs_and_seeds() -> None:
    drawn = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        sampler = DomainSampler(torch.arange(2000) % 2, FixedMixture(), seed=seed)
        sampler.epoch = epoch
        drawn.append(torch.tensor(places(list(sampler), 2)))
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs((drawn[a] == drawn[b]).double().mean().item() - 0.5) < 0.05
    again = DomainSampler(torch.arange(2000) % 2, FixedMixture(), seed=0)
    assert places(list(again), 2) == drawn[0].tolist()


def test_a_draw_is_made_in_the_proportions_in_force_when_it_is_made() -> None:
    sampler = switching()
    rows = iter(sampler)
    first = list(islice(rows, 7))
    tell(sampler)
    second = list(islice(rows, 1))
    tell(sampler)
    rest = list(rows)
    assert places(first + second + rest) == [0] * 7 + [1] + [2] * 22
    assert len(set(first)) == 7 and set(rest) == set(range(2, 30, 3))  # 10 rows, 22 draws


def test_new_proportions_may_act_later() -> None:
    sampler = switching()
    rows = iter(sampler)
    drawn = list(islice(rows, 4))
    tell(sampler, at=9)
    drawn += list(islice(rows, 2))
    assert sampler.metrics() == {"share/0": 0.0, "share/1": 1.0, "share/2": 0.0}
    tell(sampler, at=12)
    assert places(drawn + list(rows)) == [0] * 9 + [1] * 3 + [2] * 18


def test_later_proportions_that_were_overtaken_never_act() -> None:
    for at, want in (
        (None, [0] * 4 + [2] * 26),
        (6, [0] * 6 + [2] * 24),
        (9, [0] * 9 + [2] * 21),
    ):
        sampler = switching()
        rows = iter(sampler)
        drawn = list(islice(rows, 4))
        tell(sampler, at=9)
        tell(sampler, at=at)
        assert places(drawn + list(rows)) == want


def test_what_was_to_act_after_the_end_acts_in_the_next_epoch() -> None:
    sampler = switching()
    rows = list(sampler)
    tell(sampler)
    assert places(rows) == [0] * 30
    sampler.epoch = 1
    assert places(list(sampler)) == [1] * 30


def test_ranks_that_looked_ahead_differently_agree_on_a_draw_that_is_told() -> None:
    drawn = []
    for ahead in (2, 5):
        sampler = switching()
        rows = iter(sampler)
        begun = list(islice(rows, ahead))
        tell(sampler, at=6)
        drawn.append(begun + list(rows))
    assert drawn[0] == drawn[1]


def test_a_chunk_of_random_numbers_is_no_boundary() -> None:
    # More draws than are made ready at once, with a change in the midst and one at the edge.
    sampler = switching(rows=9_000, length=9_000)
    rows = iter(sampler)
    drawn = list(islice(rows, 4_096))
    tell(sampler)
    drawn += list(islice(rows, 1_000))
    tell(sampler)
    assert places(drawn + list(rows)) == [0] * 4_096 + [1] * 1_000 + [2] * 3_904
    mixed = DomainSampler(torch.arange(9_000) % 3, FixedMixture(), seed=0)
    stepwise, whole = [], list(mixed)
    rows = iter(mixed)
    while batch := list(islice(rows, 7)):
        stepwise += batch
    assert stepwise == whole and len(set(whole[:4_096]) & set(whole[4_096:])) < 300


# Epochs ---------------------------------------------------------------------------------------


def test_the_same_epoch_gives_the_same_rows_again() -> None:
    sampler = switching()
    rows = iter(sampler)
    drawn = list(islice(rows, 8))
    tell(sampler)
    drawn += list(islice(rows, 3))
    tell(sampler)
    # Today's proportions are those of domain 2; the first eleven draws were made before.
    assert list(islice(iter(sampler), 11)) == drawn
    replayed = list(sampler)
    assert replayed[:11] == drawn and places(replayed) == [0] * 8 + [1] * 3 + [2] * 19
    assert list(rows) == replayed[11:]


def test_the_order_of_a_domain_goes_on_where_the_last_epoch_ended() -> None:
    sampler = DomainSampler(torch.zeros(10, dtype=torch.int64), FixedMixture(), seed=0, length=4)
    drawn = []
    for epoch in range(5):
        sampler.epoch = epoch
        drawn.append(list(sampler))
        assert list(sampler) == drawn[-1]  # looking twice draws nothing more
    flat = [row for rows in drawn for row in rows]
    assert set(flat[:10]) == set(flat[10:]) == set(range(10)) and flat[:10] != flat[10:]


def test_an_epoch_that_ends_early_leaves_its_rows_to_the_next() -> None:
    sampler = DomainSampler(torch.zeros(10, dtype=torch.int64), FixedMixture(), seed=0)
    first = list(islice(iter(sampler), 3))
    sampler.epoch = 1
    assert set(first).isdisjoint(islice(iter(sampler), 7))


def test_the_epoch_is_that_of_the_call_of_iter() -> None:
    sampler = DomainSampler(torch.arange(50) % 2, FixedMixture(), seed=0)
    early = iter(sampler)
    sampler.epoch = 1
    late = list(sampler)
    assert list(early) != late
    assert list(sampler) == late


def test_in_a_data_loader_with_workers() -> None:
    sampler = switching()
    loader = DataLoader(range(30), batch_size=5, sampler=sampler, num_workers=1)  # type: ignore[arg-type]
    drawn = []
    for batch in loader:
        drawn += batch.tolist()
        tell(sampler) if len(drawn) == 5 else None
    # Two batches a worker were asked for beforehand, and one more with the first one taken.
    assert places(drawn) == [0] * 15 + [1] * 15


def test_it_can_be_sent_to_a_process() -> None:
    sampler = DomainSampler(DATA, ODM(), seed=5)
    copy = pickle.loads(pickle.dumps(sampler))
    assert list(copy) == list(sampler)


# Losses ---------------------------------------------------------------------------------------


def test_losses_of_rows_reach_their_domains() -> None:
    mixture = DoReMi(reference=(1.0, 1.0, 1.0, 1.0))
    sampler = DomainSampler(DATA, mixture, seed=0)
    ids = torch.tensor([0, 5, 1, 0])  # labels -7, 3, 40 and -7 again
    assert DATA[ids].tolist() == [-7, 3, 40, -7]
    sampler.observe(ids, torch.tensor([2.0, 4.0, 1.5, 3.0], requires_grad=True))
    state = mixture.init(torch.tensor([4, 4, 4, 48]))
    domain, loss = torch.tensor([0, 1, 3, 0]), torch.tensor([2.0, 4.0, 1.5, 3.0])
    want = mixture.proportions(mixture.observe(domain, loss, state))
    assert torch.equal(sampler.proportions, want)
    assert list(sampler.metrics()) == ["share/-7", "share/3", "share/11", "share/40"]
    assert sampler.metrics()["share/3"] == want[1].item() == max(sampler.metrics().values())


def test_reference_losses_are_passed_on() -> None:
    sampler = DomainSampler(DATA, DoReMi(), seed=0)
    sampler.observe(
        torch.tensor([0, 1]), torch.tensor([2.0, 2.0]), reference_loss=torch.tensor([3.0, 1.0])
    )
    assert max(sampler.metrics(), key=sampler.metrics().__getitem__) == "share/40"
    with pytest.raises(ValueError, match="DoReMi: reference_loss must come with every row"):
        sampler.observe(torch.tensor([0]), torch.tensor([2.0]))


def test_proportions_that_stay_are_not_written_down() -> None:
    sampler = DomainSampler(DATA, FixedMixture(), seed=0)
    odm = DomainSampler(DATA, ODM(), seed=0)
    for _ in range(9):
        for one in (sampler, odm):
            list(islice(iter(one), 5))
            tell(one)
    assert sampler.state_dict()["tensors"]["firsts"].tolist() == [0]
    # The bandit is uniform for its first steps; all that came after draw 5 begins there.
    assert odm.state_dict()["tensors"]["firsts"].tolist() == [0, 5]
    assert odm.state_dict()["tensors"]["shares"].shape == (2, DOMAINS)


# Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "args", "kwargs", "message"),
    [
        (TypeError, (DATA, ODM), {}, r"mixture must be a Mixture instance, got <class .*\. Pass "),
        (TypeError, (DATA.float(), ODM()), {}, r"domains must be an integer tensor, got torch\.f"),
        (TypeError, ([0, 1], ODM()), {}, r"domains must be an integer tensor, got list\. Number"),
        (ValueError, (DATA[:0], ODM()), {}, r"domains must have one number per row .* \(0,\)\."),
        (ValueError, (DATA[None], ODM()), {}, r"domains must have one number per row .* \(1, 60\)"),
        (ValueError, (DATA, ODM()), {"length": 0}, r"length must be at least 1, got 0\. Say how "),
    ],
)
def test_bad_arguments_are_refused(
    kind: type[Exception], args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(kind, match=rf"^DomainSampler: {message}"):
        DomainSampler(*args, seed=0, **kwargs)


@pytest.mark.parametrize(
    ("ids", "kwargs", "message"),
    [
        ([3, 60], {}, r"ids must be row numbers below 60, got 60\. Number the rows of the dataset"),
        ([-1, 3], {}, r"ids must be row numbers below 60, got -1\."),
        ([1], {}, r"loss must have one entry per id \(1,\), got \(2,\)\. Pass mean losses of rows"),
        ([1, 2], {"reference_loss": torch.ones(3)}, r"reference_loss must have one entry per id"),
        ([1, 2], {"at": 7}, r"at must be at least the number of draws made \(8\), got 7\. Pass a "),
    ],
)
def test_losses_that_fit_no_row_are_refused(
    ids: list[int], kwargs: dict[str, Any], message: str
) -> None:
    sampler = DomainSampler(DATA, ODM(), seed=0)
    list(islice(iter(sampler), 8))
    before = sampler.state_dict()
    with pytest.raises(ValueError, match=rf"^DomainSampler: {message}"):
        sampler.observe(torch.tensor(ids), torch.ones(2), **kwargs)
    assert same_state(sampler.state_dict(), before)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            DomainSampler(DATA, ODM(decay=0.5), seed=0),
            r"mixture ODM\(decay=0\.9, .*\), got ODM\(decay=0\.5, .*\)\. Resume with the mixture",
        ),
        (DomainSampler(DATA, ODM(), seed=0, length=9), r"length 60, got 9\. Resume with the len"),
        (DomainSampler(DATA + 1, ODM(), seed=0, length=60), r"domains and their sizes \[\[-7, 3, "),
        (
            DomainSampler(DATA[:30], ODM(), seed=0, length=60),
            r"domains and their sizes .*24\]\]\. ",
        ),
        (DomainSampler(DATA * 0, ODM(), seed=0, length=60), r"domains and .*, got \[\[0\], \[60\]"),
    ],
)
def test_a_state_of_another_run_is_refused(other: DomainSampler, message: str) -> None:
    sampler = DomainSampler(DATA, ODM(), seed=0)
    before = sampler.state_dict()
    with pytest.raises(ValueError, match=rf"^DomainSampler: state must be of the same {message}"):
        sampler.load_state_dict(other.state_dict())
    assert same_state(sampler.state_dict(), before)
