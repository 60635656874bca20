"""What a cache has measured."""

from data_service.cache_report import CacheReport, Mean, Pace


def test_a_mean_follows_the_newest() -> None:
    mean = Mean()
    assert mean.value == 0
    mean.add(10.0)
    assert mean.value == 10.0
    for _ in range(50):
        mean.add(2.0)
    assert abs(mean.value - 2.0) < 1e-3


def test_the_pace_is_by_step_also_when_steps_are_left_out() -> None:
    pace = Pace()
    for step, now in ((3, 0.0), (4, 2.0), (4, 9.0), (8, 17.0)):
        pace.at(step, now)
    assert pace.seconds.value == 2.0


def test_a_report_is_a_line_for_people() -> None:
    report = CacheReport(
        openings=8,
        hit_rate=0.875,
        downloads=3,
        downloaded_bytes=61_000_000,
        next_shard="web/train-00007.npy",
        seconds_until_needed=41.2,
        seconds_until_there=3.9,
    )
    assert str(report) == (
        "cache: 87.5% of 8 openings without waiting, 3 downloads, 61 MB; next "
        "web/train-00007.npy, needed in 41 s, here in 4 s"
    )
