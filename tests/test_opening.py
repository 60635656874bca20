import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointing.incarnation import claim_run
from launch.config import FIXED, RunConfig, fields_of_kind, parse_config
from launch.opening import OpenRun, open_run
from launch.phase import Phase
from launch.world import World, fingerprint
from storage.errors import (
    ConfigurationError,
    FencedError,
    IntegrityError,
    RangeFlowError,
    RunBusyError,
    StoreUnavailableError,
)
from storage.log import Log, Record
from storage.store import LocalStore

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU, "job-1")


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


def settings(*flags: str) -> RunConfig:
    """These tests are one process, which never proves itself gone: each start takes over."""
    return parse_config(["--take_over", *flags])


def opened(store: LocalStore, *flags: str) -> OpenRun:
    return open_run(store, settings(*flags), ALONE, Phase())


def claims(store: LocalStore) -> list[Record]:
    return [r for r in Log(store, whole=True).refresh() if r.kind == "CLAIM"]


def completed(store: LocalStore, step: int) -> None:
    """Claim the run and end it, as a run of `step` steps does."""
    run = opened(store)
    assert run.incarnation is not None
    run.incarnation.append("END", lambda _: {"step": step, "digest": "d" * 64})


def test_a_run_is_created_once_and_claimed_at_every_start(store: LocalStore) -> None:
    first = opened(store)
    created = store.get("run.json")
    second = opened(store)
    assert store.get("run.json") == created
    assert (first.generation, second.generation) == (1, 2)
    assert not first.complete and not second.complete
    assert [claim.body["run"] for claim in claims(store)] == [json.loads(created)["run"]] * 2


def test_run_json_holds_the_format_and_the_identity(store: LocalStore) -> None:
    opened(store, "--dropout=0.1")
    run = json.loads(store.get("run.json"))
    assert run["format"] == 1
    assert run["identity"] == fields_of_kind(settings("--dropout=0.1"), "identity")


def test_two_runs_have_two_names(tmp_path: Path) -> None:
    names = set()
    for number in range(2):
        store = LocalStore(tmp_path / str(number))
        opened(store)
        names.add(json.loads(store.get("run.json"))["run"])
    assert len(names) == 2


def test_opening_leaves_nothing_but_the_run_and_its_log(store: LocalStore) -> None:
    opened(store)
    assert store.list("") == ["log/0000000001.json", "run.json"]


def test_a_claim_says_who_claims_and_what_for(store: LocalStore) -> None:
    opened(store, "--max_steps=9")
    body = claims(store)[0].body
    assert (body["job"], body["world_size"], body["rendezvous"]) == ("job-1", 1, 0)
    assert body["fingerprint"] == fingerprint(CPU)
    assert body["schedule"] == fields_of_kind(settings("--max_steps=9"), "schedule")
    assert body["accepted_changes"] == {}


def test_it_announces_before_it_reads_and_before_it_claims(store: LocalStore) -> None:
    heard: list[tuple[str, int]] = []
    phase = Phase(lambda name, step: heard.append((name, len(store.list("log/")))))
    open_run(store, settings(), ALONE, phase)
    assert heard == [("open", 0), ("claim", 0)]


