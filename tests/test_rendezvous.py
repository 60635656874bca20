"""Hosts that are cut off, killed and started at random come together at one place again."""

import os
import random
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from checkpointing.beats import BEAT_SECONDS, Beats
from checkpointing.incarnation import SILENT_SECONDS, claim_run
from launch.rendezvous import (
    Membership,
    Owner,
    Place,
    Reach,
    Verdict,
    Watch,
    judge,
    place_to_judge,
)
from storage.errors import RunBusyError
from storage.log import Log
from storage.store import LocalStore, Store, open_store

OWNERS = [None, *(Owner(generation=1, job="j", place=1, live=live) for live in (True, False, None))]


def test_beside_a_live_owner_or_one_of_whom_nothing_is_known_no_place_is_made() -> None:
    for reach, mine, owner, seconds, in_vain in product(
        Reach, (True, False), OWNERS, (0.0, 1e9), (0, 3, 1000)
    ):
        verdict = judge(reach, mine=mine, owner=owner, unreachable_seconds=seconds, in_vain=in_vain)
        if owner is not None and owner.live is not False:
            assert verdict is not Verdict.REPLACE
        if mine or reach is Reach.OPEN:
            assert verdict is Verdict.USE
        elif seconds == 0.0:
            assert verdict is Verdict.LOOK
        elif owner is None or owner.live is False:
            assert verdict is Verdict.REPLACE, "or the run would stand for ever"


def test_a_live_owner_keeps_its_place_though_there_is_a_newer_one() -> None:
    expected = {True: 1, False: 3, None: None}
    for live, place in expected.items():
        owner = Owner(generation=4, job="j", place=1, live=live)
        assert place_to_judge([1, 2, 3], owner) == place
        assert place_to_judge([1], owner) == 1
    assert place_to_judge([1, 2], None) == 2
    unknown = Owner(generation=4, job="j", place=0, live=True)
    assert place_to_judge([1, 2], unknown) == 2


class Shared:
    """A store that all hosts reach, in memory."""

    url = "memory"

    def __init__(self, created: Callable[[], None] = lambda: None) -> None:
        self.objects: dict[str, bytes] = {}
        self._created = created

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self._created()
        return self.objects.setdefault(key, data) is data

    def get(self, key: str) -> bytes:
        return self.objects[key]

    def list(self, prefix: str, start_after: str = "") -> list[str]:
        return sorted(k for k in self.objects if k.startswith(prefix) and k > start_after)


@dataclass
class Host:
    """One host: down, looking for a place, or with an agent at a place."""

    number: int
    up: bool = True
    part: int = 0
    """Hosts of one part of the network reach each other."""
    membership: Membership | None = None
    watching_since: float = 0.0
    looks_at: float = 0.0
    place: Place | None = None
    holds: bool = False
    agent_since: float = 0.0


@dataclass
class World:
    """Ranks that train together, and own the run."""

    place: int
    members: frozenset[int]
    generation: int
    began: float
    ended: float | None = None
    broken: float | None = None


