from launch.phase import Phase


def test_the_listener_hears_every_phase_with_the_finished_steps() -> None:
    heard: list[tuple[str, int]] = []
    phase = Phase(lambda name, step: heard.append((name, step)))
    phase("open")
    phase.step = 3
    phase("step")
    phase("step")
    assert heard == [("open", 0), ("step", 3), ("step", 3)]


def test_the_place_is_already_the_new_one_when_the_listener_is_called() -> None:
    """A heartbeat written by a program that was stopped there must not name the phase before."""
    places: list[tuple[str, int]] = []
    phase = Phase(lambda name, step: places.append(phase.place()))
    phase.step = 7
    phase("save:begin")
    assert places == [("save:begin", 7)]


def test_without_a_listener_it_only_remembers() -> None:
    phase = Phase()
    assert phase.place() == ("start", 0)
    phase("restore")
    assert phase.place() == ("restore", 0)


def test_what_another_thread_enters_is_heard_and_leaves_the_place() -> None:
    heard: list[tuple[str, int]] = []
    phase = Phase(lambda name, step: heard.append((name, step)))
    phase.step = 4
    phase("micro_batch")
    phase.aside("save:object")
    assert heard == [("micro_batch", 4), ("save:object", 4)]
    assert phase.place() == ("micro_batch", 4)
    Phase().aside("save:object")


def test_a_report_hears_what_is_entered_and_nothing_of_other_threads() -> None:
    heard: list[tuple[str, int]] = []
    phase = Phase(report=lambda name, step: heard.append((name, step)))
    phase.step = 2
    phase("step")
    phase.aside("save:object")
    assert heard == [("step", 2)]
