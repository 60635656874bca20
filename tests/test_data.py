import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointing.history import history
from checkpointing.incarnation import Incarnation, claim_run
from data_service.batches import Batches
from data_service.plan import Plan
from launch.caching import RemoteData
from launch.config import parse_config
from launch.data import open_batches
from launch.phase import Phase
from launch.world import World
from storage.errors import DataError, FencedError, RangeFlowError, StoreUnavailableError
from storage.log import Log, record_key
from storage.store import open_store
from tests.conftest import Interrupted
from tests.made_sources import write_source
from tests.programs import checkpoints, rows, train_here

ALONE = World(0, 1, torch.device("cpu"), "none")
SHAPE = (
    "--max_steps=6",
    "--eval_interval_steps=0",
    "--sample_interval_steps=0",
    "--save_interval_steps=2",
    "--wait_for_saves",
    "--n_embd=32",
    "--context=16",
    "--global_batch_size=8",
    "--warmup_steps=2",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two sources, `a` and `b`."""
    folder = tmp_path_factory.mktemp("sources")
    write_source(folder / "a", train=(3000, 2000), validation=(400,))
    write_source(folder / "b", train=(3000,), validation=(400,), start=90)
    return folder


@pytest.fixture
def sources(made: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return shutil.copytree(made, tmp_path / "sources")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def incarnation_of(run: Path) -> Incarnation:
    store = open_store(str(run))
    return claim_run(store, Log(store), body={"accepted_changes": {}}, take_over=True)


def opened(run: Path, *data: str) -> Batches:
    """The batches of a start of its own."""
    config = parse_config(["--run", str(run), *SHAPE, *(f"--data={flag}" for flag in data)])
    return open_batches(config, ALONE, incarnation_of(run), Phase(), RemoteData(config))


def plans(run: Path) -> list[Plan]:
    """The plans in the log, oldest first."""
    records = history(Log(open_store(str(run))).refresh()).plans
    return [Plan.from_json(record.body["plan"]) for record in records]


def weights(plan: Plan) -> list[tuple[int, dict[str, int]]]:
    """(first step, weights by source) of each segment."""
    return [(s.from_step, {x.name: x.weights[0][1] for x in s.sources}) for s in plan.segments]


def test_the_plan_is_recorded_once(sources: Path, run: Path) -> None:
    flags = (f"a={sources}/a:2", f"b={sources}/b:1")
    first = opened(run, *flags)
    again = opened(run, *flags)
    assert weights(plans(run)[0]) == [(0, {"a": 2_000_000, "b": 1_000_000})]
    assert len(plans(run)) == 1
    assert first.plan == again.plan == plans(run)[0]
    assert (first.batch(3) == again.batch(3)).all()


def test_the_order_of_the_flags_does_not_matter(sources: Path, run: Path) -> None:
    flags = (f"a={sources}/a:2", f"b={sources}/b:1")
    opened(run, *flags)
    opened(run, *reversed(flags))
    assert len(plans(run)) == 1


def test_batches_are_of_the_configured_shape(sources: Path, run: Path) -> None:
    assert opened(run, f"a={sources}/a").batch(0).shape == (8, 17)


def test_sources_may_move(sources: Path, run: Path) -> None:
    before = opened(run, f"a={sources}/a", f"b={sources}/b").batch(1)
    moved = sources.rename(sources.with_name("elsewhere"))
    after = opened(run, f"a={moved}/a", f"b={moved}/b").batch(1)
    assert (before == after).all()
    assert len(plans(run)) == 1


def test_a_change_before_the_first_checkpoint_replaces_the_plan(sources: Path, run: Path) -> None:
    opened(run, f"a={sources}/a:2", f"b={sources}/b:1")
    opened(run, f"a={sources}/a:1", f"b={sources}/b:1")
    assert weights(plans(run)[-1]) == [(0, {"a": 1_000_000, "b": 1_000_000})]


def test_a_run_that_goes_on_with_other_weights_opens_a_segment_there(
    sources: Path, run: Path, interrupt: Any
) -> None:
    first = (f"--data=a={sources}/a:1", f"--data=b={sources}/b:1")
    then = (f"--data=a={sources}/a:0", f"--data=b={sources}/b:1")
    with pytest.raises(Interrupted):
        train_here("--run", run, *first, *SHAPE, listener=interrupt("update:before", 6))
    assert [c.step for c in checkpoints(run)] == [2, 4]
    again = ("--run", run, "--take_over", *SHAPE)
    assert train_here(*again, *then) == 0
    both, one = {"a": 1_000_000, "b": 1_000_000}, {"a": 0, "b": 1_000_000}
    assert weights(plans(run)[-1]) == [(0, both), (4, one)]
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5, 6]
    batches = opened(run, *(flag.removeprefix("--data=") for flag in then))
    assert {name for name, *_ in batches.sample_ids(3)} == {"a", "b"}
    assert {name for name, *_ in batches.sample_ids(4)} == {"b"}


def test_weights_over_steps_are_recorded_with_the_plan(sources: Path, run: Path) -> None:
    data = (f"--data=a={sources}/a", f"--data=b={sources}/b", "--weights=b=0@2,3@4")
    assert train_here("--run", run, *data, *SHAPE) == 0
    assert train_here("--run", run, *data, *SHAPE, "--max_steps=8") == 0
    (plan,) = plans(run)
    (segment,) = plan.segments
    points = {source.name: source.weights for source in segment.sources}
    assert points == {"a": ((0, 1_000_000),), "b": ((2, 0), (4, 3_000_000))}
    assert segment.anchors, "a ramp is gone through once"
    batches = opened(run, *(flag.removeprefix("--data=") for flag in data[:2]))
    assert batches.plan != plan, "the same data without the weights is another mixture"


def test_a_start_without_data_goes_on_with_that_of_the_run(sources: Path, run: Path) -> None:
    data = (f"--data=a={sources}/a", f"--data=b={sources}/b:3")
    assert train_here("--run", run, *data, *SHAPE, "--max_steps=4") == 0
    assert train_here("--run", run, *SHAPE) == 0
    assert len(plans(run)) == 1
    assert not (run / "corpus").exists(), "the embedded corpus is for a run that has no data"


def test_an_edit_whose_record_is_damaged_is_missed_aloud(
    sources: Path, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened(run, f"a={sources}/a")
    opened(run, f"a={sources}/a")
    assert "cannot be read" not in caplog.text
    opened(run, f"b={sources}/b")
    newest = history(Log(open_store(str(run))).refresh()).plans[-1].index
    open_store(str(run)).put(record_key(newest), b"{}")
    opened(run)
    assert f"records {newest} of the log cannot be read: an edit of the plan" in caplog.text


def test_a_change_is_recorded_once(sources: Path, run: Path) -> None:
    flags = (f"--data=a={sources}/a:1", f"--data=b={sources}/b:1")
    other = (f"--data=a={sources}/a:3", f"--data=b={sources}/b:1")
    assert train_here("--run", run, *flags, *SHAPE) == 0
    for steps in (8, 10):
        assert train_here("--run", run, *other, *SHAPE, f"--max_steps={steps}") == 0
    assert [start for start, _ in weights(plans(run)[-1])] == [0, 6]
    assert len(plans(run)) == 2


def test_a_source_may_come_and_go(sources: Path, run: Path) -> None:
    a, b = f"--data=a={sources}/a", f"--data=b={sources}/b"
    assert train_here("--run", run, a, *SHAPE, "--max_steps=2") == 0
    assert train_here("--run", run, a, b, *SHAPE, "--max_steps=4") == 0
    assert train_here("--run", run, b, *SHAPE, "--max_steps=6") == 0
    named = [(start, sorted(found)) for start, found in weights(plans(run)[-1])]
    assert named == [(0, ["a"]), (2, ["a", "b"]), (4, ["b"])]


def test_other_data_under_the_same_name_is_refused(
    sources: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = f"--data=a={sources}/a", f"--data=b={sources}/b"
    assert train_here("--run", run, a, b, *SHAPE, "--max_steps=2") == 0
    shutil.rmtree(sources / "a")
    write_source(sources / "a", train=(3000, 2000), validation=(400,), start=1)
    capsys.readouterr()
    assert train_here("--run", run, a, b, *SHAPE, "--max_steps=4") == 78
    assert "source 'a' stands for other data (" in capsys.readouterr().err
    assert train_here("--run", run, b, *SHAPE, "--max_steps=4") == 78, "it was trained on"
    message = capsys.readouterr().err
    assert "source 'a' at" in message and "is not the data that the run began with" in message
    assert "Put the old data back, or add the new one under another name" in message


def test_without_flags_the_run_has_its_own_copy_of_the_embedded_corpus(run: Path) -> None:
    for name in ("python", "reference"):  # as if prepared: what is finished is left as it is
        write_source(run / "corpus" / name, train=(3000,), validation=(400,))
    batches = opened(run)
    ((_, shares),) = weights(batches.plan)
    assert shares["python"] == shares["reference"]
    urls = [source.url for source in batches.plan.sources.values()]
    assert urls == ["run:corpus/python", "run:corpus/reference"], "the run may be moved"


def test_a_fenced_incarnation_records_no_plan(sources: Path, run: Path) -> None:
    stale = incarnation_of(run)
    incarnation_of(run)
    config = parse_config(["--run", str(run), *SHAPE, f"--data=a={sources}/a"])
    with pytest.raises(FencedError, match="generation 1 is fenced: generation 2 has claimed"):
        open_batches(config, ALONE, stale, Phase(), RemoteData(config))
    assert plans(run) == []


class Other(World):
    """Rank 1 of a world, told by rank 0."""

    def __init__(self, told: Iterator[Any]) -> None:
        super().__init__(1, 1, torch.device("cpu"), "none")
        self._told = told

    def broadcast(self, value: Any) -> Any:
        assert value == {}, "only rank 0 reads the log"
        return next(self._told)


def test_every_rank_has_the_plan_of_rank_0(sources: Path, run: Path) -> None:
    flags = [f"--data=a={sources}/a", f"--data=b={sources}/b"]
    config = parse_config(["--run", str(run), *SHAPE, *flags])
    decided = opened(run, f"a={sources}/a", f"b={sources}/b")
    told = iter([{"value": decided.plan.to_json()}])
    batches = open_batches(config, Other(told), None, Phase(), RemoteData(config))
    assert batches.cursor(5) == decided.cursor(5)


def test_an_error_of_rank_0_is_raised_on_every_rank(sources: Path, run: Path) -> None:
    config = parse_config(["--run", str(run), *SHAPE, f"--data=a={sources}/nowhere"])
    with pytest.raises(DataError, match="there is no data here"):
        open_batches(config, ALONE, incarnation_of(run), Phase(), RemoteData(config))
    told = {"error": "DataError", "message": "source 'a' at nowhere: there is no data here"}
    with pytest.raises(DataError, match=r"^source 'a' at nowhere: there is no data here$"):
        open_batches(config, Other(iter([told])), None, Phase(), RemoteData(config))


class Broken(World):
    """Rank 0, of which we read what it tells the others."""

    def __init__(self) -> None:
        super().__init__(0, 1, torch.device("cpu"), "none")
        self.told: Any = None

    def broadcast(self, value: Any) -> Any:
        self.told = value
        return value


@pytest.mark.parametrize("kind", [FencedError, StoreUnavailableError, DataError])
def test_an_error_of_rank_0_is_the_same_on_every_rank(
    kind: type[RangeFlowError], sources: Path, run: Path
) -> None:
    config = parse_config(["--run", str(run), *SHAPE, f"--data=a={sources}/a"])
    incarnation, first = incarnation_of(run), Broken()
    if kind is FencedError:
        incarnation_of(run)
    elif kind is StoreUnavailableError:
        (run / "log/0000000002.json").mkdir()  # reading it fails
    else:
        (sources / "a/index.json").unlink()
    with pytest.raises(kind) as here:
        open_batches(config, first, incarnation, Phase(), RemoteData(config))
    with pytest.raises(kind) as there:
        open_batches(config, Other(iter([first.told])), None, Phase(), RemoteData(config))
    assert type(there.value) is type(here.value) is kind
    assert str(there.value) == str(here.value) != ""


def test_a_refused_change_of_data_leaves_no_trace(
    sources: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A start that is refused must not change what the next right start trains on."""
    data = (f"--data=a={sources}/a:2", f"--data=b={sources}/b:1")
    other = write_source(tmp_path / "other", train=(3000,), validation=(400,), permille=50)
    assert train_here("--run", run, *data, *SHAPE, "--max_steps=4") == 0
    before = plans(run)
    assert train_here("--run", run, f"--data=s={other}", *SHAPE, "--max_steps=6") == 78
    assert plans(run) == before


def test_a_change_that_was_never_trained_on_is_dropped_when_it_is_taken_back(
    sources: Path, run: Path
) -> None:
    data = (f"--data=a={sources}/a:2", f"--data=b={sources}/b:1")
    assert train_here("--run", run, *data, *SHAPE, "--max_steps=4") == 0
    edited = opened(run, f"a={sources}/a:1", f"b={sources}/b:1")
    assert len(edited.plan.segments) == 2
    again = opened(run, f"a={sources}/a:2", f"b={sources}/b:1")
    assert len(again.plan.segments) == 1
    assert again.plan.hash == plans(run)[0].hash


def test_a_moved_run_finds_its_corpus_also_when_it_trains_on_other_data_now(
    run: Path, tmp_path: Path
) -> None:
    other = write_source(tmp_path / "other", train=(3000,), validation=(400,), permille=50)
    assert train_here("--run", run, *SHAPE, "--max_steps=2") == 0
    assert train_here("--run", run, *SHAPE, f"--data=s={other}", "--max_steps=4") == 0
    moved = run.rename(tmp_path / "moved")
    assert train_here("--run", moved, *SHAPE, f"--data=s={other}", "--max_steps=6") == 0
    assert set(plans(moved)[-1].sources) == {"python", "reference", "s"}
