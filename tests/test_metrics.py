"""Curves go on over restarts, as TensorBoard's own reader and the lines of a file tell them."""

import json
import math
import resource
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from storage.errors import FencedError, StoreUnavailableError
from trainer.metrics import Metrics, has_rows

Curve = list[tuple[int, float]]


def events(folder: Path) -> EventAccumulator:
    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    return reader


def curve_of_events(folder: Path, name: str = "loss") -> Curve:
    reader = events(folder)
    if name not in reader.Tags()["scalars"]:
        return []
    return [(event.step, event.value) for event in reader.Scalars(name)]


def curve_of_lines(folder: Path, name: str = "loss") -> Curve:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row[name]) for row in map(json.loads, lines)]


def value(generation: int, step: int) -> float:
    """Tells who wrote it, and is exact in float32."""
    return generation * 1024.0 + step


def add(metrics: Metrics, generation: int, steps: range) -> None:
    for step in steps:
        metrics.add({"step": step, "loss": value(generation, step)})


def written(folder: Path, generation: int, resumed_from: int, last: int) -> None:
    """An incarnation that makes the steps after one, up to another, and flushes once."""
    with Metrics(folder, generation=generation, step=resumed_from) as metrics:
        add(metrics, generation, range(resumed_from + 1, last + 1))
        metrics.flush()


def expected_of(*written: tuple[int, range]) -> Curve:
    """The last value of each step."""
    values = {step: value(generation, step) for generation, steps in written for step in steps}
    return sorted(values.items())


def events_file(folder: Path, generation: int) -> Path:
    (found,) = (folder / "tensorboard").glob(f"events.out.tfevents.{generation:010d}.*")
    return found


@contextmanager
def full_disk(most_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond this: the kernel refuses, as a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), incarnations=st.integers(1, 4))
def test_every_step_has_one_value_after_any_restarts(
    data: st.DataObject, incarnations: int
) -> None:
    """Each resumes from a step that was flushed and loses a tail; all but the last may lose all."""
    with tempfile.TemporaryDirectory() as name:
        folder, curve, flushed = Path(name), dict[int, float](), 0
        for generation in range(1, incarnations + 1):
            step = data.draw(st.integers(0, flushed), label="resumed from")
            curve = {k: v for k, v in curve.items() if k <= step}
            with Metrics(folder, generation=generation, step=step) as metrics:
                least = int(generation == incarnations)
                for _ in range(data.draw(st.integers(least, 3), label="flushes")):
                    steps = range(step + 1, step + 1 + data.draw(st.integers(0, 4), label="steps"))
                    add(metrics, generation, steps)
                    metrics.flush()
                    curve |= {k: value(generation, k) for k in steps}
                    step += len(steps)
                add(metrics, generation, range(step + 1, step + 3))  # never flushed
            flushed = step
        assert curve_of_lines(folder) == sorted(curve.items())
        assert curve_of_events(folder) == sorted(curve.items())


def test_a_half_written_last_line_is_dropped_and_written_again(tmp_path: Path) -> None:
    written(tmp_path, 1, 0, 6)
    lines = tmp_path / "metrics.jsonl"
    whole = lines.read_bytes()
    end_of_5 = whole[:-1].rindex(b"\n") + 1
    for cut in range(end_of_5, len(whole)):
        lines.write_bytes(whole[:cut])
        written(tmp_path, 2 + cut, 5, 7)
        found = curve_of_lines(tmp_path)
        assert found == expected_of((1, range(1, 6)), (2 + cut, range(6, 8)))


@pytest.mark.parametrize("line", ["", "[1]", '"text"', "null", "7", "\0\0\0", '{"loss": 1}'])
def test_a_line_that_is_no_row_is_dropped(line: str, tmp_path: Path) -> None:
    written(tmp_path, 1, 0, 3)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(line)
    written(tmp_path, 2, 3, 5)
    assert curve_of_lines(tmp_path) == expected_of((1, range(1, 4)), (2, range(4, 6)))


