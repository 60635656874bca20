"""The real program on remote data: the same bits as on local files, whatever the store does."""

import json
import logging
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_service.cache_folder import CacheFolder
from launch.caching import MOST_GIGABYTES, RemoteData, cache_folder
from launch.config import parse_config
from storage.errors import ConfigurationError
from storage.store import LocalStore, open_store
from tests import gcs_server
from tests.gcs_server import GcsServer
from tests.made_sources import write_source
from tests.places import reached
from tests.programs import curve, final_digest, rows, train, train_here
from tests.server_faults import Broken, First, Reset, Status

TRAIN = (700, 500, 900, 400, 800, 600)
SHAPE = (
    "--max_steps=40",
    "--eval_interval_steps=0",
    "--sample_interval_steps=0",
    "--save_interval_steps=40",
    "--n_embd=32",
    "--context=16",
    "--global_batch_size=8",
    "--warmup_steps=2",
)
MEGABYTE = "--cache_gigabytes=0.001"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_source(folder / "web", train=TRAIN, validation=(400,))
    return folder / "web"


@pytest.fixture(scope="module")
def local_run(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("local") / "run"
    assert train_here("--run", run, *SHAPE, f"--data=web={made}") == 0
    return run


@pytest.fixture(scope="module")
def bucket(made: Path) -> Iterator[GcsServer]:
    """A bucket that holds the source at `gs://data/web` and `gs://data/copy`."""
    server = GcsServer("data")
    for path in made.iterdir():
        if path.is_file():
            for place in ("web", "copy"):
                server.store("data", f"{place}/{path.name}", path.read_bytes(), None)
    with gcs_server.running(server), reached("gs", server.url), pytest.MonkeyPatch.context() as env:
        env.setenv("FSSPEC_GS_TOKEN", "anon")  # for programs of their own
        yield server


def shards_read(server: GcsServer) -> Counter[str]:
    names = [name.partition("/")[2] for name in server.read]
    return Counter(name for name in names if name.startswith("train-") and name.endswith(".npy"))


def test_data_in_memory_gives_the_same_bits_as_local_files(
    made: Path, local_run: Path, tmp_path: Path
) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    place = open_store(url)
    for key in LocalStore(made).list(""):
        place.put(key, (made / key).read_bytes())
    run, cache = tmp_path / "run", f"--cache_dir={tmp_path}/cache"
    assert train_here("--run", run, *SHAPE, f"--data=web={url}", cache, MEGABYTE) == 0
    assert final_digest(run) == final_digest(local_run)
    assert rows(run) == rows(local_run)


def test_how_data_comes_is_in_the_metrics_and_the_heartbeat(
    bucket: GcsServer, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    cache = f"--cache_dir={tmp_path}/cache"
    assert train_here("--run", run, *SHAPE, "--data=web=gs://data/web", cache, MEGABYTE) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(line["data_wait_seconds"] >= 0 for line in lines)
    assert 0 <= lines[-1]["data_cache_hit_rate"] <= 1
    fetched = sum(path.stat().st_size for path in (tmp_path / "cache" / "objects").iterdir())
    assert lines[-1]["data_downloaded_megabytes"] == pytest.approx(fetched / 1e6, abs=1e-3)
    assert len(curve(run, "data_cache_hit_rate")) == len(lines)
    beat = json.loads((run / "beats" / "g0001.json").read_text())
    assert "downloads" in beat["cache"]


def test_two_processes_share_the_cache_and_end_in_the_same_bits(
    bucket: GcsServer, local_run: Path, tmp_path: Path
) -> None:
    bucket.read.clear()
    arguments = (*SHAPE, f"--cache_dir={tmp_path}/cache", MEGABYTE)
    train("--run", tmp_path / "run", *arguments, "--data=web=gs://data/web", world=2)
    assert final_digest(tmp_path / "run") == final_digest(local_run)
    assert set(shards_read(bucket).values()) == {1}
    assert len(shards_read(bucket)) == len(TRAIN)
    bucket.read.clear()
    train("--run", tmp_path / "again", *arguments, "--data=web=gs://data/web")
    assert final_digest(tmp_path / "again") == final_digest(local_run)
    assert not shards_read(bucket), "what a cache holds is not fetched again"


def test_a_store_that_fails_now_and_then_changes_nothing(
    bucket: GcsServer, local_run: Path, tmp_path: Path
) -> None:
    index = [First(lambda: None)] * 9  # and its tables, each time that the source is opened
    shards = [Status(503), Broken(300), Reset(done=True), Status(429), Broken(10)]
    bucket.faults.add("read", *index, *shards)
    run, cache = tmp_path / "run", f"--cache_dir={tmp_path}/cache"
    assert train_here("--run", run, *SHAPE, "--data=web=gs://data/web", cache, MEGABYTE) == 0
    assert final_digest(run) == final_digest(local_run)
    assert bucket.faults.next("read") is None


def damage(server: GcsServer, name: str) -> bytes:
    """Another byte in the middle of an object; what it was."""
    before = server.buckets["data"][name].data
    data = bytearray(before)
    data[len(data) // 2] ^= 1
    server.store("data", name, bytes(data), None)
    return before


def test_a_damaged_shard_stops_the_run_and_another_place_saves_it(
    bucket: GcsServer, local_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "web/train-00003.npy"
    whole = damage(bucket, name)
    run, cache = tmp_path / "run", f"--cache_dir={tmp_path}/cache"
    arguments = ("--run", run, *SHAPE, "--data=web=gs://data/web", cache, MEGABYTE, "--take_over")
    try:
        assert train_here(*arguments) == 78
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("error: step ")
        assert "source 'web': shard train-00003.npy cannot be had: gs://data/web has it" in said
        assert train_here(*arguments, "--data_alternate=web=gs://data/copy") == 0
    finally:
        bucket.store("data", name, whole, None)
    assert final_digest(run) == final_digest(local_run)


def test_a_cache_that_is_too_small_is_refused_before_training(
    bucket: GcsServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, cache = tmp_path / "run", f"--cache_dir={tmp_path}/cache"
    arguments = ("--run", run, *SHAPE, "--data=web=gs://data/web", cache)
    assert train_here(*arguments, "--cache_gigabytes=0.000002") == 78
    least = sum(2 * tokens + 128 for tokens in TRAIN) + 2 * max(TRAIN) + 128
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"must be at least {least:,} bytes" in said
    assert not (run / "metrics.jsonl").exists()
    assert train_here(*arguments, f"--cache_gigabytes={least / 1e9:.9f}", "--take_over") == 0


def test_local_data_needs_no_cache(made: Path, tmp_path: Path) -> None:
    config = parse_config([f"--data=web={made}", f"--cache_dir={tmp_path}/cache"])
    assert config is not None
    with RemoteData(config) as remote:
        assert not remote.open("web", str(made)).is_cached
        assert remote.beat() == {"data_wait_seconds": 0.0}
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data_alternate=web"], "--data_alternate must be NAME=URL, got 'web'"),
        (["--data_alternate=../x=gs://a/b"], "a source's name must be 1 to 48 letters"),
        (["--cache_gigabytes=-1"], "cache_gigabytes must be a number from 0, got -1"),
        (["--cache_dir=gs://a/b"], "cache_dir must be a folder of this host"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags: list[str], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        RemoteData(parse_config(flags))  # type: ignore[arg-type]


def test_an_alternate_of_a_local_or_unknown_source_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--run", tmp_path / "run", *SHAPE, f"--data=web={made}")
    assert train_here(*arguments, "--data_alternate=web=gs://a/b") == 78
    assert "another place is asked for the shards of remote sources" in capsys.readouterr().err
    assert train_here(*arguments, "--data_alternate=books=gs://a/b", "--take_over") == 78
    assert "--data_alternate names books, which is no source of" in capsys.readouterr().err


def test_the_default_folder_is_at_home_or_with_temporary_files(tmp_path: Path) -> None:
    found = cache_folder("", 1.0, home=tmp_path)
    assert found.folder == tmp_path / ".cache" / "rangeflow"
    (tmp_path / "file").write_text("")
    elsewhere = cache_folder("", 1.0, home=tmp_path / "file")
    assert elsewhere.folder.name == "rangeflow" and elsewhere.folder != found.folder


def test_the_default_size_fits_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = CacheFolder(tmp_path, limit_bytes=10**9).reserve("0" * 64, 10**6)
    assert part is not None

    class Disk:
        free = 9 * 10**6

    monkeypatch.setattr("launch.caching.shutil.disk_usage", lambda folder: Disk)
    assert cache_folder(str(tmp_path), 0.0).limit_bytes == 8 * 10**6
    Disk.free = 10**13
    assert cache_folder(str(tmp_path), 0.0).limit_bytes == MOST_GIGABYTES * 1e9
    assert cache_folder(str(tmp_path), 2.5).limit_bytes == 2_500_000_000
    part.drop()


def test_the_log_says_now_and_then_how_data_comes(
    bucket: GcsServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    config = parse_config([f"--cache_dir={tmp_path}/cache", MEGABYTE])
    assert config is not None
    with RemoteData(config, clock=lambda: now) as remote, caplog.at_level(logging.INFO):
        remote.open("web", "gs://data/web")
        remote.waited_seconds = lambda: 3.0
        now = 30.0
        assert remote.measured()["data_wait_seconds"] == 3.0
        assert "data: waited" not in caplog.text
        now = 61.0
        assert remote.measured()["data_wait_seconds"] == 0.0
        assert "data: waited 3.0 s of the last" in caplog.text
        assert "0 downloads" in caplog.text
