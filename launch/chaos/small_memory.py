"""A limit of memory for programs, as a container has one, and a neighbour that eats all of it.

Usage as a program: small_memory.py FOLDER; it eats memory until the kernel has killed a process of
the cgroup.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

_MOUNTS = Path("/proc/self/mounts")
_BITE_BYTES = 4 << 20
_EMPTY_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class SmallMemory:
    """A cgroup: programs that enter it, and theirs, share its memory."""

    folder: Path

    def entering(self, *command: str) -> list[str]:
        """The command line that runs a command in it."""
        script = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
        return ["sh", "-c", script, str(self.folder), *command]

    def leave_free(self, size_bytes: int) -> None:
        """From now on there is only so much more than what is used."""
        used = self._file("memory.current", "memory.usage_in_bytes").read_text()
        limit = self._file("memory.max", "memory.limit_in_bytes")
        limit.write_text(str(int(used) + size_bytes))

    @staticmethod
    def give_up_first(pid: int) -> None:
        """When there is no memory left, the kernel kills this process before others."""
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000")

    def kills(self) -> int:
        """How many processes the kernel has killed for want of memory."""
        told = self._file("memory.events", "memory.oom_control").read_text().split()
        return int(told[told.index("oom_kill") + 1])

    def _file(self, second: str, first: str) -> Path:
        """As the second or the first version of cgroups names it."""
        place = self.folder / second
        return place if place.exists() else self.folder / first


@contextmanager
def small_memory() -> Iterator[SmallMemory]:
    """A new cgroup. Raises OSError, with the reason, where none can be made that limits memory."""
    made = _made()
    try:
        yield made
    finally:
        end = time.monotonic() + _EMPTY_SECONDS
        while made.folder.exists() and time.monotonic() < end:
            with suppress(
                OSError
            ):  # of a process that was just killed, something lives on a little
                made.folder.rmdir()
                break
            time.sleep(0.01)


def why_no_small_memory() -> str:
    """Why memory cannot be limited here, "" when it can."""
    try:
        with small_memory() as made:
            made.kills()
    except (OSError, ValueError) as error:
        return f"no cgroup can be made that limits memory: {error}"
    return ""


def _made() -> SmallMemory:
    failed: OSError = FileNotFoundError("none is mounted")
    for parent in _parents():
        folder = parent / f"rangeflow-chaos-{uuid4().hex[:8]}"
        try:
            folder.mkdir()
        except OSError as error:
            failed = error
            continue
        if any((folder / name).exists() for name in ("memory.max", "memory.limit_in_bytes")):
            return SmallMemory(folder)
        folder.rmdir()
    raise failed


def _parents() -> Iterator[Path]:
    """Cgroups in which one may be made: this process's own, those above it, the root of each."""
    own = {
        controllers: path
        for _, controllers, path in (
            line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()
        )
    }
    for line in _MOUNTS.read_text().splitlines():
        _, place, kind, options, *_ = line.split()
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options.split(",")):
            below = Path(own.get("" if kind == "cgroup2" else "memory", "/").lstrip("/"))
            for path in (below, *below.parents):
                if Path(place, path).is_dir():
                    yield Path(place, path)


def _eat(memory: SmallMemory) -> None:
    before = memory.kills()
    eaten = []
    while memory.kills() == before:
        eaten.append(os.urandom(_BITE_BYTES))


if __name__ == "__main__":
    _eat(SmallMemory(Path(sys.argv[1])))
