"""Several hosts: until the world has grown by one, and until it goes on without a lost one."""

import re
import sys
import time
from pathlib import Path

from benchmarks.measuring import Row
from benchmarks.restart_programs import ROOT, SAVE_EVERY, TRAINING
from checkpointing.history import history
from storage.log import Log
from storage.store import open_store
from tests.hosts import Host, Network, Running, network

GROW = "a host more: its start to the first step with it"
LOST = "loss of one host of three to the first new step"
LOST_MEETING = "loss of the host where three met, to the first new step"
OURS = "rangeflow, supervised"
PEER = "torch.save, torchrun"
_STEP = re.compile(r"\bstep (\d+)/\d+ ")
_AGAIN = "going on from step "
_TOLD_SECONDS = 2.0
"""Until what a lost host had printed is read; nothing goes on so soon."""


class World:
    """Hosts that train one run."""

    def __init__(self, lan: Network, run: Path) -> None:
        self._lan = lan
        self._run = run
        self.members: dict[Host, Running] = {}

    def join(self) -> Host:
        """One more host, and its supervisor."""
        host = self._lan.add()
        self.members[host] = host.python(
            *("-m", "launch.supervise", "--metadata=none", "--"),
            *("--nnodes=1:3", "--nproc_per_node=1", "--", "launch/train.py"),
            *("--run", self._run, *TRAINING),
            PYTHONUNBUFFERED="1",
        )
        return host

    def leader(self) -> Running:
        """That of rank 0: the lowest address."""
        return next(iter(self.members.values()))

    def until(self, size: int) -> None:
        """Wait for a world of so many hosts that has made a step."""
        end = time.monotonic() + 180
        while self._size() != size:
            assert time.monotonic() < end, self.leader().output()
            time.sleep(0.02)
        self._first_step()

    def loss(self, meeting: bool) -> float:
        """Far from a save, the newest host or the one where they met loses power: seconds."""
        highest = step_of(self.leader())
        far = (highest // SAVE_EVERY + 1) * SAVE_EVERY + SAVE_EVERY // 2
        self.leader().says(f"step {far}/")
        held = [host for host, program in self.members.items() if holds_meeting(program)]
        lost = held[-1] if meeting else next(h for h in reversed(self.members) if h not in held)
        printed = self.leader()
        begun = time.monotonic()
        lost.kill()
        del self.members[lost]
        time.sleep(_TOLD_SECONDS)
        self.leader().says(f"step {step_of(printed) + 1}/")
        return time.monotonic() - begun

    def _size(self) -> int:
        past = history(Log(open_store(str(self._run))).refresh())
        return int(past.claim.body["world_size"]) if past.claim else 0

    def _first_step(self) -> None:
        """Of the newest incarnation."""
        claims = self.leader().output().count("claimed the run as generation")
        while True:
            _, _, said = self.leader().output().rpartition("claimed the run as generation")
            if claims and _STEP.search(said):
                return
            time.sleep(0.02)
            claims = self.leader().output().count("claimed the run as generation")


def hosts_rows(folder: Path, repeats: int, *, meeting: bool) -> list[Row]:
    """Two hosts; each repeat adds one, and takes one away."""
    grown, lost = [], []
    with network(0) as lan:
        world = World(lan, folder / "run")
        world.join()
        world.until(1)
        world.join()
        world.until(2)
        for number in range(repeats):
            begun = time.monotonic()
            world.join()
            world.until(3)
            grown.append(time.monotonic() - begun)
            lost.append(world.loss(meeting))
            print(
                f"repeat {number + 1} of {repeats}: {grown[-1]:.1f} s, {lost[-1]:.1f} s",
                file=sys.stderr,
            )
            world.until(2)
    figure = LOST_MEETING if meeting else LOST
    return [
        Row(figure=GROW, contestant=OURS, values=tuple(grown), unit="s"),
        Row(figure=figure, contestant=OURS, values=tuple(lost), unit="s"),
    ]


def peer_rows(folder: Path, limit_seconds: float) -> list[Row]:
    """The peer's: three hosts, the last of which loses power. Once, as it takes so long."""
    corpus = folder / "run"
    with network(0) as lan:
        prepared = World(lan, corpus)
        prepared.join()
        prepared.until(1)
    with network(3) as lan:
        programs = [
            host.python(
                *("-m", "torch.distributed.run", "--nnodes=1:3", "--nproc_per_node=1"),
                *("--rdzv-backend=c10d", f"--rdzv-endpoint={lan[0].address}:29400"),
                f"--rdzv-conf=is_host={int(host is lan[0])}",
                *("--rdzv-id=job", f"--local-addr={host.address}", "--max-restarts=100", "--"),
                *(ROOT / "benchmarks/restart_torch_save.py", folder, corpus / "corpus"),
                GLOO_SOCKET_IFNAME="eth0",
                TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
            )
            for host in lan.hosts
        ]
        leader = programs[0]
        leader.says(f"step {SAVE_EVERY * 3 // 2}/")
        begun = time.monotonic()
        lan[2].kill()
        time.sleep(_TOLD_SECONDS)
        highest = step_of(leader)
        while step_of(leader) <= highest and time.monotonic() - begun < limit_seconds:
            time.sleep(0.05)
        seconds = time.monotonic() - begun
        note = "(stopped there, without a step)" if step_of(leader) <= highest else ""
    return [Row(figure=LOST, contestant=PEER, values=(seconds,), unit="s", note=note)]


def step_of(program: Running) -> int:
    """The highest step that it has told of."""
    return max((int(found) for found in _STEP.findall(program.output())), default=0)


def holds_meeting(program: Running) -> bool:
    """Whether the place that it agreed to last is on its own host."""
    told = re.findall(r"the hosts meet at \S+, number \d+, (here|on)", program.output())
    return bool(told) and told[-1] == "here"
