"""Starts Python programs as forks of one process that has imported torch and the product.

A fresh interpreter spends over three seconds of a processor on imports before the training
program trains, and the tests start it a hundred times. A fork is such an interpreter after its
imports, with its own arguments, folder, environment, output and process group.

Does not cover: what comes before the imports or during them; an import that is missing; what the
interpreter and C libraries read from the environment when they start (`PYTHON...`,
`OMP_NUM_THREADS`); destructors when the interpreter ends. Forks of one server hash strings with
one seed, which is not the tests' own. For these, some tests start the program `fresh`
(`programs.Program`).
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = (
    *("launch.build", "launch.caching", "launch.editing", "launch.opening", "launch.running"),
    *("launch.train", "launch.world", "checkpointing.alone"),
    "torch._dynamo",  # torch imports it when the first optimizer is made
)
REQUEST_BYTES = 200_000


class Fork:
    """A program that runs in a fork; as much of `subprocess.Popen` as tests need.

    `arguments` are a file's path, or "-c" and a program, and what the program finds behind them.
    """

    def __init__(
        self,
        arguments: Sequence[str | Path],
        *,
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
        output: IO[Any],
    ) -> None:
        request = {
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd),
            "env": dict(os.environ if env is None else env),
        }
        server = _server()
        self._told, told = os.pipe()
        socket.send_fds(server, [json.dumps(request).encode()], [output.fileno(), told])
        os.close(told)
        pid, (self._pidfd,), _, _ = socket.recv_fds(server, 100, 1)
        self.pid = int(pid)
        self.returncode: int | None = None

    @property
    def pidfds(self) -> list[int]:
        """Readable when the process ends; none once it was waited for."""
        return [self._pidfd] if self.returncode is None else []

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; of a process that was killed, minus the signal."""
        if self.returncode is None:
            milliseconds = None if timeout is None else timeout * 1000
            poll = select.poll()
            poll.register(self._told, select.POLLIN)
            if not poll.poll(milliseconds):
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            self.returncode = int(os.read(self._told, 100))
            os.close(self._told)
            os.close(self._pidfd)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, if the process has not ended."""
        if self.returncode is None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


@cache
def _server() -> socket.socket:
    """The way to the process that forks; it ends when this one does."""
    kept = (
        "HOME",
        "LD_LIBRARY_PATH",
        "PATH",
        "TMPDIR",
    )  # not what imports have set in this process
    env = {name: os.environ[name] for name in kept if name in os.environ}
    env["OPENBLAS_NUM_THREADS"] = "1"  # a fork has only the thread that forks
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )

    def stop() -> None:
        mine.close()
        process.wait()

    atexit.register(stop)
    return mine


def serve(control: socket.socket, made: Mapping[str, str]) -> list[str]:
    """Fork for each request. Returns in a fork only, with the arguments of what it is to run.

    `made` is what the imports have added to the environment.
    """
    children: dict[int, tuple[int, int]] = {}
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            if ready != control.fileno():
                poll.unregister(ready)
                os.close(ready)
                pid, told = children.pop(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with suppress(BrokenPipeError):
                    os.write(told, str(code).encode())
                os.close(told)
                continue
            request, fds, _, _ = socket.recv_fds(control, REQUEST_BYTES, 2)
            if not request:
                for pid, _ in children.values():
                    os.kill(pid, signal.SIGKILL)
                sys.exit()
            assert len(os.listdir("/proc/self/task")) == 1, "a fork has only the thread that forks"
            pid = os.fork()
            if pid == 0:
                control.detach()
                return become(fds[0], made, **json.loads(request))
            output, told = fds
            os.close(output)
            pidfd = os.pidfd_open(pid)
            socket.send_fds(control, [str(pid).encode()], [pidfd])
            poll.register(pidfd, select.POLLIN)
            children[pidfd] = pid, told


def become(
    output: int, made: Mapping[str, str], arguments: list[str], cwd: str, env: dict[str, str]
) -> list[str]:
    """Make this process what `python ARGUMENTS` would be; returns the arguments."""
    import numpy as np
    import torch

    os.setpgid(0, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update({**made, **env})
    sys.path[1:1] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    np.random.seed()  # by chance, as in a fresh process; Python's own generator does it by itself
    torch.default_generator.seed()
    return arguments


def run(arguments: list[str]) -> int:
    """What the interpreter does with its arguments; returns the exit code."""
    try:
        execute(arguments)
    except SystemExit as leaving:
        return int(leaving.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def execute(arguments: list[str]) -> None:
    """Run a program as `__main__`."""
    if arguments[0] == "-c":
        _, program, *rest = arguments
        sys.argv[:] = ["-c", *rest]
        sys.path[0] = ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(program, "<string>", "exec"), vars(main))
    else:
        sys.argv[:] = arguments
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")


def end(code: int) -> NoReturn:
    """End as an interpreter does, but leave it to the system to free what the imports have made."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as multiprocessing does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    before = dict(os.environ)
    for name in IMPORTED:
        importlib.import_module(name)
    made = {name: value for name, value in os.environ.items() if before.get(name) != value}
    gc.collect()
    gc.freeze()  # a fork that collects garbage leaves the imported alone, and the pages it shares
    end(run(serve(socket.socket(fileno=int(sys.argv[1])), made)))
