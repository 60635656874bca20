"""The command that edits: what it shows, when it asks, and what it says of the answer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpointing.incarnation import Incarnation, claim_run
from data_service.edit import main
from data_service.edits import KIND, Edit
from data_service.plan import Plan, PlanSource, Segment
from data_service.recorded import RecordedPlan
from data_service.source import open_source
from storage.log import Log
from storage.requests import Inbox, put_request
from storage.store import LocalStore
from tests.made_sources import write_source

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sources")
    return {name: write_source(folder / name, train=(1601,)) for name in ("a", "b", "c")}


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


@pytest.fixture
def owner(store: LocalStore, data: dict[str, str]) -> Incarnation:
    """A run of 100 steps of 8 sequences of 16 tokens, with a checkpoint at step 10."""
    body = {"schedule": {"schedule.max_steps": 100}}
    owner = claim_run(store, Log(store), body=body, take_over=True)
    sources = [
        PlanSource(
            name=name,
            url=data[name],
            fingerprint=open_source(name, data[name]).fingerprint,
            weights=((0, weight),),
        )
        for name, weight in (("a", 3_000_000), ("b", 1_000_000))
    ]
    record(owner, Plan(segments=(Segment(from_step=0, sources=tuple(sources)),)))
    commit = {
        **{"step": 10, "digest": "d", "manifest_key": "k/m", "manifest_sha256": "s"},
        **{"parent": None, "healthy": True, "validation_loss": None},
    }
    owner.append("COMMIT", lambda _: commit)
    return owner


def record(owner: Incarnation, plan: Plan, edit: dict[str, Any] | None = None) -> None:
    body = RecordedPlan(
        plan=plan,
        from_step=plan.segments[-1].from_step,
        seed=1,
        context=16,
        global_batch_size=8,
        lanes=8,
        edit=edit,
    ).to_body()
    owner.append("PLAN", lambda _: body)


def pending(store: LocalStore) -> list[Edit]:
    return [Edit.from_body(request.body) for request in Inbox(store, [KIND]).pending()]


def edit(store: LocalStore, *arguments: str, **options: Any) -> int:
    return main([str(store.root), *arguments], **options)


def lines(capsys: Capture) -> list[list[str]]:
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_it_shows_the_mixture_before_in_between_and_after(
    store: LocalStore, owner: Incarnation, data: dict[str, str], capsys: Capture
) -> None:
    assert edit(store, "add", f"c={data['c']}:4", "--ramp", "20", "--at=40") == 0
    told = lines(capsys)
    assert " ".join(told[0]) == (
        f"add c={data['c']}:4 over 20 steps, from step 40 on (nobody trains the run now)"
    )
    assert told[1][:8] == ["source", "before", "step", "40", "step", "50", "step", "60"]
    rows = {row[0]: row[1:] for row in told[2:5]}
    assert rows["a"][:8] == ["75.0", "%", "75.0", "%", "56.2", "%", "37.5", "%"]
    assert rows["c"][:7] == ["-", "-", "25.0", "%", "50.0", "%", rows["c"][6]]
    tokens = sum(int(row[-2].replace(",", "")) for row in rows.values())
    assert tokens == 60 * 8 * 16, "all that is left of the run"
    assert float(rows["c"][-1]) == pytest.approx((4.75 + 40 * 0.5) * 8 / 100, abs=0.01)
    assert " ".join(told[-1]) == "nothing is changed; --yes applies it"
    assert store.list("requests/") == []


@pytest.mark.parametrize(("answer", "asks"), [(True, True), (False, False)])
def test_at_a_terminal_it_asks_before_it_applies(
    store: LocalStore, owner: Incarnation, answer: bool, asks: bool, capsys: Capture
) -> None:
    questions: list[str] = []

    def confirm(question: str) -> bool:
        questions.append(question)
        return answer

    assert edit(store, "reweight", "a=1", confirm=confirm) == 0
    assert questions == ["apply? [y/N] "]
    assert [one.what for one in pending(store)] == ["reweight"] * asks
    assert ("the next start answers" in capsys.readouterr().out) == asks


def test_yes_applies_without_a_question(
    store: LocalStore, owner: Incarnation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_source("elsewhere", train=(900,))
    for arguments in (("add", "c=elsewhere"), ("skip", "12", "14"), ("remove", "a", "--ramp=5")):
        assert edit(store, *arguments, "--yes") == 0
    found = {one.what: one for one in pending(store)}
    assert found["add"].sources[0].url == f"{tmp_path}/elsewhere", "it runs in another folder"
    assert (found["skip"].at_step, found["skip"].to_step) == (12, 14)
    assert found["remove"].ramp_steps == 5


def test_a_heartbeat_tells_where_a_live_run_is(
    store: LocalStore, owner: Incarnation, capsys: Capture
) -> None:
    store.put("beats/g0001.json", b'{"step": 31, "left": false}')
    assert edit(store, "reweight", "a=1", "--yes") == 0
    out = capsys.readouterr().out
    assert "from step 32 on (as of its last heartbeat)" in out
    assert "its owner answers at a step" in out
    assert edit(store, "reweight", "a=1", "--at=5") == 78
    assert "step 5 has begun; the next possible step is 32" in capsys.readouterr().err
    assert edit(store, "reweight", "a=1", "--at=20") == 0, "it may have died; its owner will tell"
    capsys.readouterr()
    for beat in (b'{"step": 31, "left": true}', b"\xff", b"[]", b'{"left": false}'):
        store.put("beats/g0001.json", beat)
        assert edit(store, "reweight", "a=1") == 0
        assert "from step 10 on (nobody trains the run now)" in capsys.readouterr().out


def test_what_is_skipped_is_counted(store: LocalStore, owner: Incarnation, capsys: Capture) -> None:
    assert edit(store, "skip", "20", "25") == 0
    assert "40 samples are skipped, and count as consumed" in capsys.readouterr().out


def test_a_source_that_cannot_be_opened_here_is_left_to_the_owner(
    store: LocalStore, owner: Incarnation, capsys: Capture
) -> None:
    assert edit(store, "add", "c=/other/host/c", "--yes") == 0
    out = capsys.readouterr().out
    assert "from here, source 'c' cannot be opened: source 'c' at /other/host/c" in out
    assert [one.sources[0].url for one in pending(store)] == ["/other/host/c"]
    assert " ? " in out or out.splitlines()[2].endswith("?")


def test_as_json(store: LocalStore, owner: Incarnation, capsys: Capture) -> None:
    assert edit(store, "remove", "a", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["from_step"] == 10 and shown["request"] is None
    assert shown["before"] == {"a": 0.75, "b": 0.25}
    assert shown["after"] == [{"step": 10, "shares": {"b": 1.0}}]
    assert shown["tokens"] == {"b": 90 * 8 * 16}
    assert shown["epochs"]["b"] == pytest.approx((10 * 0.25 + 90) * 8 / 100)
    assert edit(store, "remove", "a", "--json", "--yes") == 0
    assert json.loads(capsys.readouterr().out)["request"] in store.list("requests/")


MISTAKES = [
    (("remove", "x"), "error: there is no source 'x' in the mixture of step 10; there are a, b"),
    (("remove", "a", "--at=9"), "error: step 9 has begun; the next possible step is 10"),
    (("reweight", "a=-1"), "error: the weight of source 'a' at step 10 must be from 0"),
    (("add", "c"), "error: --data must be NAME=URL"),
    (("skip", "20"), "error: say `skip FROM TO`, two steps, without --at"),
    (("undo",), "error: cannot undo 1 edits: the plan was changed 0 times"),
    (("dance",), "error: Invalid choice invalid choice 'dance' for argument 'what'"),
]


def test_edits_that_wait_for_an_answer_are_taken_as_made(
    store: LocalStore, owner: Incarnation, data: dict[str, str], capsys: Capture
) -> None:
    """So an edit may build on one that was just asked for, as that of a blend does."""
    assert edit(store, "add", f"c={data['c']}", "--ramp", "20", "--at=40", "--yes") == 0
    assert edit(store, "skip", "3", "5", "--yes") == 78
    put_request(store, KIND, {"what": "nothing"})
    capsys.readouterr()
    assert edit(store, "remove", "a", "b", "--ramp", "20", "--at=40", "--json", "--yes") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["after"][-1] == {"step": 60, "shares": {"c": 1.0}}
    assert shown["notes"] == [f"asked before, and taken as made: add c={data['c']}:1 over 20 steps"]
    assert shown["epochs"].keys() == {"a", "b", "c"}
    assert len(store.list("requests/")) == 3, "looking changes nothing"
    assert edit(store, "add", f"c={data['c']}", "--at=30", "--json") == 0, "that may be refused"
    assert json.loads(capsys.readouterr().out)["notes"] == []


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_is_told_and_nothing_asked(
    arguments: tuple[str, ...],
    message: str,
    store: LocalStore,
    owner: Incarnation,
    capsys: Capture,
) -> None:
    assert edit(store, *arguments, "--yes") == 78
    assert capsys.readouterr().err.startswith(message)
    assert store.list("requests/") == []


def test_a_place_without_a_plan_is_refused(tmp_path: Path, capsys: Capture) -> None:
    assert main([str(tmp_path / "none"), "undo"]) == 78
    assert "holds no run: there is no log" in capsys.readouterr().err


class Clock:
    """A clock that goes on when somebody sleeps; then something happens."""

    def __init__(self, *events: Callable[[], None]) -> None:
        self.now = 0.0
        self._events = list(events)

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self._events:
            self._events.pop(0)()


def test_it_waits_for_the_answer(store: LocalStore, owner: Incarnation, capsys: Capture) -> None:
    def answer() -> None:
        (request,) = Inbox(store, [KIND]).pending()
        plan = Plan.from_json(owner.records[1].body["plan"])
        last = plan.segments[-1]
        plan = plan.appended(Segment(from_step=33, sources=last.sources[:1]))
        record(owner, plan, {"request": request.key, "edit": request.body})

    clock = Clock(lambda: None, answer)
    assert edit(store, "remove", "b", "--yes", "--wait=60", clock=clock, sleep=clock.sleep) == 0
    assert clock.now == 2.0
    assert capsys.readouterr().out.endswith("applied, from step 33 on\n")


@pytest.mark.parametrize("as_json", [False, True])
def test_a_refusal_is_the_commands_error(
    as_json: bool, store: LocalStore, owner: Incarnation, capsys: Capture
) -> None:
    def answer() -> None:
        inbox = Inbox(store, [KIND])
        inbox.refuse(inbox.pending()[0], "rank 1: there is no data here")

    clock = Clock(answer)
    arguments = ["remove", "b", "--yes", "--wait=60", *["--json"] * as_json]
    assert edit(store, *arguments, clock=clock, sleep=clock.sleep) == 78
    told = capsys.readouterr()
    if as_json:
        assert json.loads(told.out)["answer"] == {"refused": "rank 1: there is no data here"}
    else:
        assert told.err == "error: the edit is refused: rank 1: there is no data here\n"
    assert store.list("answers/") == store.list("requests/") == []


def test_the_wait_ends(store: LocalStore, owner: Incarnation, capsys: Capture) -> None:
    clock = Clock()
    assert edit(store, "remove", "b", "--yes", "--wait=3", clock=clock, sleep=clock.sleep) == 75
    assert clock.now == 3.0
    assert "error: no answer within 3 s; the request stays (requests/" in capsys.readouterr().err
    assert len(store.list("requests/")) == 1
