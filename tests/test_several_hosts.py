"""A world of several hosts grows and shrinks, by torchrun alone, and ends with the same bits.

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

from checkpointing.history import History, history
from storage.log import Log
from storage.store import open_store
from tests.hosts import Network, Running, network
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
    """Hosts that train one run with torchrun."""

    def __init__(self, lan: Network, folder: Path, arguments: Sequence[str | Path]) -> None:
        self.lan = lan
        self.agents: list[Running] = []
        self._arguments = arguments
        self._fifo = folder / "stops"
        os.mkfifo(self._fifo)
        self._reader = os.open(self._fifo, os.O_RDWR)
        self._stopped = 0

    def join(self, *, ranks: int = 1, stop: str = "", flags: Sequence[str] = ()) -> Running:
        """The next host comes. Only the first one's rank stops, at `stop`, in every incarnation."""
        host = self.lan[len(self.agents)]
        settings = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3"
        agent = host.python(
            *("-m", "torch.distributed.run", "--nnodes=1:4", f"--nproc-per-node={ranks}"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint={self.lan[0].address}:29400"),
            f"--rdzv-conf=is_host={int(host is self.lan[0])},{settings}",
            *("--rdzv-id=job", f"--local-addr={host.address}", "--max-restarts=9", "--"),
            *(ROOT / "tests" / "killable.py", self._fifo, stop, "none"),
            *(*self._arguments, *flags),
            GLOO_SOCKET_IFNAME="eth0",
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
            LOGLEVEL="INFO",
        )
        self.agents.append(agent)
        return agent

    def stopped(self) -> int:
        """Wait until rank 0 has stopped; how many steps are finished."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not select.select([self._reader], [], [], 1.0)[0]:
            assert self.agents[0]._process.poll() is None, self.agents[0].output()
            assert time.monotonic() < deadline, self.agents[0].output()
        pid, step = os.read(self._reader, 100).split()
        self._stopped = self.lan[0].process(int(pid))
        stat = Path(f"/proc/{self._stopped}/stat")
        while stat.read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline
            os.sched_yield()
        return int(step)

    def go_on(self) -> None:
        """Let rank 0 go on."""
        os.kill(self._stopped, signal.SIGCONT)

    def close(self) -> None:
        os.close(self._reader)


@contextmanager
def cluster(hosts: int, folder: Path, *arguments: str | Path) -> Iterator[Cluster]:
    """Hosts that are up, none of which trains yet."""
    with network(hosts) as lan:
        made = Cluster(lan, folder, arguments)
        try:
            yield made
        finally:
            made.close()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, data: tuple[str, ...]) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    assert train_here("--run", run, *data, *SHAPE) == 0
    return run


def past(run: Path) -> History:
    return history(Log(open_store(str(run)), whole=True).refresh())


def worlds(run: Path) -> list[int]:
    """The number of processes of each incarnation."""
    records = Log(open_store(str(run)), whole=True).refresh()
    return [record.body["world_size"] for record in records if record.kind == "CLAIM"]


def test_a_world_grows_by_a_host_and_shrinks_when_one_is_preempted(
    alone: Path, tmp_path: Path, data: tuple[str, ...]
) -> None:
    """Nothing is lost either way: all stop after the same step, save it, and go on from it."""
    run = tmp_path / "run"
    with cluster(2, tmp_path, "--run", run, *data, *SHAPE) as made:
        first = made.join(stop="step=5")
        assert made.stopped() == 4
        second = made.join()
        first.says("Detected 1 new nodes")
        made.go_on()
        assert made.stopped() == 5 + 4, "going on from step 5, the one that it was in"
        second.send(signal.SIGTERM)
        second.says("shutting down workers")
        made.go_on()
        assert second.end() != 0
        while len(worlds(run)) < 3:
            made.stopped()
            made.go_on()
        assert first.end() == 0, first.output()
    assert worlds(run) == [1, 2, 1]
    assert final_digest(run) == final_digest(alone)
    assert rows(run) == rows(alone)
    assert curve(run) == curve(alone)