class Cluster:
    """Supervisors, agents and worlds, second by second; only `Membership` is the real thing.

    An agent listens after some seconds; a world begins 5 s after its last member came, and ends
    when the members change, or 20 s after one of them cannot be reached; then its agents end.
    """

    def __init__(self, count: int, seed: int, start_seconds: float = 3.0) -> None:
        self.random = random.Random(seed)
        self.start_seconds = start_seconds
        self.now = 0.0
        self.store = Shared(self._a_place_is_made)
        self.hosts = [Host(number) for number in range(count)]
        self.world: World | None = None
        self.busy = 0

    def tick(self) -> None:
        self.now += 1.0
        for host in self.random.sample(self.hosts, len(self.hosts)):
            if host.up and host.place is None and self.now >= host.looks_at:
                self._look(host)
            elif host.up and host.place is not None:
                self._mind(host)
        self._end_worlds()
        self._begin_worlds()

    def run(self, seconds: int, fault: Callable[[], None] = lambda: None) -> None:
        for _ in range(seconds):
            fault()
            self.tick()

    def fault(self) -> None:
        """Now and then a host loses power or starts, or the network falls apart or heals."""
        chance = self.random.random()
        host = self.random.choice(self.hosts)
        if chance < 0.01 and host.up:
            host.up, host.place, host.membership = False, None, None
        elif chance < 0.03:
            host.up = True
        elif chance < 0.04:
            for each in self.hosts:
                each.part = self.random.randrange(2)
        elif chance < 0.05:
            self.heal()

    def heal(self) -> None:
        for host in self.hosts:
            host.up, host.part = True, 0

    def reaches(self, one: Host, other: Host) -> bool:
        return one.up and other.up and one.part == other.part

    def _a_place_is_made(self) -> None:
        assert self.world is None or self.world.ended is not None, "beside a live run"

    def _look(self, host: Host) -> None:
        if host.membership is None:
            host.watching_since = self.now
            host.membership = self._member(host)
        host.looks_at = self.now + self.random.choice((1.0, 2.0))
        found = host.membership.look()
        if found is not None:
            host.place, host.holds = found
            host.agent_since = self.now

    def _member(self, host: Host) -> Membership:
        def owner() -> Owner | None:
            world = self.world
            if world is None:
                return None
            since = max(host.watching_since, world.began)
            heard = (world.ended or self.now) - since >= 5 or world.began > host.watching_since
            quiet = world.ended is not None and self.now - max(world.ended, since) >= 10
            live = False if quiet else True if heard else None
            return Owner(generation=world.generation, job="j", place=world.place, live=live)

        def reach(address: str, port: int) -> Reach:
            other = self.hosts[int(address)]
            if not self.reaches(host, other):
                return Reach.SILENT
            listens = other.holds and other.place is not None and other.place.address == address
            ready = listens and self.now - other.agent_since >= self.start_seconds
            return Reach.OPEN if ready else Reach.REFUSED

        return Membership(
            self.store,  # type: ignore[arg-type]
            job="j",
            address=str(host.number),
            host=f"host{host.number}",
            owner=owner,
            reach=reach,
            free_port=lambda: 1,
            clock=lambda: self.now,
        )

    def _mind(self, host: Host) -> None:
        """As the supervisor does, while no rank lives."""
        world = self.world
        assert host.place is not None and host.membership is not None
        if world is not None and world.ended is None and host.number in world.members:
            return
        if (self.now - host.agent_since) % 3 == 0 and host.membership.outdated(host.place):
            self._end_agent(host)

    def _end_agent(self, host: Host) -> None:
        host.place, host.holds = None, False
        host.looks_at = self.now + self.random.uniform(1, 3)

    def _meeting(self) -> dict[int, list[Host]]:
        """Agents that are connected to the holder of their place, by its number."""
        met: dict[int, list[Host]] = {}
        for holder in self.hosts:
            if holder.up and holder.holds and holder.place and self._has_started(holder):
                number = holder.place.number
                met[number] = [
                    host
                    for host in self.hosts
                    if host.place and host.place.number == number and self.reaches(host, holder)
                    if self._has_started(host)
                ]
        return met

    def _has_started(self, host: Host) -> bool:
        return self.now - host.agent_since >= self.start_seconds

    def _end_worlds(self) -> None:
        world = self.world
        if world is None or world.ended is not None:
            return
        members = [self.hosts[number] for number in world.members]
        whole = all(self.reaches(members[0], host) and host.place for host in members)
        if whole:
            world.broken = None
            joined = {host.number for host in self._meeting().get(world.place, members)}
            if joined != world.members:
                world.ended = self.now  # torchrun starts all of them again, together
            return
        world.broken = world.broken or self.now
        if self.now - world.broken >= 20 or not any(host.up for host in members):
            world.ended = self.now
            for host in members:
                if host.up:
                    self._end_agent(host)

    def _begin_worlds(self) -> None:
        for number, hosts in self._meeting().items():
            newest = max(host.agent_since for host in hosts)
            if self.now - newest < self.start_seconds + 5:
                continue
            world = self.world
            if world is None or world.ended is not None:
                generation = world.generation + 1 if world else 1
                members = frozenset(host.number for host in hosts)
                self.world = World(number, members, generation, self.now)
            elif world.place != number and self.now - newest > self.start_seconds + 25:
                self.busy += 1  # the claim waits for beats, hears some, and leaves
                for host in hosts:
                    self._end_agent(host)


