"""Remote shards on this machine, before they are read: fetched by deadline, evicted by next use.

What comes is known: a few threads fetch what is read next, soonest first, as far as there is room,
and make room by evicting what is read last, never what is read sooner than what comes. Objects that
are under way or come soon are held, that is mapped and verified, so that no process of the host
evicts them.

Covers: every byte is verified on arrival, and again at the first use in a process of what was there
before; processes of a host that share the folder; every wait ends, with an error that names source,
shard, step and cause.
Does not cover: what decides bits; nothing of what is measured here enters the order of samples.
"""

import logging
import random
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy.typing as npt

from data_service.cache_folder import CacheFolder, Mapped, NoRoomError, Part
from data_service.cache_needs import AHEAD, ALL
from data_service.cache_report import CacheReport, Mean, Pace
from data_service.download import PIECE_BYTES, PIECE_SECONDS, Remote, download
from data_service.shard_format import npy_array
from data_service.upcoming import Upcoming, look_ahead
from storage.canonical import sha256_hex
from storage.errors import (
    ConfigurationError,
    DataError,
    IntegrityError,
    RangeFlowError,
    StoreUnavailableError,
)

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]

TIMEOUT_SECONDS = 540.0
"""Less than the loader's, whose error knows no cause."""
THREADS = 3
_LOOK_SECONDS = 0.1  # how often a wait looks at what other processes do
_LONGEST_RETRY_SECONDS = 20.0
_PATIENT_SECONDS = 1.0


@dataclass(slots=True)
class _Held:
    array: Array
    downloaded: bool
    opened: bool = False


