"""What each rank tells the supervisor of its host, and how that is heard.

Datagrams of JSON on a Unix socket: where a rank is, which run it works on, a row of metrics, and
with which code and error it ends. Best effort: a rank never waits for a supervisor that is slow,
and without one nothing is sent.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from launch.exit_codes import last_words, one_line

VARIABLE = "RANGEFLOW_SUPERVISOR"
"""Names the socket. That name and `.deadline` is a file: until when a noticed rank may go on."""

_ROW_SECONDS = 1.0
_MOST_BYTES = 1 << 16
_LAST_WORD_SECONDS = 1.0
_NO_SENSE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


class Reporter:
    """The rank's side. Use it with `with`."""

    def __init__(
        self,
        path: str | None,
        rank: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        local_rank: int | None = None,
    ) -> None:
        """`local_rank` counts on this host alone; by default it is the rank.

        `abandoned` says that there was to be a supervisor, and there is none any more.
        """
        self._rank = rank
        self._local_rank = rank if local_rank is None else local_rank
        self._clock = clock
        self._last_row = -_ROW_SECONDS
        self._last_phase: tuple[str, int] | None = None
        self._socket: socket.socket | None = None
        self.abandoned = False
        if path:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
            try:
                self._socket.connect(path)
            except OSError:
                self.abandoned = True
                self._socket.close()
                self._socket = None
        self.place("start", 0)

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._socket is not None:
            self._socket.close()

    def place(self, phase: str, step: int) -> None:
        """The phase that is entered, after so many finished steps."""
        if self._last_phase != (phase, step):
            self._last_phase = (phase, step)
            here = {"pid": os.getpid(), "local_rank": self._local_rank}
            self._send({**here, "phase": phase, "step": step})

    def run(self, url: str, generation: int) -> None:
        """The run that this rank has claimed."""
        self._send({"run": url, "generation": generation})

    def row(self, row: dict[str, Any]) -> None:
        """The numbers of a step; at most once a second."""
        if self._clock() - self._last_row >= _ROW_SECONDS:
            self._last_row = self._clock()
            self._send({"row": {k: v for k, v in row.items() if isinstance(v, int | float)}})

    def stopped(self) -> None:
        """This rank ends because an operator has asked for it."""
        self._send({"stopped": True})

    def ended(self, code: int, error: BaseException | None = None) -> int:
        """The last word: the exit code, and the error behind it. Returns the code."""
        said = {
            "exit": code,
            "error": one_line(error) if error else "",
            "kind": type(error).__name__,
        }
        words = last_words(error)
        if self._socket is not None:  # worth a short wait, where a place is not
            self._socket.settimeout(_LAST_WORD_SECONDS)
        self._send(said | {"own": "error" in words, "lost_a_peer": "lost_a_peer" in words})
        return code

    def _send(self, message: dict[str, Any]) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.send(json.dumps({"rank": self._rank, **message}).encode())


def reporter() -> Reporter:
    """The reporter of this process, as its environment says."""
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    return Reporter(os.environ.get(VARIABLE), rank, local_rank=local_rank)


def deadline_file() -> Path | None:
    """Where a supervisor writes the deadline before it gives notice; None without one."""
    place = os.environ.get(VARIABLE)
    return Path(f"{place}.deadline") if place else None


def started_by_torchrun() -> bool:
    """Whether this process is a rank of torchrun's."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a rank is."""

    pid: int
    phase: str
    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Exit:
    """The last word of a rank. `own` when the error is one that began here."""

    rank: int
    code: int
    error: str
    kind: str
    own: bool
    lost_a_peer: bool


class Reports:
    """The supervisor's side: all that the ranks of one start have said. Use it with `with`.

    When a host comes or goes, torchrun itself ends its ranks and starts others, perhaps with other
    numbers: then what the former ones said counts no more, save how far the run came. `world` is
    the number of the present ones.
    """

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        try:
            self._socket.bind(path)
        except OSError:
            self._socket.close()
            raise
        self.path = path
        self.begin()

    def __enter__(self) -> "Reports":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._socket.close()

    def fileno(self) -> int:
        """To wait on."""
        return self._socket.fileno()

    def begin(self) -> None:
        """Forget the start before."""
        self.world = 1
        self._pids: dict[int, int] = {}  # by local rank
        self.places: dict[int, Place] = {}
        self.exits: list[Exit] = []  # in order of time
        self.run = ""
        self.generation = 0
        self.highest_step = 0
        self.row: dict[str, float] = {}
        self.stopped = False

    def hear(self, news: Callable[[int, Place], None] = lambda rank, place: None) -> None:
        """Take what has come; `news` is told each place of a rank. What makes no sense is left."""
        while True:
            try:
                data = self._socket.recv(_MOST_BYTES)
            except BlockingIOError:
                return
            with contextlib.suppress(*_NO_SENSE):
                self._take(json.loads(data), news)

    def _take(self, said: dict[str, Any], news: Callable[[int, Place], None]) -> None:
        rank = int(said["rank"])
        if "phase" in said:
            place = Place(pid=int(said["pid"]), phase=str(said["phase"]), step=int(said["step"]))
            local_rank = int(said["local_rank"])
            if self._pids.setdefault(local_rank, place.pid) != place.pid:
                self.world += 1
                self._pids = {local_rank: place.pid}
                self.places.clear()
                self.exits.clear()
            self.places[rank] = place
            self.highest_step = max(self.highest_step, place.step)
            news(rank, place)
        elif "run" in said:
            self.run, self.generation = str(said["run"]), int(said["generation"])
        elif "row" in said:
            self.row |= {str(name): float(value) for name, value in said["row"].items()}
        elif "stopped" in said:
            self.stopped = True
        elif "exit" in said:
            self.exits.append(
                Exit(
                    rank=rank,
                    code=int(said["exit"]),
                    error=str(said["error"]),
                    kind=str(said["kind"]),
                    own=bool(said["own"]),
                    lost_a_peer=bool(said["lost_a_peer"]),
                )
            )
