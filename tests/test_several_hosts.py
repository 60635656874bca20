"""A world of several hosts grows and shrinks, and ends with the same bits.

By the scenarios of `launch.chaos` under a supervisor on each host, and by torchrun alone.
Rank 0, always on host 0, stops itself at given places; there the test changes the hosts, and then
lets it go on. Everybody else stands in a collective meanwhile.
"""

import os
import select
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.chaos.hosts import Network
from launch.chaos.scenarios import Ground, lacking
from launch.chaos.several_hosts import SEVERAL_HOSTS
from launch.chaos.trial import Program
from storage.log import Log
from storage.store import open_store
from tests.hosts import Running, network, python
from tests.programs import ROOT, TIMEOUT_SECONDS, curve, final_digest, rows, train_here

SHAPE = (
    "--max_steps=16",
    "--eval_interval_steps=8",
    "--eval_windows=10",
    "--eval_micro_batch_size=3",
    "--sample_interval_steps=0",
    "--save_interval_steps=0",
    "--log_interval_steps=4",
    "--n_embd=32",
    "--context=32",
    "--global_batch_size=14",
    "--micro_batch_size=2",
    "--virtual_ranks=6",
    "--warmup_steps=4",
    "--dropout=0.1",
)


class Cluster:
    """Hosts that train one run."""

    def __init__(self, lan: Network, folder: Path, arguments: Sequence[str | Path]) -> None:
        self.lan = lan
        self.agents: list[Running] = []
        self._arguments = arguments
        self._fifos = [folder / f"stops{number}" for number in range(len(lan.hosts))]
        for fifo in self._fifos:
            os.mkfifo(fifo)
        self.disable_sharing = "1"
        """TORCH_DISABLE_SHARE_RDZV_TCP_STORE; for a negative control."""
        self._readers = [os.open(fifo, os.O_RDWR) for fifo in self._fifos]
        self._stopped = 0

    def join(self, *, ranks: int = 1, stop: str = "", restarts: int = 9) -> Running:
        """The next host comes, with torchrun. Rank 0 stops at `stop` in every incarnation."""
        host = self.lan[len(self.agents)]
        return self._start(
            *("-m", "torch.distributed.run", "--nnodes=1:4", f"--nproc-per-node={ranks}"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint={self.lan[0].address}:29400"),
            f"--rdzv-conf=is_host={int(host is self.lan[0])},last_call_timeout=1",
            *("--rdzv-id=job", f"--local-addr={host.address}", f"--max-restarts={restarts}"),
            stop=stop,
        )

    def join_agreeing(self, nodes: str, *, stop: str = "") -> Running:
        """The next host comes, and finds out by itself where the others are."""
        return self._start(
            *(ROOT / "tests" / "outer_loop.py", f"--nnodes={nodes}", "--max-restarts=0"),
            stop=stop,
        )

    def _start(self, *program: str | Path, stop: str) -> Running:
        number = len(self.agents)
        agent = python(
            self.lan[number],
            *(*program, "--", ROOT / "tests" / "killable.py", self._fifos[number], stop, "none"),
            *self._arguments,
            GLOO_SOCKET_IFNAME="eth0",
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE=self.disable_sharing,
            LOGLEVEL="INFO",
        )
        self.agents.append(agent)
        return agent

    def stopped(self) -> int:
        """Wait until rank 0 has stopped; how many steps are finished."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not (ready := select.select(self._readers, [], [], 1.0)[0]):
            assert time.monotonic() < deadline, self.output()
        pid, step = os.read(ready[0], 100).split()
        self._stopped = self.lan[self._readers.index(ready[0])].process(int(pid))
        stat = Path(f"/proc/{self._stopped}/stat")
        while stat.read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline
            os.sched_yield()
        return int(step)

    def go_on(self) -> None:
        """Let rank 0 go on."""
        os.kill(self._stopped, signal.SIGCONT)

    def output(self) -> str:
        return "\n".join(agent.output() for agent in self.agents)

    def close(self) -> None:
        for reader in self._readers:
            os.close(reader)


@contextmanager
def cluster(hosts: int, folder: Path, *arguments: str | Path) -> Iterator[Cluster]:
    """Hosts that are up, none of which trains yet."""
    with network(hosts) as lan:
        made = Cluster(lan, folder, arguments)
        try:
            yield made
        except AssertionError as error:
            raise AssertionError(f"{error}\n{made.output()}") from error
        finally:
            made.close()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, data: tuple[str, ...]) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    assert train_here("--run", run, *data, *SHAPE) == 0
    return run


def worlds(run: Path) -> list[int]:
    """The number of processes of each incarnation."""
    records = Log(open_store(str(run)), whole=True).refresh()
    return [record.body["world_size"] for record in records if record.kind == "CLAIM"]


@pytest.mark.soak
def test_a_newcomer_joins_after_the_step_in_which_it_came(
    alone: Path, tmp_path: Path, data: tuple[str, ...]
) -> None:
    """The step is finished and saved; the ranks' 75 does not end torchrun; nothing is lost."""
    run = tmp_path / "run"
    with cluster(2, tmp_path, "--run", run, *data, *SHAPE) as made:
        first = made.join(stop="step=5")
        assert made.stopped() == 4
        made.join()
        first.says("Detected 1 new nodes", others=made.agents)
        made.go_on()
        assert made.stopped() == 5 + 4, "going on from step 5, the one that it was in"
        made.go_on()
        assert [agent.end() for agent in made.agents] == [0, 0]
    assert worlds(run) == [1, 2]
    assert final_digest(run) == final_digest(alone)
    assert rows(run) == rows(alone)
    assert curve(run) == curve(alone)


@pytest.mark.soak
def test_without_a_store_of_its_own_a_world_that_grows_does_not_come_together(
    tmp_path: Path, data: tuple[str, ...]
) -> None:
    """torch 2.13: the ranks look for the store of a rank 0 that is not there any more."""
    run = tmp_path / "run"
    with cluster(2, tmp_path, "--run", run, *data, *SHAPE) as made:
        made.disable_sharing = "0"
        first = made.join(stop="step=5", restarts=0)
        made.stopped()
        made.join(restarts=0)
        first.says("Detected 1 new nodes", others=made.agents)
        made.go_on()
        assert 0 not in [agent.end() for agent in made.agents]
    assert worlds(run) == [1]


@pytest.mark.soak
def test_when_a_host_is_preempted_the_others_go_on_from_the_same_step(
    alone: Path, tmp_path: Path, data: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    with cluster(2, tmp_path, "--run", run, *data, *SHAPE) as made:
        first = made.join(stop="step=5")
        made.stopped()
        second = made.join()
        first.says("Detected 1 new nodes", others=made.agents)
        made.go_on()
        assert made.stopped() == 9
        second.send(signal.SIGTERM)
        second.says("shutting down workers")
        made.go_on()
        assert second.end() != 0
        assert made.stopped() == 10 + 4
        made.go_on()
        assert first.end() == 0, first.output()
    assert worlds(run) == [1, 2, 1]
    assert final_digest(run) == final_digest(alone)
    assert rows(run) == rows(alone)


@pytest.mark.soak
def test_a_walk_over_1_2_3_4_and_1_hosts_gives_the_same_bits(
    alone: Path, tmp_path: Path, data: tuple[str, ...]
) -> None:
    """The second brings two processes: worlds of 1, 3, 4, 5 and 1. Three hosts lose power."""
    run = tmp_path / "run"
    with cluster(4, tmp_path, "--run", run, *data, *SHAPE) as made:
        first = made.join(stop="step=3")
        for count, ranks in enumerate((2, 1, 1), start=1):
            made.stopped()
            made.join(ranks=ranks)
            first.says("Detected 1 new nodes", times=count, others=made.agents)
            made.go_on()
        at = made.stopped()
        for host in made.lan.hosts[1:]:
            host.kill()
        made.go_on()
        first.says("has not answered for 20 s")
        assert made.stopped() == at, "again three steps from the one saved when the last came"
        made.go_on()
        assert first.end() == 0
    assert worlds(run) == [1, 3, 4, 5, 1]
    assert final_digest(run) == final_digest(alone)
    assert rows(run) == rows(alone)


@pytest.mark.soak
def test_without_the_host_where_they_met_the_others_meet_elsewhere_and_it_comes_back(
    alone: Path, tmp_path: Path, data: tuple[str, ...]
) -> None:
    """Host 0 is cut off with the rendezvous and rank 0. Two hosts are needed, so it cannot go on
    alone; the others go on with what their local tiers hold, and when it is healed it joins them.
    """
    run, tier = tmp_path / "run", tmp_path / "tier"
    tier.mkdir()
    flags = ("--local_interval_steps=2", "--local_tier", tier)
    with cluster(3, tmp_path, "--run", run, *data, *SHAPE, *flags) as made:
        for host in made.lan.hosts:
            host.call("mount", "-t", "tmpfs", "memory", tier)
            made.join_agreeing("2:3", stop="step=7")
            made.agents[-1].says("the hosts meet at")
        assert "number 1, on host0" in made.agents[2].output()
        assert made.stopped() == 6
        made.lan[0].cut()
        made.go_on()
        made.agents[1].says("has not answered for 20 s")
        made.agents[1].says("the hosts meet at", times=2)
        assert made.stopped() > 6, "it went on from a local snapshot, not from the beginning"
        made.lan[0].heal()
        made.agents[0].says("number 2, on host")
        made.agents[1].says("new nodes")
        made.go_on()
        assert [agent.end() for agent in made.agents] == [0, 0, 0]
    assert worlds(run)[0] == 3 and worlds(run)[-2:] == [2, 3]
    assert final_digest(run) == final_digest(alone)
    assert rows(run) == rows(alone)


SHARING = """
import sys
from launch.supervise import main, torchrun_command
from storage.ending import end_process

without = ("/usr/bin/env", "-u", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE")
end_process(main(sys.argv[1:], lambda *given: [*without, *torchrun_command(*given)]))
"""
"""The supervisor, whose torchrun is not told to keep its store to itself."""


@pytest.mark.soak
def test_supervisors_without_that_variable_do_not_bring_a_world_that_grows_together(
    ground: Ground,
) -> None:
    """As the scenario `newcomer`, in which the second world has both hosts' ranks."""
    with ground.trial("sharing") as trial, network(2) as lan:

        def join(number: int, stop: tuple[str, int] | None = None) -> Program:
            words = trial.supervisor(torchrun=("--nnodes=1:4",))
            words[1:3] = ["-c", SHARING]
            return trial.start(words, environment={"LOGLEVEL": "INFO"}, on=lan[number], stop=stop)

        first = join(0, ("micro_batch", 6))
        place = first.stopped()
        second = join(1)
        first.says(" new nodes from group_rank")
        place.go_on()
        second.says("the hosts did not come together")
        assert worlds(Path(trial.run)) in ([1], [1, 1])


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(tmp_path_factory.mktemp("several_hosts"))


@pytest.mark.parametrize(
    "name",
    [
        name if name == "newcomer" else pytest.param(name, marks=pytest.mark.soak)
        for name in (scenario.name for scenario in SEVERAL_HOSTS)
    ],
)
def test_under_supervisors_nothing_is_violated(name: str, ground: Ground) -> None:
    scenario = next(one for one in SEVERAL_HOSTS if one.name == name)
    if why_not := lacking(scenario.needs):
        pytest.skip(why_not)
    result = ground.play(scenario)
    assert result.outcome == "passed", f"{result.folder}: {result.violations}"
