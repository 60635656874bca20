import os
import signal
import subprocess
import sys

import pytest

from checkpointing.owner import provably_gone, this_process

PROGRAM = (
    "import json, sys; from checkpointing.owner import this_process;"
    "print(json.dumps(this_process()), flush=True); sys.stdin.read()"
)


def test_this_process_is_not_gone() -> None:
    assert not provably_gone(this_process())


def test_a_killed_process_is_gone_also_before_it_is_reaped() -> None:
    import json

    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        owner = json.loads(process.stdout.readline())
        assert not provably_gone(owner)
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert provably_gone(owner), "a zombie runs no code"
    assert provably_gone(owner)


def test_a_stopped_process_is_not_gone() -> None:
    import json

    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        owner = json.loads(process.stdout.readline())
        os.kill(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        assert not provably_gone(owner)
        process.kill()


def test_a_process_id_given_to_another_process_is_told_apart() -> None:
    assert provably_gone(this_process() | {"started": "1"})


@pytest.mark.parametrize("where", ["boot_id", "pid_namespace"])
def test_another_place_proves_nothing(where: str) -> None:
    assert not provably_gone(this_process() | {where: "elsewhere", "pid": 999_999_999})


def test_an_identity_without_a_boot_id_proves_nothing() -> None:
    assert not provably_gone({"pid": 999_999_999})


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a pid namespace")
def test_proc_of_another_pid_namespace_proves_nothing() -> None:
    import json

    told = f"{PROGRAM}; from checkpointing.owner import provably_gone; import os, subprocess\n"
    told += "other = subprocess.Popen(['sleep', '1000'])\n"
    told += "print(provably_gone({**this_process(), 'pid': other.pid, 'started': '1'}))"
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", told],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    owner, gone = done.stdout.splitlines()
    assert json.loads(owner)["pid_namespace"] == "", "its number names another process there"
    assert gone == "False", "it sleeps"
    assert not provably_gone({**this_process(), "pid_namespace": "", "started": "1"})
