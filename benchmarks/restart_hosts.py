"""Several hosts: until the world has grown by one, and until it goes on without a lost one."""

import sys
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.measuring import Row
from benchmarks.restart_programs import (
    LIMIT_SECONDS,
    ROOT,
    SAVE_EVERY,
    TRAINING,
    Line,
    Program,
    now,
    supervised,
    torchrun_alone,
)
from checkpointing.history import history
from launch.chaos.hosts import Host, Network, network
from storage.log import Log
from storage.store import open_store

GROW = "a host more: its start to the first step with it"
LOST = "loss of one host of three to the first new step"
LOST_MEETING = "loss of the host where three met, to the first new step"
OURS = "rangeflow, supervised"
PEER = "torch.save, torchrun"
_TOLD_SECONDS = 2.0
"""Until what a lost host had printed is read; nothing goes on so soon."""


class World:
    """Hosts that train one run. Use it with `with`."""

    def __init__(self, lan: Network, run: Path) -> None:
        self._lan = lan
        self._run = run
        self._stack = ExitStack()
        self._members: dict[Host, Program] = {}

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def join(self) -> float:
        """One more host, with its supervisor; when that was started."""
        host = self._lan.add()
        command = [*supervised("--nnodes=1:3", "--nproc_per_node=1"), "launch/train.py"]
        program = Program(host.entering(*command, "--run", self._run, *TRAINING))
        self._members[host] = self._stack.enter_context(program)
        return program.begun

    def until(self, size: int) -> float:
        """Wait for a world of so many hosts to make a step; when that was told."""
        end = now() + LIMIT_SECONDS
        while True:
            past = history(Log(open_store(str(self._run))).refresh())
            if past.claim is not None and past.claim.body["world_size"] == size:
                break
            if now() > end:
                raise RuntimeError(f"no world of {size} came together: {self._leader().tail()}")
            time.sleep(0.05)
        claimed = f"claimed the run as generation {past.generation}"
        began = self._leader().line(lambda line: line.text.endswith(claimed))
        return self._leader().line(lambda line: line.at >= began.at and line.step is not None).at

    def loss(self, *, meeting: bool) -> float:
        """Far from a save, the newest host or the one where they met loses power: seconds."""
        reached = self._leader().highest_step() + SAVE_EVERY

        def far(line: Line) -> bool:
            return (line.step or 0) > reached and (line.step or 0) % SAVE_EVERY == SAVE_EVERY // 2

        self._leader().line(far)
        holders = [host for host, program in self._members.items() if holds_meeting(program)]
        others = [host for host in self._members if host not in holders]
        lost = holders[-1] if meeting else others[-1]
        told = self._leader()
        begun = now()
        lost.kill()
        del self._members[lost]
        time.sleep(_TOLD_SECONDS)
        highest = told.highest_step()
        return self._leader().line(lambda line: (line.step or 0) > highest).at - begun

    def _leader(self) -> Program:
        """That of rank 0, which has the lowest address."""
        return next(iter(self._members.values()))


def hosts_rows(folder: Path, repeats: int, *, meeting: bool) -> list[Row]:
    """Two hosts; each repeat adds one, and takes one away."""
    grown, lost = [], []
    with network(0) as lan, World(lan, folder / "run") as world:
        world.join()
        world.until(1)
        world.join()
        world.until(2)
        for number in range(repeats):
            begun = world.join()
            grown.append(world.until(3) - begun)
            lost.append(world.loss(meeting=meeting))
            print(
                f"repeat {number + 1} of {repeats}: {grown[-1]:.1f} s, {lost[-1]:.1f} s",
                file=sys.stderr,
            )
            world.until(2)
    return [
        Row(figure=GROW, contestant=OURS, values=tuple(grown), unit="s"),
        Row(
            figure=LOST_MEETING if meeting else LOST,
            contestant=OURS,
            values=tuple(lost),
            unit="s",
        ),
    ]


def peer_rows(folder: Path, limit_seconds: float) -> list[Row]:
    """The peer's: three hosts, the last of which loses power. Once, as it takes so long."""
    run = folder / "run"
    with network(0) as lan, World(lan, run) as world:  # prepares the corpus
        world.join()
        world.until(1)
    with network(3) as lan, ExitStack() as stack:
        programs = []
        for host in lan.hosts:
            command = torchrun_alone(
                *("--nnodes=1:3", "--nproc_per_node=1", "--max-restarts=100", "--rdzv-id=job"),
                *("--rdzv-backend=c10d", f"--rdzv-endpoint={lan[0].address}:29400"),
                *(f"--rdzv-conf=is_host={int(host is lan[0])}", f"--local-addr={host.address}"),
            )
            program = ROOT / "benchmarks" / "restart_torch_save.py"
            variables = {
                "GLOO_SOCKET_IFNAME": "eth0",
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            }
            entered = host.entering(*command, program, folder, run / "corpus")
            programs.append(stack.enter_context(Program(entered, variables)))
        leader = programs[0]
        leader.line(lambda line: line.step == SAVE_EVERY * 3 // 2)
        begun = now()
        lan[2].kill()
        time.sleep(_TOLD_SECONDS)
        highest = leader.highest_step()
        while leader.highest_step() <= highest and now() - begun < limit_seconds:
            time.sleep(0.05)
        note = "" if leader.highest_step() > highest else "without a step, stopped there"
        seconds = now() - begun
    return [Row(figure=LOST, contestant=PEER, values=(seconds,), unit="s", note=note)]


def holds_meeting(program: Program) -> bool:
    """Whether the place that it agreed to last is on its own host."""
    told = [line.text for line in program.lines if "the hosts meet at" in line.text]
    return bool(told) and told[-1].endswith(", here")
