"""Worker processes of a preparation: told what to do in JSON lines, dead with their parent.

Covers: a worker whose parent was killed ends at once, in the middle of its work; a worker that
fails or is killed ends the preparation with one error; a worker announces a phase and waits until
its parent has heard it.
Does not cover: work on another machine.
"""

import json
import logging
import os
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import storage.errors
from data_service.inputs import Part
from data_service.tasks import Done, Job, Task, Tasks
from storage.errors import RangeFlowError

logger = logging.getLogger(__name__)

_ROOT = Path(__file__).resolve().parents[1]
_PROGRAM = (
    f"import sys; sys.path.insert(0, {str(_ROOT)!r}); "
    "from data_service.workers import work; sys.exit(work())"
)
_END_TIMEOUT_SECONDS = 10.0


class WorkerLostError(RangeFlowError):
    """A worker ended without a word: killed, most likely for memory. Starting again goes on."""

    exit_code = 75


class Workers:
    """A context manager: processes that do tasks for one preparation."""

    def __init__(self, count: int, job: Job, announce: Callable[[str], None]) -> None:
        self._announce = announce
        self._heard: queue.SimpleQueue[tuple[int, dict[str, Any] | None]] = queue.SimpleQueue()
        self._processes: list[subprocess.Popen[str]] = []
        self._listeners: list[threading.Thread] = []
        self._known: dict[int, Mapping[str, Any]] = {}
        for number in range(count):
            process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C is for the parent, whose end ends us
            )
            self._processes.append(process)
            listener = threading.Thread(target=self._listen, args=(number,), daemon=True)
            self._listeners.append(listener)
            listener.start()
        for number in range(count):
            self._tell(number, job.to_json())

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._processes:
            if kind is not None:
                process.kill()
            _close(process.stdin)
        for process in self._processes:
            try:
                process.wait(_END_TIMEOUT_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for listener in self._listeners:
            listener.join()

    def perform(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Done]]:
        """The batches of all tasks, those of one in order, of several as they come.

        Raises the first error of any worker.
        """
        waiting = iter(tasks)
        at_work: dict[int, Task] = {}

        def give(number: int) -> None:
            task = next(waiting, None)
            if task is not None:
                at_work[number] = task
                if self._known.get(number) is not task.known:  # large, and the same for a stage
                    self._known[number] = task.known
                    self._tell(number, {"known": task.known})
                self._tell(
                    number, {"stage": task.stage, "number": task.number, "parts": task.parts}
                )

        for number in range(len(self._processes)):
            give(number)
        while at_work:
            number, message = self._heard.get()
            if message is None:
                raise self._lost(number, at_work.get(number))
            if "announce" in message:
                self._announce(message["announce"])
                self._tell(number, {})
            elif "error" in message:
                kind = getattr(storage.errors, message["error"], RangeFlowError)
                raise kind(message["message"])
            elif "done" in message:
                yield at_work[number], Done(*message["done"])
            else:
                del at_work[number]
                give(number)

    def _tell(self, number: int, message: Mapping[str, Any]) -> None:
        pipe = self._processes[number].stdin
        assert pipe is not None
        try:
            pipe.write(json.dumps(message) + "\n")
            pipe.flush()
        except OSError:
            pass  # it has ended, as its listener is about to say

    def _listen(self, number: int) -> None:
        pipe = self._processes[number].stdout
        assert pipe is not None
        with pipe:
            for line in pipe:
                try:
                    self._heard.put((number, json.loads(line)))
                except ValueError:
                    break  # torn by a kill
        self._heard.put((number, None))

    def _lost(self, number: int, task: Task | None) -> WorkerLostError:
        code = self._processes[number].wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        where = f" in {task.stage} {task.number}" if task else ""
        return WorkerLostError(
            f"a worker ended by {how}{where}; run the same command again to go on, with fewer "
            "--workers if memory was short"
        )


def available_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def work() -> int:
    """What a worker runs: tasks from its standard input, until that ends."""
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_die_with_parent, args=(told,), daemon=True).start()
    protocol = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not be taken for a message

    def say(message: Mapping[str, Any]) -> None:
        protocol.write(json.dumps(message) + "\n")
        protocol.flush()

    def announce(phase: str) -> None:
        say({"announce": phase})
        told.get()

    try:
        job = Job.from_json(json.loads(told.get()))
        tasks = Tasks(job, announce)
        known: Mapping[str, Any] = {}
        while True:
            value = json.loads(told.get())
            if "known" in value:
                known = value["known"]
                continue
            parts = [Part(*part) for part in value["parts"]]
            task = Task(value["stage"], value["number"], parts, known)
            for done in tasks.perform(task):
                say({"done": done})
            say({})
    except RangeFlowError as error:
        say({"error": type(error).__name__, "message": str(error)})
    except Exception as error:  # one line for the parent, the rest for who looks for the fault
        traceback.print_exc()
        say({"error": "RangeFlowError", "message": f"a worker failed: {error!r}"})
    told.get()
    return 1


def _die_with_parent(told: "queue.SimpleQueue[str]") -> None:
    """Hands on what the parent says; its end, however it came, is ours at once."""
    for line in sys.stdin:
        told.put(line)
    os._exit(0)


def _close(pipe: IO[str] | None) -> None:
    try:
        if pipe is not None:
            pipe.close()
    except OSError:
        pass  # what was not read any more