@pytest.mark.parametrize("seed", range(30))
def test_hosts_with_random_faults_train_on_and_come_together_when_all_is_well(seed: int) -> None:
    """Also where an agent takes a minute until it listens, longer than anybody waits at first."""
    start_seconds = 60.0 if seed % 3 == 2 else 3.0
    cluster = Cluster(count=2 + seed % 4, seed=seed, start_seconds=start_seconds)
    cluster.run(600, cluster.fault)
    cluster.hosts[0].up = True
    cluster.run(200 + 20 * int(start_seconds))
    assert cluster.world is not None and cluster.world.ended is None, "parted, and all stand still"
    cluster.heal()
    cluster.run(200 + 20 * int(start_seconds))
    world = cluster.world
    assert world is not None and world.members == {host.number for host in cluster.hosts}
    assert world.ended is None and cluster.now - world.began > 60, "for good"
    assert cluster.world is world
    assert {host.place.number for host in cluster.hosts if host.place} == {world.place}


def broken_runs(name: str, wrong: Callable[..., object]) -> int:
    """Of 30 runs, those that do not come together when one function is replaced."""
    broken = 0
    for seed in range(30):
        with patch(f"launch.rendezvous.{name}", wrong):
            try:
                test_hosts_with_random_faults_train_on_and_come_together_when_all_is_well(seed)
            except AssertionError:
                broken += 1
    return broken


def test_where_the_newest_place_always_wins_the_hosts_stay_apart() -> None:
    assert broken_runs("place_to_judge", lambda places, owner: max(places)) > 0


def test_where_a_place_is_replaced_beside_a_live_run_there_are_two() -> None:
    def hasty(reach: Reach, *, owner: Owner | None, **rest: Any) -> Verdict:
        return judge(reach, owner=None, **rest)

    assert broken_runs("judge", hasty) > 0


def test_where_patience_does_not_grow_slow_machines_never_meet() -> None:
    assert broken_runs("Membership._places_in_vain", lambda self, owner: 0) > 0


def test_an_agent_that_waits_where_nobody_comes_is_ended() -> None:
    def waits(self: Membership, place: Place) -> str:
        return ""

    assert broken_runs("Membership.outdated", waits) > 0


@dataclass
class Alone:
    """One member, and what it sees of the others."""

    store: Store
    seen: Owner | None = None
    answer: Reach = Reach.SILENT
    now: float = 0.0
    said: list[str] = field(default_factory=list)
    reached: dict[str, Reach] = field(default_factory=dict)

    def member(self, address: str = "a", job: str = "j", deaf: Collection[int] = ()) -> Membership:
        return Membership(
            self.store,
            job=job,
            address=address,
            host=f"host-{address}",
            owner=lambda: self.seen,
            reach=lambda address, port: self.reached.get(address, self.answer),
            free_port=lambda: 29400,
            clock=lambda: self.now,
            say=self.said.append,
            deaf=deaf,
        )

    def pause(self, seconds: float) -> bool:
        self.now += seconds
        return self.now < 100


@pytest.fixture
def alone() -> Alone:
    return Alone(store=open_store("memory://rendezvous"))


@pytest.fixture(autouse=True)
def empty() -> None:
    store = open_store("memory://rendezvous")
    for key in store.list(""):
        store.delete(key)


