"""The processes of a trial, found in /proc by the mark in their environment.

Covers: processes that changed their session, group, parent, or namespaces.
Does not cover: processes that were given another environment.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from launch.chaos.watched import VARIABLE

Role = Literal["supervisor", "agent", "rank"]


def living(folder: Path) -> list[int]:
    """The processes of a trial or of one of its programs, as this machine counts."""
    mark = rb"(^|\0)" + re.escape(f"{VARIABLE}={folder}".encode()) + rb"(/|\0|$)"
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if re.search(mark, (place / "environ").read_bytes()):
                found.append(int(place.name))
    return sorted(pid for pid in found if state(pid) not in ("Z", "X", ""))


def described(pids: Sequence[int]) -> str:
    """Processes, with the beginnings of their command lines."""
    words = []
    for pid in pids:
        with suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
            words.append(f"process {pid} ({line[:80]}...)")
    return ", ".join(words)


def role_of(pid: int) -> Role | None:
    """What a process is; None for any other, and for one that has ended."""
    try:
        return role(Path(f"/proc/{pid}/cmdline").read_text().split("\0"))
    except OSError:
        return None


def role(words: Sequence[str]) -> Role | None:
    """What a process with this command line is."""
    if list(words[1:3]) == ["-m", "launch.supervise"]:
        return "supervisor"
    if list(words[1:3]) in (["-m", "launch.agent"], ["-m", "torch.distributed.run"]):
        return "agent"
    return "rank" if any(word.endswith(".py") for word in words[1:3]) else None


def state(pid: int) -> str:
    """As /proc/<pid>/stat has it; "" when it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def pending(pid: int, number: int) -> bool:
    """Whether a process has been sent a signal that it has not taken: for one that is stopped."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    masks = re.findall(r"^(?:SigPnd|ShdPnd):\s*([0-9a-f]+)$", status, re.MULTILINE)
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


def own_number(pid: int) -> int:
    """The number by which a process knows itself; 0 when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^NSpid:.*?(\d+)$", status, re.MULTILINE)
    return int(found[1]) if found else pid
