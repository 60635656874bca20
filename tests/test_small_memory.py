"""Memory that is limited runs out, and the kernel's choice can be told."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.chaos import small_memory
from launch.chaos.small_memory import SmallMemory, why_no_small_memory


@pytest.fixture
def memory() -> Iterator[SmallMemory]:
    if why_not := why_no_small_memory():
        pytest.skip(why_not)
    with small_memory.small_memory() as made:
        yield made


def test_when_memory_runs_out_the_process_that_was_named_is_killed(memory: SmallMemory) -> None:
    hold = "print('up', flush=True); import signal; signal.pause()"
    command = memory.entering(sys.executable, "-c", hold)
    victim = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert victim.stdout is not None and victim.stdout.readline() == "up\n"
        memory.give_up_first(victim.pid)
        memory.leave_free(64 << 20)
        eater = memory.entering(sys.executable, small_memory.__file__, str(memory.folder))
        assert subprocess.run(eater, timeout=60).returncode == 0
        assert victim.wait(60) == -9
        assert memory.kills() == 1
    finally:
        victim.kill()
        victim.communicate()


def test_of_a_cgroup_whose_processes_were_just_killed_nothing_is_left() -> None:
    if why_not := why_no_small_memory():
        pytest.skip(why_not)
    hold = "x = bytes(200 << 20); print('up', flush=True); import signal; signal.pause()"
    with small_memory.small_memory() as made:
        command = made.entering(sys.executable, "-c", hold)
        holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert holder.stdout is not None and holder.stdout.readline() == "up\n"
        holder.kill()
    assert not made.folder.exists()
    holder.communicate()


def test_where_memory_cannot_be_limited_the_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text("tmpfs /tmp tmpfs rw 0 0\n")
    monkeypatch.setattr(small_memory, "_MOUNTS", mounts)
    assert why_no_small_memory() == "no cgroup can be made that limits memory: none is mounted"