def test_the_first_host_holds_the_first_place_and_the_others_wait_for_it(alone: Alone) -> None:
    found = alone.member("a").join(alone.pause)
    place = Place(number=1, address="a", port=29400, host="host-a")
    assert found == (place, True)
    alone.answer = Reach.REFUSED
    other = alone.member("b")
    assert other.look() is None
    alone.answer = Reach.OPEN
    assert other.look() == (place, False)
    assert alone.said == [
        "the hosts meet at a:29400, number 1, here",
        "waiting: host-a (a:29400) is on a host that answers, where nothing listens",
    ]


def test_a_place_that_nobody_answers_at_is_replaced_when_nobody_lives_on_the_run(
    alone: Alone,
) -> None:
    alone.member("a").join(alone.pause)
    alone.seen = Owner(generation=1, job="j", place=1, live=None)
    other = alone.member("b")
    alone.now = 50.0
    assert other.look() is None
    alone.seen = Owner(generation=1, job="j", place=1, live=False)
    found = other.join(alone.pause)
    assert found is not None and (found[0].number, found[0].address) == (2, "b")
    assert 56 <= alone.now < 60, "a silent host is given six seconds"


def test_another_job_that_lives_on_the_run_is_named(alone: Alone) -> None:
    alone.member("a").join(alone.pause)
    alone.answer = Reach.OPEN
    alone.seen = Owner(generation=7, job="other", place=1, live=None, said="host x, process 3")
    assert alone.member("b").look() is None, "it may be gone"
    alone.seen = Owner(generation=7, job="other", place=1, live=True, said="host x, process 3")
    with pytest.raises(RunBusyError, match="generation 7, of job 'other': host x, process 3"):
        alone.member("b").look()


def test_a_notice_ends_the_wait(alone: Alone) -> None:
    alone.member("a").join(alone.pause)
    assert alone.member("b").join(lambda seconds: False) is None


def test_an_agent_waits_in_vain_when_a_newer_place_counts_or_its_own_is_gone(alone: Alone) -> None:
    alone.member("a").join(alone.pause)
    alone.answer = Reach.OPEN
    member = alone.member("b")
    found = member.look()
    assert found is not None and member.outdated(found[0]) == ""
    alone.answer = Reach.SILENT
    assert member.outdated(found[0]) == ""
    alone.now += 6.0
    assert "host-a (a:29400), where the hosts meet, does not answer" in member.outdated(found[0])
    alone.answer = Reach.OPEN
    alone.store.put("rendezvous/0000000002.json", b'{"address": "c", "port": 1, "host": "c"}')
    assert "another place than number 1" in member.outdated(found[0])
    alone.seen = Owner(generation=1, job="j", place=1, live=True)
    assert member.outdated(found[0]) == "", "a live run keeps its place"
    alone.seen, alone.reached = None, {"c": Reach.SILENT}
    assert member.outdated(found[0]) == "", "whoever made it may be cut off"
    alone.seen = Owner(generation=2, job="j", place=2, live=True)
    assert "another place than number 1" in member.outdated(found[0])


def member_of_a_silent_place(alone: Alone) -> tuple[Membership, Place]:
    alone.member("a").join(alone.pause)
    alone.answer = Reach.OPEN
    member = alone.member("b")
    found = member.join(alone.pause)
    assert found is not None
    alone.answer = Reach.SILENT
    return member, found[0]


def test_what_was_seen_while_the_agent_waited_need_not_be_seen_again(alone: Alone) -> None:
    """The silence of the place counts while the owner may live, and for the next meeting."""
    member, place = member_of_a_silent_place(alone)
    alone.seen = Owner(generation=1, job="j", place=1, live=True)
    assert member.outdated(place) == ""
    alone.now += 6.0
    assert member.outdated(place) == "", "its owner may live"
    alone.seen = Owner(generation=1, job="j", place=1, live=False)
    assert "does not answer" in member.outdated(place)
    assert member.look() is None
    found = member.look()
    assert found is not None and (found[0].number, found[0].address) == (2, "b")


