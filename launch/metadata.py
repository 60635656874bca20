"""Asks the cloud's metadata service whether this machine will be taken, on one thread.

Google Compute Engine answers a long poll when `instance/preempted` changes, AWS has
`spot/instance-action` behind a session token, Azure lists scheduled events. A file is watched as
well, for what tells of preemptions in another way.

Covers: a service that is not there, refuses, hangs, answers nonsense, or comes and goes. Does not
cover: a service that never tells; the periodic save is what counts then.
"""

import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from email.message import Message
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Protocol

from launch.grace import LONGEST_SECONDS

SHORT_SECONDS = 2.0
"""How long a service may take that answers at once: it lies on the same host."""
LONG_POLL_SECONDS = 60.0
FIRST_RETRY_SECONDS = 1.0
LONGEST_RETRY_SECONDS = 60.0
MARGIN_SECONDS = 5.0
"""Between the end of the grace and the time at which a cloud says it takes the machine."""
FILE_SECONDS = 1.0
_MOST_BYTES = 1 << 20
_NONSENSE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError),
)
_GONE = ("Preempt", "Terminate", "Redeploy", "Reboot")

Tell = Callable[[str, float | None], None]


class Cloud(Protocol):
    """One metadata service."""

    name: str
    pause_seconds: float

    def look(self) -> tuple[str, float | None] | None:
        """A notice and the seconds that are left, or None. Raises OSError or ValueError."""


class Gce:
    """https://cloud.google.com/compute/docs/instances/create-use-preemptible#detecting"""

    name = "gce"
    pause_seconds = 0.2

    def __init__(self, url: str, long_poll_seconds: float = LONG_POLL_SECONDS) -> None:
        self._url = f"{url}/computeMetadata/v1/instance/preempted"
        self._long_poll_seconds = long_poll_seconds
        self._etag = ""

    def look(self) -> tuple[str, float | None] | None:
        """The first look is answered at once, the next ones when something changes."""
        query, patience = "", SHORT_SECONDS
        if self._etag:
            seconds = max(1, int(self._long_poll_seconds))
            query = f"?wait_for_change=true&timeout_sec={seconds}&last_etag={self._etag}"
            patience = self._long_poll_seconds + 2 * SHORT_SECONDS
        headers = {"Metadata-Flavor": "Google"}
        body, answered = _ask("GET", self._url + query, headers, patience)
        if answered.get("Metadata-Flavor") != "Google" or body.strip() not in ("TRUE", "FALSE"):
            raise ValueError(f"no answer of a metadata server: {body[:80]!r}")
        self._etag = answered.get("ETag", "")
        return ("the metadata service of GCE: preempted", None) if body.strip() == "TRUE" else None


class Aws:
    """https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html"""

    name = "aws"
    pause_seconds = 5.0

    def __init__(self, url: str, wall_clock: Callable[[], float] = time.time) -> None:
        self._url = url
        self._wall_clock = wall_clock
        self._token = ""

    def look(self) -> tuple[str, float | None] | None:
        """404 says that nothing is planned; 401 that the session's token is over."""
        if not self._token:
            headers = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}
            self._token, _ = _ask("PUT", f"{self._url}/latest/api/token", headers)
        try:
            headers = {"X-aws-ec2-metadata-token": self._token}
            place = f"{self._url}/latest/meta-data/spot/instance-action"
            body, _ = _ask("GET", place, headers)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            self._token = ""
            raise
        planned = json.loads(body)
        at = datetime.fromisoformat(planned["time"]).timestamp()
        return f"the metadata service of AWS: {planned['action']}", at - self._wall_clock()


class Azure:
    """https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events"""

    name = "azure"
    pause_seconds = 1.0

    def __init__(self, url: str, wall_clock: Callable[[], float] = time.time) -> None:
        self._url = f"{url}/metadata"
        self._wall_clock = wall_clock
        self._me: str | None = None

    def look(self) -> tuple[str, float | None] | None:
        """Events of the whole scale set are listed: only those that name this machine count."""
        headers = {"Metadata": "true"}
        body, _ = _ask("GET", f"{self._url}/scheduledevents?api-version=2020-07-01", headers)
        events = json.loads(body)["Events"]
        if self._me is None:
            place = f"{self._url}/instance/compute/name?api-version=2021-02-01&format=text"
            self._me, _ = _ask("GET", place, headers)
        for event in events:
            if event["EventType"] in _GONE and self._me in event["Resources"]:
                source = f"the metadata service of Azure: {event['EventType']}"
                if not event.get("NotBefore"):  # it has begun
                    return source, None
                at = parsedate_to_datetime(event["NotBefore"]).timestamp()
                return source, at - self._wall_clock()
        return None


def clouds(name: str, url: str) -> list[Cloud]:
    """Those to ask: the one named, or all, until one answers."""
    known: list[Cloud] = [Gce(url), Aws(url), Azure(url)]
    return [cloud for cloud in known if name in ("auto", cloud.name)]


def watch(
    asked: Iterable[Cloud], tell: Tell, wait: Callable[[float], bool], *, say: Callable[[str], None]
) -> None:
    """Ask until there is a notice, or `wait` returns True. The first cloud that answers is ours."""
    candidates = list(asked)
    retry = FIRST_RETRY_SECONDS
    while True:
        answered = None
        for cloud in candidates:
            try:
                notice = cloud.look()
            except _NONSENSE:
                continue
            answered = cloud
            if notice is not None:
                source, seconds = notice
                if seconds is not None and seconds > LONGEST_SECONDS:
                    seconds = None  # a clock is wrong
                tell(source, None if seconds is None else max(0.0, seconds - MARGIN_SECONDS))
                return
            break
        if answered is not None:
            if len(candidates) > 1:
                say(f"the metadata service of {answered.name} answers; its notices are heeded")
            candidates, retry = [answered], FIRST_RETRY_SECONDS
        if wait(answered.pause_seconds if answered else retry):
            return
        if answered is None:
            retry = min(2 * retry, LONGEST_RETRY_SECONDS)


def watch_file(path: str, tell: Tell, wait: Callable[[float], bool]) -> None:
    """Look for a file once a second, until it is there or `wait` returns True."""
    while not os.path.exists(path):  # noqa: PTH110 - that raises where it must not look
        if wait(FILE_SECONDS):
            return
    tell(f"the notice file {path} is there (remove it before the next start)", None)


class NoticeWatch:
    """The thread that asks clouds, and one for a file; use it with `with`.

    They end with the process at the latest, whatever hangs.
    """

    def __init__(
        self, asked: Sequence[Cloud], notice_file: str, tell: Tell, say: Callable[[str], None]
    ) -> None:
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        if asked:
            self._add("metadata", lambda: watch(asked, tell, self._stop.wait, say=say))
        if notice_file:
            self._add("notice-file", lambda: watch_file(notice_file, tell, self._stop.wait))

    def _add(self, name: str, work: Callable[[], None]) -> None:
        self._threads.append(threading.Thread(target=work, name=name, daemon=True))

    def __enter__(self) -> "NoticeWatch":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()


def _ask(
    method: str, url: str, headers: dict[str, str], patience_seconds: float | None = None
) -> tuple[str, Message]:
    """The body and headers of an answer with status 200, past any proxy."""
    request = urllib.request.Request(url, headers=headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=patience_seconds or SHORT_SECONDS) as answer:
            return answer.read(_MOST_BYTES).decode(), answer.headers
    except urllib.error.HTTPError as error:
        error.close()
        raise
    except http.client.HTTPException as error:
        raise ValueError(f"{url}: {error!r}") from error