def test_another_device_or_torch_is_a_warning_naming_both(
    store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    opened(store)
    body = {**claims(store)[0].body, "fingerprint": {"device": "Tesla T4", "torch": "2.8"}}
    claim_run(store, Log(store), body=body, take_over=True)
    caplog.clear()
    opened(store)
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    here = fingerprint(CPU)
    assert warned == [
        f"device was Tesla T4 and is {here['device']}: the bits may differ from here on",
        f"torch was 2.8 and is {here['torch']}: the bits may differ from here on",
    ]
    caplog.clear()
    opened(store)
    assert not [r for r in caplog.records if r.levelno == logging.WARNING], "said once"


def test_another_schedule_is_told_and_recorded(
    store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    opened(store, "--max_steps=9")
    with caplog.at_level(logging.INFO):
        opened(store, "--max_steps=12")
    assert "schedule.max_steps changes from 9 to 12" in caplog.text
    schedules = [claim.body["schedule"]["schedule.max_steps"] for claim in claims(store)]
    assert schedules == [9, 12]


def test_a_complete_run_is_not_claimed(store: LocalStore, caplog: pytest.LogCaptureFixture) -> None:
    completed(store, step=9)
    before = store.list("")
    with caplog.at_level(logging.INFO):
        run = opened(store, "--max_steps=9")
    assert run == OpenRun(complete=True, generation=0, incarnation=None)
    assert store.list("") == before
    assert "the run is complete: 9 steps, digest ddd" in caplog.text
    assert opened(store, "--max_steps=8").complete, "it has gone further than that"


def test_a_complete_run_is_claimed_for_more_steps(store: LocalStore) -> None:
    completed(store, step=9)
    run = opened(store, "--max_steps=10")
    assert not run.complete and run.generation == 2


class TwoHosts(World):
    """Rank 0 of two, whose other host told `theirs` where this one tells what it finds."""

    def __init__(self, theirs: object) -> None:
        super().__init__(0, 1, CPU, "job-1", host_ranks=range(1))
        self.size = 2
        self._theirs = theirs

    def gather(self, value: object) -> list[object]:
        return [value, self._theirs if isinstance(value, list) else value]


@pytest.mark.parametrize(
    ("theirs", "kind", "message"),
    [
        (["other", ""], ConfigurationError, r"rank 1 finds run other at its --run, and rank 0 "),
        (["", "no run.json"], StoreUnavailableError, r"rank 1 does not find the run, .*no run\.j"),
    ],
)
def test_hosts_that_do_not_share_a_store_are_refused(
    theirs: list[str], kind: type[RangeFlowError], message: str, store: LocalStore
) -> None:
    """Or their part of every checkpoint would be written where nobody finds it."""
    with pytest.raises(kind, match=message):
        open_run(store, settings(), TwoHosts(theirs), Phase())
    run = str(json.loads(store.get("run.json"))["run"])
    assert open_run(store, settings(), TwoHosts([run, ""]), Phase()).generation == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"format": 2}', r"run\.json has format 2, expected 1: it is no run, or one of another"),
        (b"{}", r"run\.json has format None, expected 1: it is no run"),
        (b"[]", r"run\.json has format None, expected 1: it is no run"),
        (b'{"format": 1}', r"run\.json is damaged \(`run` or `identity`"),
        (b'{"format": 1, "run": "x", "identity": 3}', r"run\.json is damaged \(`run` or `id"),
        (b'{"format": 1, "ru', r"run\.json is damaged \(.*\); put back a copy of it"),
        (b"\xff", r"run\.json is damaged \(.*\); put back a copy of it"),
        (b"", r"run\.json is damaged \(.*\); put back a copy of it"),
    ],
)
def test_a_run_that_this_version_cannot_read_is_refused(
    content: bytes, message: str, store: LocalStore
) -> None:
    store.put("run.json", content)
    with pytest.raises(ConfigurationError, match=message):
        opened(store)
    assert store.list("") == ["run.json"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["thesis.tex"], r"holds something that is not a run \(thesis\.tex\); give --run an empty"),
        (["a/b", "c"], r"not a run \(a/b and more\); give --run an empty or a new place"),
        (["log/0000000001.json"], r"not a run \(log/0000000001\.json\)"),
    ],
)
def test_a_place_that_holds_something_else_is_refused_and_left_alone(
    keys: list[str], message: str, store: LocalStore
) -> None:
    for key in keys:
        store.put(key, b"mine")
    with pytest.raises(ConfigurationError, match=message):
        opened(store)
    assert store.list("") == keys


@pytest.mark.parametrize("key", ["probe/0123", "rendezvous/0000000001.json"])
def test_what_comes_before_a_run_does_not_make_a_place_another_one(
    key: str, store: LocalStore
) -> None:
    """What a killed probe left, and where the hosts have agreed to meet."""
    store.put(key, b"first")
    assert opened(store).generation == 1


