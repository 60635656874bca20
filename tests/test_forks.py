"""A fork is what a fresh interpreter is after its imports, and ends as one does."""

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.forks import IMPORTED, ROOT, Fork
from tests.ranks import Ranks

STATE = f"""
import gc, importlib, json, logging, os, random, signal, sys, threading, warnings
for name in {IMPORTED!r}:
    importlib.import_module(name)
import torch
print(json.dumps({{
    "arguments": sys.argv,
    "path": sys.path,
    "folder": os.getcwd(),
    "environment": dict(os.environ),
    "main": __name__,
    "input": sys.stdin.read(),
    "files": sorted(os.listdir("/proc/self/fd")),
    "leads": os.getpgid(0) == os.getpid(),
    "handlers": [str(signal.getsignal(n)) for n in signal.valid_signals()],
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
    "logging": [str(logging.root.handlers), logging.root.level],
    "warnings": str(warnings.filters),
    "threads": threading.active_count(),
    "collecting": [gc.isenabled(), gc.get_threshold()],
    "modules": sorted(sys.modules.keys() - {{"runpy", "importlib.util"}}),
    "torch": [
        *(torch.get_num_threads(), torch.get_num_interop_threads(), torch.is_grad_enabled()),
        *(str(torch.get_default_dtype()), torch.are_deterministic_algorithms_enabled()),
    ],
}}))
"""
DRAWN = """
import random, numpy, torch
print(random.random(), numpy.random.rand(), torch.rand(1).item(), torch.initial_seed())
"""
LEAVES = """
import atexit, sys, threading
told = threading.Event()
def last():
    told.wait()
    print("the thread", flush=True)
threading.Thread(target=last).start()
atexit.register(print, "at exit", flush=True)
print("unflushed", end=" ")
told.set()
sys.exit(75)
"""


def said(*programs: str, env: dict[str, str] | None = None) -> list[tuple[int, str]]:
    """The exit code and the output of each, all at once."""
    with tempfile.TemporaryDirectory() as folder:
        files = [open(Path(folder, str(n)), "w+") for n in range(len(programs))]  # noqa: SIM115
        forks = [
            Fork(["-c", program, "one", "two"], cwd=Path("/"), env=env, output=file)
            for program, file in zip(programs, files, strict=True)
        ]
        codes = [fork.wait(60) for fork in forks]
        outputs = []
        for file in files:
            with file:
                file.seek(0)
                outputs.append(file.read())
    return list(zip(codes, outputs, strict=True))


def test_a_fork_is_what_a_fresh_interpreter_is_after_the_same_imports() -> None:
    env = {"PYTHONPATH": str(ROOT), "HOME": "/", "LC_CTYPE": "C.UTF-8", "A": "é"}
    fresh = subprocess.run(
        [sys.executable, "-c", STATE, "one", "two"],
        cwd="/",
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
        process_group=0,
    )
    [(code, output)] = said(STATE, env=env)
    assert code == 0, output
    expected, found = (json.loads(text) for text in (fresh.stdout, output))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == value, name


def test_forks_draw_other_random_numbers() -> None:
    (_, one), (_, other) = said(DRAWN, DRAWN)
    assert not set(one.split()) & set(other.split())


def test_a_fork_ends_as_an_interpreter_does() -> None:
    assert said(LEAVES) == [(75, "unflushed the thread\nat exit\n")]
    [(code, output)] = said("assert 0, 'wrong'")
    assert code == 1 and output.endswith("AssertionError: wrong\n")


def test_a_fork_is_killed_and_waited_for(tmp_path: Path) -> None:
    with open(tmp_path / "output", "w") as output:
        fork = Fork(["-c", "import signal; signal.pause()"], output=output)
        with pytest.raises(subprocess.TimeoutExpired):
            fork.wait(0)
        fork.kill()
        assert fork.wait(60) == -signal.SIGKILL
        fork.kill()
        assert fork.wait() == -signal.SIGKILL


RANK = """
import os, signal, sys
from torch.distributed import init_process_group
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
init_process_group("gloo")
if sys.argv[1] == "fails":
    if os.environ["RANK"] == "1":
        sys.exit(3)
    signal.sigwait([signal.SIGTERM])
    print("told")
"""


@pytest.mark.parametrize(("how", "code", "told"), [("ends", 0, ""), ("fails", 1, "told\n")])
def test_when_a_rank_fails_the_others_are_told(
    how: str, code: int, told: str, tmp_path: Path
) -> None:
    with open(tmp_path / "0", "w+") as one, open(tmp_path / "1", "w+") as other:
        assert Ranks(["-c", RANK, how], [one, other]).wait(60) == code
    assert (tmp_path / "0").read_text() == told
