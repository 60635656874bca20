"""Who a process is, and whether the process that an identity names is provably gone."""

import os
import socket
from pathlib import Path
from typing import Any


def this_process() -> dict[str, Any]:
    """The identity of this process: host, boot, pid namespace, pid and start time."""
    return {
        "host": socket.gethostname(),
        "boot_id": _boot_id(),
        "pid_namespace": _pid_namespace(),
        "pid": os.getpid(),
        "started": _start_time(os.getpid()),
    }


def provably_gone(owner: dict[str, Any]) -> bool:
    """Whether that process cannot be running any more, as far as this host can prove.

    A process of another host, boot or pid namespace proves nothing; nor does a host without /proc.
    A process id that was given to a newer process is told apart by its start time.
    """
    here = {"boot_id": _boot_id(), "pid_namespace": _pid_namespace()}
    if not all(here.values()) or any(owner.get(name) != value for name, value in here.items()):
        return False
    return _start_time(owner.get("pid", 0)) != owner.get("started")


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    """ "" where it is not known, or where /proc is another namespace's and its numbers mislead."""
    try:
        if Path("/proc/self").readlink().name != str(os.getpid()):
            return ""
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _start_time(pid: int) -> str:
    """Clock ticks since boot at which `pid` started (proc(5), field 22); "" when it is not there.

    A zombie is gone: it runs no more code, whoever has yet to reap it.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]