def test_an_event_file_cut_anywhere_after_the_flush_is_survived(tmp_path: Path) -> None:
    """A killed process leaves the step that was saved, and any part of what came after."""
    for number, lost in enumerate((1, 3, 4, 5, 11, 12, 13, 20, 40)):
        folder = tmp_path / str(number)
        with Metrics(folder, generation=1, step=0) as metrics:
            add(metrics, 1, range(1, 5))
            metrics.flush()
            safe = events_file(folder, 1).stat().st_size
            add(metrics, 1, range(5, 7))
            metrics.flush()
        whole = events_file(folder, 1).read_bytes()
        assert len(whole) - lost > safe
        events_file(folder, 1).write_bytes(whole[:-lost])
        written(folder, 2, 4, 8)
        assert curve_of_events(folder) == expected_of((1, range(1, 5)), (2, range(5, 9)))


def test_late_lines_of_a_stale_writer_do_not_show(tmp_path: Path) -> None:
    with Metrics(tmp_path, generation=1, step=0) as stale:
        add(stale, 1, range(1, 6))
        stale.flush()
        add(stale, 1, range(6, 9))
        with Metrics(tmp_path, generation=2, step=4) as metrics:
            add(metrics, 2, range(5, 7))
            stale.flush()
            metrics.flush()
            add(stale, 1, range(9, 12))
            stale.flush()
            add(metrics, 2, range(7, 8))
            metrics.flush()
        add(stale, 1, range(12, 20))
        stale.flush()
    expected = expected_of((1, range(1, 5)), (2, range(5, 8)))
    assert curve_of_lines(tmp_path) == expected
    assert curve_of_events(tmp_path) == expected
    written(tmp_path, 3, 6, 8)
    expected = expected_of((1, range(1, 5)), (2, range(5, 7)), (3, range(7, 9)))
    assert curve_of_lines(tmp_path) == expected
    assert curve_of_events(tmp_path) == expected


def test_a_run_from_the_beginning_replaces_all(tmp_path: Path) -> None:
    written(tmp_path, 1, 0, 9)
    written(tmp_path, 2, 0, 4)
    assert curve_of_lines(tmp_path) == expected_of((2, range(1, 5)))
    assert curve_of_events(tmp_path) == expected_of((2, range(1, 5)))


def test_rows_wait_for_the_flush(tmp_path: Path) -> None:
    with Metrics(tmp_path, generation=1, step=0) as metrics:
        add(metrics, 1, range(1, 3))
        assert curve_of_lines(tmp_path) == []
        assert curve_of_events(tmp_path) == []
        metrics.flush()
        metrics.flush()
        assert curve_of_lines(tmp_path) == expected_of((1, range(1, 3)))
        assert curve_of_events(tmp_path) == expected_of((1, range(1, 3)))


def test_all_numbers_of_a_row_are_curves_at_the_time_of_the_step(tmp_path: Path) -> None:
    clock = iter([1.0, 2.0, 1234.56789, 1235.5])
    numbers = {"loss": 2.5, "learning_rate": 0.25, "validation_loss/code": 3.5}
    numbers |= {"loss/code": 2.25, "tokens/code": 96}
    metrics = Metrics(tmp_path, generation=1, step=0, wall_clock=lambda: next(clock))
    with metrics:
        metrics.add({"step": 1, **numbers})
        metrics.add({"step": 2, "loss": math.inf})
        metrics.flush()
    reader = events(tmp_path)
    assert sorted(reader.Tags()["scalars"]) == sorted(numbers)
    for name, number in numbers.items():
        event = reader.Scalars(name)[0]
        assert (event.step, event.value, event.wall_time) == (1, number, 1234.568)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"step": 1, **numbers, "time": 1234.568}
    assert curve_of_events(tmp_path) == [(1, 2.5), (2, math.inf)]
    assert curve_of_lines(tmp_path) == [(1, 2.5), (2, None)], "JSON has no infinity"


def test_undecodable_bytes_in_the_lines_stop_no_start(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2.5}\n\xff\xfe\n')
    with Metrics(tmp_path, generation=1, step=3):
        assert curve_of_lines(tmp_path) == [(1, 2.5)]


def test_what_will_be_written_again_is_purged_at_once(tmp_path: Path) -> None:
    written(tmp_path, 1, 0, 6)
    with Metrics(tmp_path, generation=2, step=3):
        assert [step for step, _ in curve_of_events(tmp_path)] == [1, 2, 3]