class Cache:
    """The objects of remote sources. Any thread may call it; close it, or use it with `with`."""

    def __init__(
        self,
        folder: CacheFolder,
        *,
        group: str = "",
        threads: int = THREADS,
        timeout_seconds: float = TIMEOUT_SECONDS,
        patient_seconds: float = 120.0,
        retry_seconds: float = 0.5,
        piece_bytes: int = PIECE_BYTES,
        piece_seconds: float = PIECE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`group` is the same for processes that read the same at about the same time: a run's.

        Without room for a second other processes are asked to give up what they hold ahead, and
        after `patient_seconds` what they are reading, to fetch it again.
        """
        self._folder = folder
        self._group = group
        self._timeout_seconds = timeout_seconds
        self._patient_seconds = patient_seconds
        self._retry_seconds = retry_seconds
        self._piece_bytes = piece_bytes
        self._piece_seconds = piece_seconds
        self._clock = clock
        self._closed = threading.Event()
        self._planning = threading.Lock()
        self._changed = threading.Condition()  # guards what follows
        self._held: dict[str, _Held] = {}
        self._verified: dict[str, tuple[int, int]] = {}
        self._busy: dict[str, float] = {}  # being obtained here, since when
        self._later: dict[str, tuple[float, int]] = {}  # not before then, after so many failures
        self._upcoming: Upcoming | None = None
        self._step = 0
        self._replan_at = 0
        self._wanted: list[tuple[int, Remote]] = []
        self._idle_until = 0.0
        self._asked = ""
        self._pace = Pace()
        self._openings = self._misses = self._downloads = self._downloaded_bytes = 0
        self._speed = Mean()
        self._threads = [
            threading.Thread(target=self._work, name=f"shard fetcher {number}", daemon=True)
            for number in range(threads)
        ]

    def __enter__(self) -> "Cache":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self, seconds: float = 1.0) -> None:
        """End the threads, waiting for downloads at most so long, and give up what is held."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()
        deadline = self._clock() + seconds
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - self._clock()))
        with self._changed:
            self._held, self._wanted = {}, []
        self._folder.needs.unregister()

    def follow(self, upcoming: Upcoming, step: int) -> None:
        """From now on fetch what `upcoming` says, from `step` on; also for a plan that changes.

        Raises ConfigurationError when the folder is too small for it, as `check` does.
        """
        self.check(upcoming)
        self._folder.needs.register(self._group, upcoming.minimum_bytes)
        with self._changed:
            self._upcoming, self._step, self._replan_at = upcoming, step, step
            self._changed.notify_all()
        for thread in self._threads:
            if thread.ident is None:
                thread.start()

    def check(self, upcoming: Upcoming) -> None:
        """Raise ConfigurationError when the folder is too small for what `upcoming` needs."""
        minimum, limit = upcoming.minimum_bytes, self._folder.limit_bytes
        others = self._folder.needs.of_others(self._group)
        if minimum + others > limit:
            beside = f", beside {others:,} bytes for other runs on this host" if others else ""
            raise ConfigurationError(
                f"the cache {self._folder.folder} must be at least {minimum:,} bytes{beside}: what "
                f"the lanes of the remote sources read at a time, and the largest shard; got "
                f"{limit:,}. Give it more, or another folder on a larger disk"
            )

    def at(self, step: int) -> None:
        """The step that is read now. Cheap: to be called at every one."""
        with self._changed:
            self._pace.at(step, self._clock())
            self._step = step
            if step >= self._replan_at:
                self._changed.notify_all()

    def array(self, remote: Remote) -> Array:
        """The array in an object, mapped; waits for it if it is not here.

        Do not keep it: it holds room in the folder. Raises StoreUnavailableError when it did not
        come in time, DataError or IntegrityError when no place has it as it should be.
        """
        with self._changed:
            held = self._held.get(remote.sha256)
        return self._wait_for(remote) if held is None else self._given(held, waited=False)

    def report(self) -> CacheReport:
        with self._changed:
            missing = next((u for u in self._wanted if u[1].sha256 not in self._held), None)
            needed = there = 0.0
            if missing is not None:
                step, remote = missing
                needed = max(0, step - self._step) * self._pace.seconds.value
                if self._speed.value:
                    there = remote.size_bytes / self._speed.value
                    begun = self._busy.get(remote.sha256)
                    there = max(0.0, there - (self._clock() - begun)) if begun else there
            return CacheReport(
                openings=self._openings,
                hit_rate=1 - self._misses / max(1, self._openings),
                downloads=self._downloads,
                downloaded_bytes=self._downloaded_bytes,
                next_shard=f"{missing[1].source}/{missing[1].key}" if missing else "",
                seconds_until_needed=needed,
                seconds_until_there=there,
            )

    def _given(self, held: _Held, *, waited: bool) -> Array:
        """Counts each time that an object is held and then asked for: an opening."""
        if not held.opened:
            with self._changed:
                held.opened = True
                self._openings += 1
                self._misses += waited
        return held.array

    def _wait_for(self, remote: Remote) -> Array:
        """Obtain it in this thread, or wait for the one that does."""
        begun = self._clock()
        deadline = begun + self._timeout_seconds
        questions = [(_PATIENT_SECONDS, AHEAD), (self._patient_seconds, ALL)]
        cause = "another process is fetching it"
        failures, waited = 0, False
        with ExitStack() as stack:
            while True:
                pause = _LOOK_SECONDS
                try:
                    held = self._obtained(remote, deadline)
                    if held is not None:
                        return self._given(held, waited=waited or held.downloaded)
                except NoRoomError as error:
                    if not error.others:
                        raise StoreUnavailableError(self._located(error)) from error
                    cause = str(error)
                    if questions and self._clock() - begun >= questions[0][0]:
                        logger.info("other processes are asked for room: %s", error)
                        stack.enter_context(self._folder.needs.asking(questions.pop(0)[1]))
                except StoreUnavailableError as error:
                    cause, failures = str(error), failures + 1
                    pause = self._pause(failures)
                    logger.warning("%s; it is tried again", self._located(error))
                except (DataError, IntegrityError) as error:
                    raise type(error)(self._located(error)) from error
                waited = True
                left = deadline - self._clock()
                if left <= 0:
                    raise StoreUnavailableError(
                        f"step {self._step}: {remote} did not come within "
                        f"{self._timeout_seconds:g} s: {cause}"
                    )
                if self._closed.wait(min(pause, left)):
                    raise StoreUnavailableError("the cache is closed")

    def _obtained(self, remote: Remote, deadline: float) -> _Held | None:
        """What another thread has obtained, or else this one; None while another process does."""
        with self._changed:
            self._changed.wait_for(
                lambda: remote.sha256 not in self._busy, max(0.0, deadline - self._clock())
            )
            held = self._held.get(remote.sha256)
        if held is not None or not self._claim(remote):
            return held
        try:
            found = self._here_or_reserved(remote, None)
            held = self._downloaded(remote, found, deadline) if isinstance(found, Part) else found
        finally:
            self._unclaim(remote, held)
        return held

    def _located(self, error: Exception) -> str:
        return f"step {self._step}: {error}"

    def _pause(self, failures: int) -> float:
        """Doubles with every failure, with jitter, so that many hosts do not ask all at once."""
        seconds: float = min(_LONGEST_RETRY_SECONDS, self._retry_seconds * 2 ** (failures - 1))
        return seconds * random.uniform(0.5, 1.0)

    def _claim(self, remote: Remote) -> bool:
        """Whether no other thread of this process is obtaining it, nor has; then this one may."""
        with self._changed:
            if remote.sha256 in self._busy or remote.sha256 in self._held:
                return False
            self._busy[remote.sha256] = self._clock()
            return True

    def _unclaim(self, remote: Remote, held: _Held | None) -> None:
        with self._changed:
            del self._busy[remote.sha256]
            if held is not None and not self._closed.is_set():
                self._held[remote.sha256] = held
                self._later.pop(remote.sha256, None)
            self._changed.notify_all()

    def _here_or_reserved(self, remote: Remote, before: int | None) -> "_Held | Part | None":
        """The object from the folder, or room for it; None while another process fetches it.

        What is read at step `before` or sooner is not evicted for it; None when it is needed now.
        """
        mapped = self._folder.open(remote.sha256)
        if mapped is not None and self._verify(remote, mapped):
            return _Held(_checked(remote, mapped), downloaded=False)
        return self._reserve(remote, before)

    def _downloaded(self, remote: Remote, part: Part, deadline: float) -> "_Held":
        begun = self._clock()
        try:
            download(
                remote,
                part.write,
                piece_bytes=self._piece_bytes,
                piece_seconds=self._piece_seconds,
                seconds=deadline - begun,
                stopped=self._closed.is_set,
            )
            mapped = part.finish()
        except BaseException:
            part.drop()
            raise
        seconds = max(1e-9, self._clock() - begun)
        with self._changed:
            self._verified[remote.sha256] = mapped.identity
            self._downloads += 1
            self._downloaded_bytes += remote.size_bytes
            self._speed.add(remote.size_bytes / seconds)
        return _Held(_checked(remote, mapped), downloaded=True)

    def _verify(self, remote: Remote, mapped: Mapped) -> bool:
        """Whether what was in the folder is the object; what is not is removed."""
        if self._verified.get(remote.sha256) == mapped.identity:
            return True
        if sha256_hex(memoryview(mapped.data)) == remote.sha256:
            with self._changed:
                self._verified[remote.sha256] = mapped.identity
            return True
        logger.warning("%s was damaged in the cache, and is fetched again", remote)
        self._folder.discard(remote.sha256, mapped)
        return False

    def _reserve(self, remote: Remote, before: int | None) -> Part | None:
        try:
            return self._folder.reserve(remote.sha256, remote.size_bytes)
        except NoRoomError:
            victims = self._victims(remote, before)
            return self._folder.reserve(remote.sha256, remote.size_bytes, victims, self._let_go)

    def _victims(self, remote: Remote, before: int | None) -> list[str]:
        """What may be evicted: first what is not ours, longest unused; then ours, farthest use."""
        objects = self._folder.objects()
        objects.pop(remote.sha256, None)
        upcoming, now = self._upcoming, self._step
        if upcoming is not None:
            upcoming.recognise(objects)
        unknown: list[tuple[int, str]] = []
        ours: list[tuple[int, str]] = []
        for sha256, last_used in objects.items():
            use = None if upcoming is None else upcoming.next_use(sha256, now)
            if use is None:
                unknown.append((last_used, sha256))
            elif before is None or use > before:
                ours.append((-use, sha256))
        return [sha256 for _, sha256 in (*sorted(unknown), *sorted(ours))]

    def _let_go(self, sha256: str) -> None:
        with self._changed:
            self._held.pop(sha256, None)

    def _work(self) -> None:
        """One fetching thread."""
        while not self._closed.is_set():
            try:
                job = self._next_job()
            except StoreUnavailableError as error:
                logger.debug("nothing is fetched ahead: %s", error)
                job = None
            if job is None:
                with self._changed:
                    self._changed.wait(_LOOK_SECONDS)
                continue
            self._fetch_ahead(*job)
            del job  # it may hold what was in the folder

    def _fetch_ahead(self, remote: Remote, found: "_Held | Part | None") -> None:
        """Download what was claimed. Errors are told when it is needed, if it still fails then."""
        held = None if isinstance(found, Part) else found
        error = None
        try:
            if isinstance(found, Part):
                held = self._downloaded(remote, found, self._clock() + self._timeout_seconds)
        except RangeFlowError as caught:
            error = caught
        finally:
            self._put_off(remote, error)
            self._unclaim(remote, held)

    def _put_off(self, remote: Remote, error: RangeFlowError | None) -> None:
        """Not to be looked at again for a moment, or longer after an error."""
        failures, seconds = 0, _LOOK_SECONDS
        if error is not None:
            failures = self._later.get(remote.sha256, (0.0, 0))[1] + 1
            seconds = self._pause(failures)
            logger.debug("%s is fetched ahead, and failed: %s", remote, error)
        with self._changed:
            self._later[remote.sha256] = (self._clock() + seconds, failures)

    def _next_job(self) -> "tuple[Remote, _Held | Part | None] | None":
        """The soonest object that comes and is not held, with room for it; None if there is none.

        Room is given in the order of need: an object that found none is not passed over, or what
        is needed later would take the room, and be evicted and fetched again.
        """
        with self._planning:
            while True:
                asked = self._folder.needs.asked()
                if asked or asked != self._asked or self._step >= self._replan_at:
                    self._asked = asked
                    self._replan(asked)
                now = self._clock()
                if now < self._idle_until:
                    return None
                claimed = next(
                    (
                        (step, remote)
                        for step, remote in self._wanted
                        if self._later.get(remote.sha256, (0.0, 0))[0] <= now
                        and self._claim(remote)
                    ),
                    None,
                )
                if claimed is None:
                    return None
                if self._step < self._replan_at:  # from now on who needs it waits for it
                    return self._prepared(*claimed)
                self._unclaim(claimed[1], None)  # it may have been read, and left behind

    def _prepared(self, step: int, remote: Remote) -> "tuple[Remote, _Held | Part | None] | None":
        """What was claimed, with room for it."""
        try:
            return remote, self._here_or_reserved(remote, step)
        except NoRoomError:
            self._idle_until = self._clock() + _LOOK_SECONDS
        except RangeFlowError as error:
            self._put_off(remote, error)
        except BaseException:
            self._unclaim(remote, None)
            raise
        self._unclaim(remote, None)
        return None

    def _replan(self, asked: str) -> None:
        """Look ahead again, because a lane has come to its next shard; give up what is over.

        When another process has `asked` for room, give up more: nothing is then fetched ahead.
        """
        upcoming, step = self._upcoming, self._step
        assert upcoming is not None, "threads start with it"
        room = self._folder.limit_bytes - self._folder.needs.of_others(self._group)
        wanted, opens_at = look_ahead(upcoming, step, 0 if asked else room)
        if asked == ALL:
            wanted = []
        keep = {remote.sha256 for _, remote in wanted}
        with self._changed:
            self._wanted = wanted
            self._held = {sha256: h for sha256, h in self._held.items() if sha256 in keep}
            self._later = {sha256: x for sha256, x in self._later.items() if sha256 in keep}
            if upcoming is self._upcoming:
                self._replan_at = opens_at
        self._idle_until = 0.0


def _checked(remote: Remote, mapped: Mapped) -> Array:
    try:
        array = npy_array(memoryview(mapped.data))
    except ValueError as error:
        raise DataError(f"{remote} is no .npy file ({error}); prepare the source again") from None
    remote.check(array)
    return array
