"""Scenarios on several hosts, each with its own supervisor: they come, go, and are cut off.

The hosts are network namespaces, the run's store is a folder that all see also when they are cut
off. Rank 0 is stopped wherever hosts are changed: everybody else then stands in a collective.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from launch.chaos.hosts import Network, network
from launch.chaos.scenarios import Need, Scenario
from launch.chaos.trial import Place, Program, Trial, Violation
from launch.exit_codes import COMPLETE, FENCED, START_AGAIN
from storage.log import Log
from storage.store import open_store

_LOST = "has not answered for 20 s"


class Cluster:
    """Hosts that train the run of a trial. Those that have joined are `programs`, by number."""

    def __init__(self, trial: Trial, lan: Network) -> None:
        self.trial = trial
        self.lan = lan
        self.programs: list[Program] = []
        self._grown: dict[Program, int] = {}

    def join(
        self,
        *,
        ranks: int = 1,
        job: str = "",
        stop: tuple[str, int] | None = None,
        holds: tuple[str, int] | None = None,
    ) -> Program:
        """The next host comes."""
        torchrun = ["--nnodes=1:4", *([f"--rdzv-id={job}"] if job else [])]
        program = self.trial.start(
            self.trial.supervisor(ranks, torchrun=torchrun),
            environment={"LOGLEVEL": "INFO"},  # torchrun then tells of newcomers
            on=self.lan[len(self.programs)],
            stop=stop,
            holds=holds,
        )
        self.programs.append(program)
        return program

    def gather(self, count: int) -> Place:
        """All come at once; rank 0 of a world of them all, stopped where it waits for the others"""
        first = self.join(stop=("micro_batch", 0))
        first.says("the hosts meet at")
        for _ in range(1, count):
            self.join()
        place = self.world_of(count, first)
        first.stop("reduce", place.step)
        place.go_on()
        return first.stopped()

    def world_of(self, count: int, first: Program) -> Place:
        """Rank 0, which stops on this host, in a world of so many: who is late joins by itself."""
        place = first.stopped()
        while self.worlds()[-1] < count:
            place = self.grow(place, first)
        return place

    def grow(self, place: Place, first: Program) -> Place:
        """With rank 0 stopped, wait for a newcomer; where rank 0, on the same host, then stops."""
        self.newcomer_waits(first)
        first.stop("micro_batch", place.step + 1)
        place.go_on()
        grown = first.stopped()
        self.trial.expect_saved(place.step + 1)
        return grown

    def newcomer_waits(self, first: Program) -> None:
        """Wait until torchrun has found one more host, or several, that wait to join."""
        self._grown[first] = self._grown.get(first, 0) + 1
        first.says(" new nodes from group_rank", times=self._grown[first])

    def worlds(self) -> list[int]:
        """The number of ranks of each incarnation so far."""
        records = Log(open_store(self.trial.run), whole=True).refresh()
        return [int(record.body["world_size"]) for record in records if record.kind == "CLAIM"]

    def expect_worlds(self, *expected: int) -> None:
        """That incarnations had so many ranks."""
        if tuple(self.worlds()) != expected:
            raise Violation(f"incarnations had {self.worlds()} ranks, expected {list(expected)}")

    def complete(self, *numbers: int) -> None:
        """Wait until the run is complete on these hosts."""
        for number in numbers:
            self.programs[number].end(COMPLETE)

    def notice(self, number: int) -> None:
        """The supervisor of a host gets SIGTERM, and has passed it on."""
        Place(self.programs[number].process("supervisor"), 0).signal(signal.SIGTERM)
        self.programs[number].says("SIGTERM: the ranks have")


@contextmanager
def cluster(trial: Trial, count: int) -> Iterator[Cluster]:
    """Hosts that are up, none of which trains yet."""
    with network(count) as lan:
        yield Cluster(trial, lan)


def _walk(trial: Trial) -> None:
    with cluster(trial, 4) as made:
        first = made.join(stop=("micro_batch", trial.random.randrange(1, 5)))
        place = first.stopped()
        for _ in range(3):
            made.join()
            place = made.grow(place, first)
        trial.fault(f"2, 3 and 4 hosts until step {place.step}")
        if trial.random.random() < 0.5:
            trial.fault("three hosts get a notice")
            for number in (1, 2, 3):
                made.notice(number)
            place.go_on()
            for program in made.programs[1:]:
                program.end(START_AGAIN)
            trial.expect_saved(place.step + 1)
        else:
            trial.fault("three hosts lose power")
            for host in made.lan.hosts[1:]:
                host.kill()
            place.go_on()
            first.says(_LOST)
        first.end(COMPLETE)
        made.expect_worlds(1, 2, 3, 4, 1)


def _newcomer(trial: Trial) -> None:
    with cluster(trial, 2) as made:
        first = made.join(stop=("micro_batch", trial.random.randrange(1, 15)))
        place = first.stopped()
        trial.fault(f"a host with two ranks comes in step {place.step + 1}")
        made.join(ranks=2)
        made.grow(place, first).go_on()
        made.complete(0, 1)
        made.expect_worlds(1, 3)


def _lose_one(trial: Trial) -> None:
    trial.may_show_tracebacks = True  # torchrun's own, of a host that does not answer
    with cluster(trial, 3) as made:
        place = made.gather(3)
        first, lost = made.programs[0], trial.random.choice((1, 2))
        trial.fault(f"host {lost} of 0 to 2 loses power in step {place.step + 1}")
        first.stop("micro_batch")
        made.lan[lost].kill()
        place.go_on()
        made.world_of(2, first).go_on()
        made.complete(0, 3 - lost)


def _lose_the_meeting_place(trial: Trial) -> None:
    """And rank 0 with it."""
    trial.may_show_tracebacks = True
    with cluster(trial, 3) as made:
        place = made.gather(3)
        noticed = trial.random.random() < 0.5
        how = "after a notice" if noticed else "without notice"
        trial.fault(f"the machine of host 0 is taken in step {place.step + 1}, {how}")
        second = made.programs[1]
        second.stop("micro_batch")
        if noticed:
            made.notice(0)
            place.go_on()
            made.programs[0].end(START_AGAIN)
            trial.expect_saved(place.step + 1)
        made.lan[0].kill()
        made.world_of(2, second).go_on()
        made.complete(1, 2)


def _stale_host(trial: Trial) -> None:
    """Stopped before its commit and cut off; woken and healed when the others have gone on."""
    trial.may_show_tracebacks = True
    with cluster(trial, 3) as made:
        place = made.gather(3)
        first, second, _ = made.programs
        first.stop("save:manifest")
        second.stop("micro_batch")  # as rank 0 of those that are left
        place.go_on()
        stale = first.stopped()
        trial.fault(f"host 0 is cut off before it commits step {stale.step}")
        made.lan[0].cut()
        other = made.world_of(2, second)
        trial.fault(f"healed, and its writer woken, when the others are at step {other.step}")
        made.lan[0].heal()
        stale.go_on()
        first.says("number 2, on host")
        made.newcomer_waits(second)
        other.go_on()
        made.complete(0, 1, 2)


def _frozen_host(trial: Trial) -> None:
    """The place where they met still takes connections, and nobody answers there."""
    trial.may_show_tracebacks = True
    with cluster(trial, 3) as made:
        place = made.gather(3)
        first, second, _ = made.programs
        first.stop("micro_batch", place.step + 2)  # a step's limit is known only after a step
        place.go_on()
        place = first.stopped()
        second.stop("micro_batch")
        trial.fault(f"host 0 is frozen in step {place.step + 1}")
        made.lan[0].freeze()
        other = made.world_of(2, second)
        trial.fault(f"thawed, when the others are at step {other.step}")
        made.lan[0].thaw()
        first.says("number 2, on host")
        made.newcomer_waits(second)
        other.go_on()
        made.complete(0, 1, 2)


def _two_jobs_of_two(trial: Trial) -> None:
    """Nobody fights: the second waits while the first lives, and the first stops when fenced."""
    with cluster(trial, 4) as made:
        first = made.join(job="one", stop=("micro_batch", 0))
        first.says("the hosts meet at")
        made.join(job="one")
        place = made.world_of(2, first)
        first.hold("micro_batch", place.step + trial.random.randrange(1, 10))
        place.go_on()
        place = first.stopped()  # its heartbeats go on
        for _ in range(2):
            made.join(job="two").says("of job 'one': host host0, process ")
        third = made.programs[2]
        trial.fault(f"both hosts of the first job are frozen in step {place.step + 1}")
        third.stop("micro_batch", place.step + 2)
        for host in made.lan.hosts[:2]:
            host.freeze()
        other = third.stopped()
        trial.fault(f"thawed, when the second job is at step {other.step}")
        for host in made.lan.hosts[:2]:
            host.thaw()
        first.release()
        for program in made.programs[:2]:
            program.end(FENCED)
        other.go_on()
        made.complete(2, 3)


def _two_jobs(trial: Trial) -> None:
    with cluster(trial, 2) as made:
        first = made.join(job="one", holds=("micro_batch", trial.random.randrange(1, 20)))
        place = first.stopped()  # its heartbeats go on
        trial.fault(f"another job begins while the first is in step {place.step + 1}")
        second = made.join(job="two")
        second.says("is in use by generation 1, of job 'one': host host0, process ")
        trial.fault("the host of the first loses power")
        made.lan[0].kill()
        second.end(COMPLETE)
        made.expect_worlds(1, 1)


_NEEDS: frozenset[Need] = frozenset({"root", "network"})

SEVERAL_HOSTS = (
    Scenario(name="hosts-1-2-3-4-1", about="hosts come, and go", act=_walk, needs=_NEEDS),
    Scenario(name="newcomer", about="a host comes, with two ranks", act=_newcomer, needs=_NEEDS),
    Scenario(name="lost-host", about="one of three loses power", act=_lose_one, needs=_NEEDS),
    Scenario(
        name="lost-meeting-place",
        about="the host where the others met is gone",
        act=_lose_the_meeting_place,
        needs=_NEEDS,
    ),
    Scenario(
        name="stale-host",
        about="a host is cut off while it saves, and comes back",
        act=_stale_host,
        needs=_NEEDS,
    ),
    Scenario(
        name="frozen-host",
        about="the host where they met is frozen, and thawed",
        act=_frozen_host,
        needs=_NEEDS,
    ),
    Scenario(name="two-jobs-two-hosts", about="two jobs on one run", act=_two_jobs, needs=_NEEDS),
    Scenario(
        name="two-jobs-four-hosts",
        about="two jobs of two hosts each on one run",
        act=_two_jobs_of_two,
        needs=_NEEDS,
    ),
)