def test_a_silence_of_long_ago_says_nothing_of_now(alone: Alone) -> None:
    member, place = member_of_a_silent_place(alone)
    assert member.outdated(place) == ""
    alone.now += 3600.0
    alone.seen = Owner(generation=1, job="j", place=1, live=False)
    begun = alone.now
    assert member.outdated(place) == "" and member.look() is None
    alone.now += 5.0
    assert member.look() is None and len(alone.store.list("rendezvous/")) == 1
    alone.now = begun + 6.0
    assert member.look() is None and len(alone.store.list("rendezvous/")) == 2


@pytest.mark.parametrize("mine", [True, False])
def test_a_place_at_which_torchrun_finds_nobody_is_replaced_when_nobody_lives(
    mine: bool, alone: Alone
) -> None:
    """Another program has the port, or the host there is frozen: its kernel still connects."""
    alone.member("a").join(alone.pause)
    alone.answer = Reach.OPEN
    member = alone.member("a" if mine else "b", deaf={1})
    for live in (None, True):
        alone.seen = Owner(generation=1, job="j", place=1, live=live)
        found = member.look()
        assert (found is None) == (live is None), "beside a live owner it is tried again"
    alone.seen = Owner(generation=1, job="j", place=1, live=False)
    alone.reached = {"b": Reach.REFUSED}
    found = member.join(alone.pause)
    assert found is not None and found[0].number == 2
    assert alone.now == 2.0 if mine else 7.0 <= alone.now < 10.0


def test_each_place_has_a_token_that_no_other_has(alone: Alone) -> None:
    one = alone.member("a").join(alone.pause)
    alone.store.delete("rendezvous/0000000001.json")
    other = alone.member("a").join(alone.pause)
    assert one is not None and other is not None
    assert one[0] == other[0] and one[0].token != other[0].token != ""


def test_a_damaged_place_is_one_that_does_not_answer(alone: Alone) -> None:
    alone.store.put("rendezvous/0000000001.json", b"{")
    found = alone.member("a").join(alone.pause)
    assert found is not None and found[0].number == 2


def test_a_watch_judges_as_a_claimant_would(tmp_path: Path) -> None:
    store, now = LocalStore(tmp_path / "run"), [0.0]
    assert Watch(store)() is None
    claim = {"job": "j", "rendezvous": 3}
    owner = claim_run(store, Log(store), body=claim, take_over=True)
    beats = Beats(store, owner, lambda: ("step", 5))
    watch = Watch(store, clock=lambda: now[0])

    def live() -> bool | None:
        seen = watch()
        assert seen is not None and (seen.generation, seen.job, seen.place) == (1, "j", 3)
        return seen.live

    assert live() is None
    now[0] = BEAT_SECONDS
    assert live() is None
    beats._beat()  # no thread of its own beats beside this one
    assert live() is True
    now[0] += 2 * BEAT_SECONDS
    assert live() is False
    beats._beat()
    assert live() is True
    with beats:
        pass
    assert live() is False, "it has left"
    owner.append("END", lambda _: {"step": 7, "digest": "d"})
    ended = watch()
    assert ended is not None and ended.ended_at == 7
    claim_run(store, Log(store), body={}, take_over=True)
    seen = watch()
    assert seen is not None and (seen.generation, seen.live, seen.place) == (2, True, 0)


def test_a_watch_that_finds_a_beat_of_long_ago_waits_for_no_other(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    owner = claim_run(store, Log(store), body={}, take_over=True)
    Beats(store, owner, lambda: ("step", 5))._beat()
    (beat,) = (tmp_path / "run" / "beats").glob("*")
    ago = time.time() - SILENT_SECONDS
    os.utime(beat, (ago + 5, ago + 5))
    seen = Watch(store)()
    assert seen is not None and seen.live is None
    os.utime(beat, (ago, ago))
    seen = Watch(store)()
    assert seen is not None and seen.live is False

    assert seen.ended_at is None