class Overwrites(LocalStore):
    """A place that ignores the condition of a creation."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self.put(key, data)
        return True


def test_only_a_place_that_fences_becomes_a_run(tmp_path: Path) -> None:
    store = Overwrites(tmp_path / "run")
    with pytest.raises(ConfigurationError, match=r"cannot fence: .* pass --allow_unfenced_store"):
        opened(store)
    assert store.list("") == []
    assert opened(store, "--allow_unfenced_store").generation == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--dropout=0.5",),
            "dropout decides bits: the run has 0.0, this start asks for 0.5. Start anew with "
            "--run runs/other, or pass --accept_change dropout, and exactness ends there",
        ),
        (("--seed=7",), "seed decides bits: the run has 0, this start asks for 7"),
        (("--optimizer=adamw8bit",), "the run has 'adamw', this start asks for 'adamw8bit'"),
        (("--eval_micro_batch_size=3",), "eval_micro_batch_size decides bits: the run has 16"),
        (("--dropout=0.5", "--bias", "--accept_change=bias"), "dropout decides bits"),
    ],
)
def test_an_identity_field_does_not_change(
    flags: tuple[str, ...], message: str, store: LocalStore
) -> None:
    opened(store)
    with pytest.raises(ConfigurationError) as refused:
        opened(store, *flags)
    assert message in str(refused.value)
    assert len(claims(store)) == 1


@pytest.mark.parametrize("name", ["weight_decay", "weight-decay", "optimizer.weight_decay"])
def test_an_accepted_change_is_recorded_and_not_asked_for_again(
    name: str, store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    opened(store)
    opened(store, "--weight_decay=0.2", f"--accept_change={name}")
    assert "optimizer.weight_decay changes from 0.1 to 0.2: exact up to here" in caplog.text
    opened(store, "--weight_decay=0.2")
    changes = [claim.body["accepted_changes"] for claim in claims(store)]
    assert changes == [{}, {"optimizer.weight_decay": 0.2}, {}]
    with pytest.raises(ConfigurationError, match=r"the run has 0\.2, this start asks for 0\.1"):
        opened(store)


@pytest.mark.parametrize("name", sorted(FIXED))
@pytest.mark.parametrize("accept", ["", "short", "dotted"])
def test_a_fixed_field_is_not_changed_by_accepting_it(
    accept: str, name: str, store: LocalStore
) -> None:
    opened(store)
    short = name.rpartition(".")[2]
    accepted = {
        "": [],
        "short": [f"--accept_change={short}"],
        "dotted": [f"--accept_change={name}"],
    }
    now = fields_of_kind(settings(), "identity")[name]
    with pytest.raises(ConfigurationError) as refused:
        opened(store, OTHERWISE[name], *accepted[accept])
    assert str(refused.value).startswith(f"{short} decides bits: the run has {now!r}, this start ")
    assert str(refused.value).endswith(". Start anew with --run runs/other")
    assert len(claims(store)) == 1


OTHERWISE = {
    "seed": "--seed=7",
    "batch.global_batch_size": "--global_batch_size=8",
    "model.n_layer": "--n_layer=3",
    "model.n_head": "--n_head=4",
    "model.n_embd": "--n_embd=64",
    "model.context": "--context=64",
    "model.bias": "--no_bias",
    "numerics.precision": "--precision=bf16",
    "optimizer.optimizer": "--optimizer=adamw8bit",
}
"""Of each fixed field, a flag for another value than the default."""


@pytest.mark.parametrize("name", ["dropuot", "model.seed", "max_steps", "n_layers", ""])
def test_accepting_a_change_of_what_decides_no_bits_is_refused(
    name: str, store: LocalStore
) -> None:
    message = rf"^--accept_change {name}: there is no such field that decides bits$"
    with pytest.raises(ConfigurationError, match=message):
        opened(store, f"--accept_change={name}")
    assert claims(store) == []
    opened(store)
    with pytest.raises(ConfigurationError, match=message):
        opened(store, f"--accept_change={name}")
    assert len(claims(store)) == 1


class Told(World):
    """Rank 0, of which we read what it tells the others."""

    def __init__(self) -> None:
        super().__init__(0, 1, CPU, "job-1")
        self.told: Any = None

    def broadcast(self, value: Any) -> Any:
        self.told = json.loads(json.dumps(value))
        return value


class Other(World):
    """Rank 1 of a world whose rank 0 has told it `outcome`."""

    def __init__(self, outcome: dict[str, Any]) -> None:
        super().__init__(1, 1, CPU, "job-1")
        self._outcome = outcome

    def broadcast(self, value: Any) -> Any:
        assert value == {}, "only rank 0 looks at the run"
        return self._outcome


@pytest.mark.parametrize(
    "kind",
    [FencedError, RunBusyError, StoreUnavailableError, ConfigurationError, IntegrityError],
)
def test_an_error_of_rank_0_is_raised_on_every_rank_with_its_own_class(
    kind: type[RangeFlowError], store: LocalStore
) -> None:
    outcome = {"error": kind.__name__, "message": "what rank 0 found"}
    with pytest.raises(RangeFlowError, match=r"^what rank 0 found$") as error:
        open_run(store, settings(), Other(outcome), Phase())
    assert type(error.value) is kind
    assert store.list("") == []


@pytest.mark.parametrize(
    ("kind", "content"),
    [(ConfigurationError, b"[]"), (StoreUnavailableError, None)],
)
def test_what_rank_0_raises_is_what_it_tells_the_others(
    kind: type[RangeFlowError], content: bytes | None, store: LocalStore
) -> None:
    if content is None:
        opened(store)
        (store.root / "log/0000000002.json").mkdir()  # reading it fails
    else:
        store.put("run.json", content)
    first = Told()
    with pytest.raises(kind) as here:
        open_run(store, settings(), first, Phase())
    with pytest.raises(kind) as there:
        open_run(store, settings(), Other(first.told), Phase())
    assert type(there.value) is type(here.value) is kind
    assert str(there.value) == str(here.value) != ""


def test_rank_0_tells_the_others_its_generation(store: LocalStore) -> None:
    first = Told()
    for generation in (1, 2):
        assert open_run(store, settings(), first, Phase()).generation == generation
        run = open_run(store, settings(), Other(first.told), Phase())
        assert run == OpenRun(complete=False, generation=generation, incarnation=None)


@pytest.mark.parametrize(("generation", "complete"), [(0, True), (4, False)])
def test_other_ranks_get_the_generation_and_no_incarnation(
    generation: int, complete: bool, store: LocalStore
) -> None:
    run = open_run(store, settings(), Other({"value": generation}), Phase())
    assert run == OpenRun(complete=complete, generation=generation, incarnation=None)
    assert store.list("") == []
