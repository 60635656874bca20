"""The processes of one world as torchrun starts and ends them, as forks and without torchrun."""

import os
import select
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from torch.distributed import TCPStore

from tests.forks import Fork

GRACE_SECONDS = 30.0


class Ranks:
    """One world, a process for each of `outputs`.

    Like torchrun it holds the store in which they meet, so that no port is guessed. Does not cover
    torchrun: `Program(fresh=True)` starts it.
    """

    def __init__(
        self,
        program: Sequence[str | Path],
        outputs: Sequence[IO[Any]],
        job: str = "",
        local_ranks: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "WORLD_SIZE": str(len(outputs)),
            "LOCAL_WORLD_SIZE": str(len(outputs)),
            "TORCHELASTIC_RUN_ID": job or str(uuid4()),
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        self._ranks = []
        for rank, output in enumerate(outputs):
            local_rank = local_ranks[rank] if local_ranks else rank
            place = {"RANK": str(rank), "LOCAL_RANK": str(local_rank)}
            env = {**(os.environ if environment is None else environment), **shared, **place}
            self._ranks.append(Fork(program, env=env, output=output))

    @property
    def pidfds(self) -> list[int]:
        """Readable when a rank ends; none of those that were waited for."""
        return [pidfd for rank in self._ranks for pidfd in rank.pidfds]

    def wait(self, timeout: float | None = None) -> int:
        """0 when all ended well. When one does not, the others get SIGTERM, and the code is 1."""
        poll = select.poll()
        running = {pidfd: rank for rank in self._ranks for pidfd in rank.pidfds}
        for pidfd in running:
            poll.register(pidfd, select.POLLIN)
        while running:
            ended = poll.poll(None if timeout is None else timeout * 1000)
            if not ended:
                raise subprocess.TimeoutExpired("ranks", timeout or 0)
            for pidfd, _ in ended:
                poll.unregister(pidfd)
                if running.pop(pidfd).wait() != 0:
                    self._end(list(running.values()))
                    return 1
        return int(any(rank.returncode for rank in self._ranks))

    def _end(self, ranks: list[Fork]) -> None:
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
        for rank in ranks:
            try:
                rank.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                rank.kill()
                rank.wait()

    def send_signal(self, number: int) -> None:
        """Send a signal to all."""
        for rank in self._ranks:
            rank.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to all."""
        self.send_signal(signal.SIGKILL)