def test_samples_are_text_that_tensorboard_reads(tmp_path: Path) -> None:
    samples = [
        {"prompt": "The ", "response": "cat\nsat\u2028 ü"},
        {"prompt": "def f", "response": ""},
    ]
    with Metrics(tmp_path, generation=1, step=0) as metrics:
        metrics.add({"step": 3, "loss": 1.0, "samples": samples})
        metrics.flush()
    written(tmp_path, 2, 3, 4)
    reader = events(tmp_path)
    assert reader.Tags()["scalars"] == ["loss"]
    for number, text in enumerate(["The **|**cat\nsat\u2028 ü", "def f**|**"]):
        [event] = reader.Tensors(f"sample/{number}/text_summary")
        assert event.step == 3
        assert [part.decode() for part in event.tensor_proto.string_val] == [text]
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert row["samples"] == samples


def test_a_disk_that_refuses_a_flush_is_an_error_of_the_store(tmp_path: Path) -> None:
    """Closing the files then is no other error, and the next incarnation goes on."""
    refused = pytest.raises(StoreUnavailableError, match=r"^metrics: File too large$")
    with full_disk(1000), refused, Metrics(tmp_path, generation=1, step=0) as metrics:
        add(metrics, 1, range(1, 3))
        metrics.flush()
        add(metrics, 1, range(3, 200))
        metrics.flush()
    written(tmp_path, 2, 2, 5)
    expected = expected_of((1, range(1, 3)), (2, range(3, 6)))
    assert curve_of_lines(tmp_path) == expected
    assert curve_of_events(tmp_path) == expected


@pytest.mark.parametrize("most_bytes", [200, 500, 1000, 3000])
def test_a_flush_that_failed_left_nothing_and_the_next_writes_all(
    most_bytes: int, tmp_path: Path
) -> None:
    refused = pytest.raises(StoreUnavailableError, match=r"^metrics: File too large$")
    with Metrics(tmp_path, generation=1, step=0) as metrics:
        add(metrics, 1, range(1, 200))
        with full_disk(most_bytes), refused:
            metrics.flush()
        assert (tmp_path / "metrics.jsonl").read_bytes() == b""
        metrics.flush()
    expected = expected_of((1, range(1, 200)))
    assert curve_of_lines(tmp_path) == expected
    assert curve_of_events(tmp_path) == expected


def test_rows_added_while_another_thread_flushes_are_each_written_once(tmp_path: Path) -> None:
    last = 3000
    with Metrics(tmp_path, generation=1, step=0) as metrics, ThreadPoolExecutor(3) as pool:
        adding = pool.submit(add, metrics, 1, range(1, last + 1))

        def flush_meanwhile() -> None:
            while not adding.done():
                metrics.flush()

        for flushing in [pool.submit(flush_meanwhile) for _ in range(2)]:
            flushing.result(60)
        adding.result(60)
        metrics.flush()
    expected = expected_of((1, range(1, last + 1)))
    assert curve_of_lines(tmp_path) == expected
    assert curve_of_events(tmp_path) == expected


def test_a_folder_that_cannot_be_made_is_an_error_of_the_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailableError, match="file/run: Not a directory"):
        Metrics(tmp_path / "file" / "run", generation=1, step=0)


def test_a_disk_too_full_to_begin_is_an_error_of_the_store(tmp_path: Path) -> None:
    written(tmp_path, 1, 0, 200)
    before = curve_of_lines(tmp_path)
    with full_disk(1000), pytest.raises(StoreUnavailableError, match=r": File too large$"):
        Metrics(tmp_path, generation=2, step=200)
    assert curve_of_lines(tmp_path) == before


def test_an_incarnation_that_is_stale_when_it_opens_leaves_the_lines_alone(tmp_path: Path) -> None:
    written(tmp_path, 2, 0, 6)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def fenced() -> None:
        raise FencedError("generation 1 is fenced")

    with pytest.raises(FencedError):
        Metrics(tmp_path, generation=1, step=3, check=fenced)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_of_several_rows_of_a_step_the_last_counts(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 9.0}\n{"step": 2, "loss": 2.0}\n{"step": 1, "loss": 1.0}\n'
    )
    with Metrics(tmp_path, generation=1, step=2):
        assert curve_of_lines(tmp_path) == [(1, 1.0), (2, 2.0)]


def test_a_curve_has_rows_when_none_between_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert has_rows(path, 3, 3) and not has_rows(path, 3, 4), "there is no file"
    path.write_text('{"step": 4}\n{"step": 5}\n{"step": 7}\n{"step": 8')
    assert has_rows(path, 3, 5) and has_rows(path, 6, 7)
    assert not has_rows(path, 3, 7) and not has_rows(path, 7, 8)
