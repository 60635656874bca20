"""Edits of a run that trains, or is stopped: the same bits whoever dies when, and on any world."""

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from checkpointing.history import history
from data_service.batches import Batches
from data_service.edits import KIND, Edit, parse_edit
from data_service.recorded import RecordedPlan, recorded_plans
from data_service.run_data import batches_of, open_sources
from data_service.tokenizer import CharacterTokenizer
from storage.errors import StoreUnavailableError
from storage.log import Log
from storage.requests import put_request, refusal
from storage.store import LocalStore, open_store
from tests.conftest import Interrupted
from tests.controls import broken
from tests.made_sources import write_source
from tests.programs import Program, checkpoints, final_digest, rows, train_here

SHAPE = (
    "--max_steps=12",
    "--eval_interval_steps=2",
    "--eval_windows=10",
    "--sample_interval_steps=0",
    "--save_interval_steps=3",
    "--wait_for_saves",
    "--keep_last=9",
    "--n_embd=32",
    "--context=16",
    "--global_batch_size=8",
    "--warmup_steps=2",
    "--dropout=0.1",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Sources `a`, `b`, `c`, by name."""
    folder = tmp_path_factory.mktemp("sources")
    return {
        name: write_source(folder / name, train=(900, 700), validation=(400,), start=start)
        for name, start in (("a", 0), ("b", 60), ("c", 130))
    }


@pytest.fixture(scope="module")
def flags(data: dict[str, str]) -> tuple[str, ...]:
    return (*SHAPE, f"--data=a={data['a']}", f"--data=b={data['b']}")


def asked(run: Path, edit: str, at: int | None = None, ramp: int = 0) -> str:
    """Put a request, as the command does; its key."""
    what, *items = edit.split()
    body = parse_edit(what, items, ramp_steps=ramp, at_step=at).to_body()
    return put_request(open_store(str(run)), KIND, body)


class Asking:
    """A listener that asks for edits when a step begins."""

    def __init__(self, run: Path, at: dict[int, Sequence[tuple[Any, ...]]]) -> None:
        self._run = run
        self._at = dict(at)
        self.keys: list[str] = []

    def __call__(self, phase: str, step: int) -> None:
        if phase == "step":
            self.keys += [asked(self._run, *edit) for edit in self._at.pop(step, [])]


def train_edited(run: Path, flags: Sequence[str], *more: str, **edits: Any) -> list[str]:
    """Train to the end; `at_N` are the edits asked for when step N begins. Their keys."""
    asking = Asking(run, {int(name[3:]): found for name, found in edits.items()})
    with broken("prompt"):
        assert train_here("--run", run, *flags, *more, listener=asking) == 0
    return asking.keys


def plans(run: Path) -> list[RecordedPlan]:
    return recorded_plans(Log(open_store(str(run))).refresh())


def batches(run: Path) -> Batches:
    recorded = plans(run)[-1]
    return batches_of(recorded, open_sources(str(run), recorded, {}))


def mixtures(run: Path) -> list[tuple[int, list[str]]]:
    """The first step and the sources of each segment of the plan in force."""
    return [(s.from_step, [x.name for x in s.sources]) for s in plans(run)[-1].plan.segments]


def requests(run: Path) -> list[str]:
    return open_store(str(run)).list("requests/")


def sources_of(run: Path, step: int) -> set[str]:
    return {name for name, *_ in batches(run).sample_ids(step)}


@pytest.fixture(scope="module")
def unbroken(
    flags: tuple[str, ...], data: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that was never interrupted, with an edit from step 8 on."""
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    train_edited(run, flags, at_4=[(f"add c={data['c']}:2", 8, 3)])
    return run


def test_an_edit_of_a_live_run_changes_the_mixture_from_its_step_on(unbroken: Path) -> None:
    assert mixtures(unbroken) == [(0, ["a", "b"]), (8, ["a", "b", "c"])]
    assert requests(unbroken) == []
    recorded = plans(unbroken)[-1]
    assert recorded.from_step == 8 and recorded.edit is not None
    assert Edit.from_body(recorded.edit["edit"]).what == "add"
    assert [sources_of(unbroken, step) for step in (7, 11)] == [{"a", "b"}, {"a", "b", "c"}]
    validated = ["validation_loss/c" in row for row in rows(unbroken) if row["step"] % 2 == 0]  # type: ignore[operator]
    assert validated == [False, False, False, False, True, True]


@pytest.fixture(scope="module")
def abrupt(flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process, edited while step 4 went on."""
    run = tmp_path_factory.mktemp("runs") / "abrupt"
    train_edited(run, flags, at_4=[("remove a",)])
    return run


def test_without_a_step_an_edit_begins_at_the_next_one(abrupt: Path) -> None:
    assert mixtures(abrupt) == [(0, ["a", "b"]), (5, ["b"])]
    assert [sources_of(abrupt, step) for step in (4, 5)] == [{"a", "b"}, {"b"}]


KILLS: dict[str, list[tuple[str, int]]] = {
    "request written": [],
    "PLAN appended": [("edit:recorded", 1)],
    "before S": [("step", 3)],
    "at S, when no checkpoint has reached it": [("step", 4), ("update:before", 1)],
    "after S, with a checkpoint": [("step", 6)],
}


@pytest.mark.parametrize("place", KILLS)
def test_a_run_killed_around_an_edit_ends_with_the_bits_of_an_unbroken_one(
    place: str, unbroken: Path, flags: tuple[str, ...], data: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    stops = [("step", 5), *KILLS[place]]
    with Program("--run", run, *flags, stops=stops, control="prompt") as program:
        stopped = program.stopped()
        assert stopped.step == 4
        asked(run, f"add c={data['c']}:2", 8, 3)
        for _ in KILLS[place]:
            stopped.send(signal.SIGCONT)
            stopped = program.stopped()
        stopped.send(signal.SIGKILL)
        assert program.end() == -signal.SIGKILL
    assert len(plans(run)) == 1 + bool(KILLS[place])
    assert bool(requests(run)) == (place in ("request written", "PLAN appended"))
    assert (checkpoints(run)[-1].step < 8) == (place != "after S, with a checkpoint")
    assert train_here("--run", run, *flags) == 0
    assert requests(run) == []
    assert len(plans(run)) == 2, "the edit is made once"
    assert plans(run)[-1].plan == plans(unbroken)[-1].plan
    assert [batches(run).sample_ids(step) for step in range(12)] == [
        batches(unbroken).sample_ids(step) for step in range(12)
    ]
    assert final_digest(run) == final_digest(unbroken)
    assert rows(run) == rows(unbroken)


def edited_by_two(run: Path, flags: Sequence[str], control: str) -> None:
    with Program("--run", run, *flags, stops=[("step", 5)], world=2, control=control) as program:
        stopped = program.stopped()
        asked(run, "remove a")
        stopped.send(signal.SIGCONT)
        assert program.end() == 0, program.output()


def test_two_processes_change_at_the_same_step(
    abrupt: Path, flags: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    edited_by_two(run, flags, "prompt")
    assert plans(run)[-1].plan == plans(abrupt)[-1].plan
    assert final_digest(run) == final_digest(abrupt)
    assert rows(run) == rows(abrupt)


def test_processes_that_change_at_different_steps_are_caught(
    abrupt: Path, flags: tuple[str, ...], tmp_path: Path
) -> None:
    """Negative control: rank 1 goes on one step with what it had."""
    run = tmp_path / "run"
    edited_by_two(run, flags, "prompt+late_edit")
    assert plans(run)[-1].plan == plans(abrupt)[-1].plan
    assert final_digest(run) != final_digest(abrupt)


def test_an_edit_of_a_stopped_run_is_made_before_the_next_step(
    flags: tuple[str, ...], data: dict[str, str], tmp_path: Path, interrupt: Any
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        train_here("--run", run, *flags, listener=interrupt("update:before", 9))
    assert [c.step for c in checkpoints(run)] == [3, 6]
    first, late = asked(run, f"add c={data['c']}"), asked(run, "remove a", 5)
    assert train_here("--run", run, "--take_over", *flags) == 0
    assert mixtures(run) == [(0, ["a", "b"]), (6, ["a", "b", "c"])]
    assert requests(run) == [] and refusal(open_store(str(run)), first) is None
    why = refusal(open_store(str(run)), late)
    assert why == "step 5 has begun; the next possible step is 6"


def test_an_edit_of_a_stopped_run_waits_for_a_snapshot_of_this_host(
    flags: tuple[str, ...], data: dict[str, str], tmp_path: Path, interrupt: Any
) -> None:
    """A snapshot of step 7 or 8 becomes a checkpoint first: the edit must not begin before it."""
    run = tmp_path / "run"
    local = (f"--local_tier={tmp_path / 'tier'}", "--local_interval_steps=1")
    with pytest.raises(Interrupted):
        train_here("--run", run, *flags, *local, listener=interrupt("update:before", 9))
    saved = checkpoints(run)[-1].step
    asked(run, f"add c={data['c']}")
    assert train_here("--run", run, "--take_over", *flags, *local) == 0
    assert saved == 6 and mixtures(run)[-1][0] > saved


def test_the_same_command_does_not_undo_an_edit(
    unbroken: Path, flags: tuple[str, ...], data: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train_edited(run, flags, "--max_steps=6", at_1=[(f"add c={data['c']}:2", 8, 3)])
    assert checkpoints(run)[-1].step == 6, "older than the edit"
    for command in (flags, SHAPE, (*SHAPE, *reversed(flags[-2:]))):
        assert train_here("--run", run, *command, "--max_steps=6") == 0
    assert len(plans(run)) == 2
    assert train_here("--run", run, *flags) == 0
    assert len(plans(run)) == 2
    assert plans(run)[-1].plan == plans(unbroken)[-1].plan


def test_a_command_that_asks_for_other_data_is_an_edit_itself(
    flags: tuple[str, ...],
    data: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    train_edited(run, flags, "--max_steps=6", at_1=[(f"add c={data['c']}", 8)])
    other = (*SHAPE, f"--data=b={data['b']}")
    assert train_here("--run", run, *other, "--max_steps=9") == 0
    assert mixtures(run) == [(0, ["a", "b"]), (6, ["b"])]
    assert "the edit from step 8 on gives way to other --data" in capsys.readouterr().err
    assert train_here("--run", run, *other, "--max_steps=12") == 0
    assert len(plans(run)) == 3


REFUSED = [
    ({"what": "explode"}, "an edit has the fields"),
    (parse_edit("remove", ["zzz"]).to_body(), "there is no source 'zzz' in the mixture of step"),
    (parse_edit("add", ["c=/nowhere/at/all"]).to_body(), "there is no data here"),
    (parse_edit("remove", ["a"], at_step=2).to_body(), "step 2 has begun; the next possible step"),
    (parse_edit("reweight", ["a=-1"]).to_body(), "the weight of source 'a' at step 5 must be from"),
    (parse_edit("undo", []).to_body(), "cannot undo 1 edits"),
    (parse_edit("add", ["c=OTHER"]).to_body(), "have different tokenizers"),
    (parse_edit("add", ["c=SHORT"]).to_body(), "validation windows of 16 tokens, and needs at"),
    (parse_edit("add", ["c=memory://nobody/put/this"]).to_body(), "there is no data here"),
]


def test_an_edit_that_cannot_be_is_refused_and_training_goes_on(
    flags: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, plain = tmp_path / "run", tmp_path / "plain"
    tokenizer = CharacterTokenizer("".join(map(chr, range(48, 400))))
    places = {
        "OTHER": write_source(tmp_path / "o", train=(900,), validation=(400,), tokenizer=tokenizer),
        "SHORT": write_source(tmp_path / "s", train=(900,), validation=(30,)),
    }
    keys: list[str] = []

    def listener(phase: str, step: int) -> None:
        if (phase, step) == ("step", 4):
            for body, _ in REFUSED:
                moved = [[n, places.get(u[-5:], u), w] for n, u, w in body.get("sources", [])]
                keys.append(put_request(open_store(str(run)), KIND, {**body, "sources": moved}))

    with broken("prompt"):
        assert train_here("--run", run, *flags, listener=listener) == 0
    told = capsys.readouterr().err
    for key, (_, message) in zip(keys, REFUSED, strict=True):
        why = refusal(open_store(str(run)), key)
        assert why is not None and message in why
        assert f"an edit of the plan is refused: {why}" in told
    assert requests(run) == [] and len(plans(run)) == 1
    assert train_here("--run", plain, *flags) == 0
    assert final_digest(run) == final_digest(plain)
    assert rows(run) == rows(plain)


def test_what_is_no_request_harms_nothing(flags: tuple[str, ...], tmp_path: Path) -> None:
    run, plain = tmp_path / "run", tmp_path / "plain"

    def listener(phase: str, step: int) -> None:
        if (phase, step) == ("step", 4):
            store = open_store(str(run))
            store.put(f"requests/{'1' * 32}.json", b'{"format":1,"kind":"edit","body":[]}')
            store.put(f"requests/{'2' * 32}.json", b"\xff")
            put_request(store, KIND, {"what": ["add"], "sources": {"a": 1}})

    with broken("prompt"):
        assert train_here("--run", run, *flags, listener=listener) == 0
    assert requests(run) == [] and len(plans(run)) == 1
    assert train_here("--run", plain, *flags) == 0
    assert final_digest(run) == final_digest(plain)


def test_two_requests_at_once_are_both_answered_in_their_order(
    flags: tuple[str, ...], data: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train_edited(run, flags, at_4=[(f"add c={data['c']}",), ("remove a",), ("remove a",)])
    assert [one.from_step for one in plans(run)] == [0, 5, 5]
    assert mixtures(run) == [(0, ["a", "b"]), (5, ["b", "c"])]
    assert len(open_store(str(run)).list("answers/")) == 1, "the third had nothing to remove"


def test_an_edit_can_be_undone(
    flags: tuple[str, ...], data: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train_edited(run, flags, at_2=[(f"add c={data['c']}",)], at_7=[("undo",)])
    assert mixtures(run) == [(0, ["a", "b"]), (3, ["a", "b", "c"]), (8, ["a", "b"])]
    before, _, restored = plans(run)[-1].plan.segments
    assert restored.sources == before.sources


def test_a_source_added_again_goes_on_from_its_bookmark(
    flags: tuple[str, ...], data: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train_edited(run, flags, at_2=[("remove a",)], at_7=[(f"add a={data['a']}",)])
    assert mixtures(run) == [(0, ["a", "b"]), (3, ["b"]), (8, ["a", "b"])]
    found = batches(run)
    assert found.counts(3)["a"] == found.counts(8)["a"] > 0
    assert found.bookmarks(3)["a"] == found.bookmarks(8)["a"]
    own = [s for step in range(12) for s in found.sample_ids(step) if s[0] == "a"]
    assert len(set(own)) == len(own) == found.counts(12)["a"]


def test_skipped_data_counts_as_consumed(flags: tuple[str, ...], tmp_path: Path) -> None:
    run, plain = tmp_path / "run", tmp_path / "plain"
    train_edited(run, flags, at_4=[("skip 6 9",)])
    assert train_here("--run", plain, *flags) == 0
    skipped, whole = batches(run), batches(plain)
    assert [skipped.sample_ids(step) for step in range(6)] == [
        whole.sample_ids(step) for step in range(6)
    ]
    passed = {s for step in range(6, 9) for s in whole.sample_ids(step)}
    read = {s for step in range(12) for s in skipped.sample_ids(step)}
    assert not passed & read
    assert sum(skipped.counts(12).values()) == (12 + 3) * 8
    assert final_digest(run) != final_digest(plain)


def test_a_store_that_fails_when_an_edit_is_recorded_ends_the_start(
    flags: tuple[str, ...], data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The PLAN may be in the log or not; only the next start can tell."""
    run = tmp_path / "run"
    asking = Asking(run, {4: [(f"add c={data['c']}", 8)]})
    put = LocalStore.put_if_absent

    def failing(store: LocalStore, key: str, content: bytes) -> bool:
        if b'"kind":"PLAN"' in content and b'"edit"' in content:
            put(store, key, content)
            monkeypatch.setattr(LocalStore, "get", unreadable)
            raise StoreUnavailableError("no route to host")
        return put(store, key, content)

    def unreadable(store: LocalStore, key: str, start: int = 0, end: int | None = None) -> bytes:
        raise StoreUnavailableError("no route to host")

    monkeypatch.setattr(LocalStore, "put_if_absent", failing)
    with broken("prompt"):
        assert train_here("--run", run, *flags, listener=asking) == 75
    monkeypatch.undo()
    assert train_here("--run", run, *flags, "--take_over") == 0
    assert mixtures(run) == [(0, ["a", "b"]), (8, ["a", "b", "c"])]
    assert history(Log(open_store(str(run))).refresh()).end is not None
