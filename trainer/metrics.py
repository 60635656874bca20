"""The curves of a run: `metrics.jsonl`, one line a step, and TensorBoard events.

One continuous curve over restarts. Rows wait in memory until `flush`, which comes before every
commit; a new incarnation drops the rows after the step that it resumes from. A stale incarnation
cannot spoil the curve: `metrics.jsonl` is a new file for each incarnation, and event files are read
in the order of generations, each of which begins by purging what it will write again.
"""

import io
import json
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from storage.errors import StoreUnavailableError

_NOT_CURVES = ("step", "time", "samples")


class Metrics:
    """Writes the curves of one incarnation below a folder. For rank 0 only.

    `check` raises when a later incarnation owns the run; the lines so far are then left alone.
    Rows may be added by one thread and flushed by others.
    """

    def __init__(
        self,
        folder: Path,
        *,
        generation: int,
        step: int,
        check: Callable[[], object] = lambda: None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._wall_clock = wall_clock
        self._lock = threading.Lock()
        self._rows: list[dict[str, Any]] = []
        events = folder / "tensorboard"
        try:
            events.mkdir(parents=True, exist_ok=True)
            self._lines = _reopen(folder / "metrics.jsonl", step, check)
            name = f"events.out.tfevents.{generation:010d}.{time.time_ns():020d}"
            self._events = open(events / name, "xb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise StoreUnavailableError(f"{folder}: {error.strerror}") from error
        start = SessionLog(status=SessionLog.START)
        self._opening = [
            Event(file_version="brain.Event:2", wall_time=wall_clock()),
            Event(session_log=start, step=step + 1, wall_time=wall_clock()),
        ]
        self.flush()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._lock:
            self._lines.close()
            self._events.close()

    def add(self, row: dict[str, Any]) -> None:
        """Remember the row of one step. Its `step` counts finished steps."""
        self._rows.append({**row, "time": round(self._wall_clock(), 3)})

    def flush(self) -> None:
        """Write the rows that wait.

        Raises StoreUnavailableError when the disk refuses; the rows wait on, and the files are as
        they were.
        """
        with self._lock:
            if self._lines.closed:
                return
            rows = list(self._rows)
            lines = [json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows]
            events = [*self._opening, *(event for row in rows for event in _events_of(row))]
            try:
                _append(self._lines, "".join(lines).encode(), self._events, _records(events))
            except OSError as error:
                raise StoreUnavailableError(f"metrics: {error.strerror}") from error
            self._opening = []
            del self._rows[: len(rows)]


def has_rows(path: Path, after: int, step: int) -> bool:
    """Whether a `metrics.jsonl` has every row after the step `after`, up to `step`."""
    return {row_step for row_step, _ in _rows(path)} >= set(range(after + 1, step + 1))


def _events_of(row: dict[str, Any]) -> Iterator[Event]:
    for name, value in row.items():
        if name not in _NOT_CURVES:
            scalar = summary.scalar(name, value)  # type: ignore[no-untyped-call]
            yield Event(summary=scalar, step=row["step"], wall_time=row["time"])
    for number, one in enumerate(row.get("samples", [])):
        content = f"{one['prompt']}**|**{one['response']}"
        text = summary.text(f"sample/{number}", content)  # type: ignore[no-untyped-call]
        yield Event(summary=text, step=row["step"], wall_time=row["time"])


def _records(events: Iterable[Event]) -> bytes:
    """The events as they stand in a file of TensorBoard's."""
    data = io.BytesIO()
    writer = RecordWriter(data)
    for event in events:
        writer.write(event.SerializeToString())
    return data.getvalue()


def _append(lines: BinaryIO, more_lines: bytes, events: BinaryIO, more_events: bytes) -> None:
    """Append to both files and sync them, or, when that fails, to neither."""
    before = [(file, file.seek(0, os.SEEK_END)) for file in (lines, events)]
    try:
        for file, data in ((lines, more_lines), (events, more_events)):
            _write_all(file, data)
            os.fsync(file.fileno())
    except OSError:
        for file, size in before:
            file.truncate(size)
            file.seek(size)
        raise


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """The row with null for what JSON has no number for."""
    lost = {k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
    return {name: None if name in lost else value for name, value in row.items()}


def _reopen(path: Path, step: int, check: Callable[[], object]) -> BinaryIO:
    """A new file in the place of `path`, with its rows up to `step`, open for appending.

    Of a step with several rows the last one counts.
    """
    for left in path.parent.glob(".metrics.jsonl.*"):  # by a process killed in here
        left.unlink(missing_ok=True)
    kept = {row_step: line + "\n" for row_step, line in _rows(path) if row_step <= step}
    temporary = path.with_name(f".metrics.jsonl.{uuid.uuid4().hex}")
    file = cast(BinaryIO, open(temporary, "xb", buffering=0))  # noqa: SIM115
    try:
        _write_all(file, "".join(line for _, line in sorted(kept.items())).encode())
        os.fsync(file.fileno())
        check()  # at the last instant: a stale incarnation must not put its file in place
        os.replace(temporary, path)
    except BaseException:
        file.close()
        temporary.unlink(missing_ok=True)
        raise
    return file


def _rows(path: Path) -> Iterator[tuple[int, str]]:
    """The step and the line of each row, as they stand there."""
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            yield int(json.loads(line)["step"]), line
        except (ValueError, KeyError, TypeError):
            continue  # the last line of a killed process, half written


def _write_all(file: BinaryIO, data: bytes) -> None:
    """Write everything: an unbuffered file may take a part, and closing it must write nothing."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
