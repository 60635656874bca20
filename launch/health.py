"""Answers /healthz, /readyz and /metrics over HTTP, from what the supervisor has seen.

/healthz is 200 as long as the supervisor itself looks at its ranks: it never judges how fast steps
are, or a kubelet would kill a run that only trains slowly. /readyz is 200 while a step has been
done in this start. /metrics is for Prometheus, and needs the extra `health`.
"""

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from launch.outcome import Outcome
from launch.reporting import Reports
from storage.errors import ConfigurationError

SILENT_SECONDS = 120.0
"""A supervisor that has not looked for so long is dead: clearing a start away takes up to 30 s."""


class Condition:
    """What the supervisor has seen: written by its main thread, read by any."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looked_at = clock()
        self._minding = False
        self.starts = 0
        self.ends: dict[int, int] = {}
        self.ranks = 0
        self.step = 0
        self.first_step: int | None = None
        self.generation = 0
        self.row: dict[str, float] = {}

    def started(self) -> None:
        """A start begins; it is minded from the first look on: before, hosts may be waited for."""
        self.starts += 1
        self._begin()

    def looked(self, reports: Reports) -> None:
        """The supervisor has looked at what its ranks said."""
        self._minding = True
        self._looked_at = self._clock()
        self.ranks = len(reports.places)
        self.generation = reports.generation or self.generation
        self.row = dict(reports.row)
        steps = [place.step for place in reports.places.values() if place.phase != "start"]
        training = any(place.phase == "step" for place in reports.places.values())
        if training and self.first_step is None:
            self.first_step = max(steps)
        self.step = max(steps, default=self.step)

    def ended(self, came: Outcome) -> None:
        """A start has ended; until the next there is nothing to look at."""
        self.ends[came.code] = self.ends.get(came.code, 0) + 1
        self._minding = False
        self._begin()

    def _begin(self) -> None:
        self._looked_at = self._clock()
        self.first_step = None
        self.ranks = 0

    @property
    def alive(self) -> bool:
        """Whether the supervisor does its work."""
        return not self._minding or self._clock() - self._looked_at < SILENT_SECONDS

    @property
    def ready(self) -> bool:
        """Whether this start has done a step."""
        return self.first_step is not None and self.step > self.first_step


class Health:
    """The server, on threads of its own, on all interfaces; use it with `with`."""

    def __init__(self, port: int, condition: Condition) -> None:
        try:
            self._server = _Server(("", port), _handler(condition))
        except OSError as error:
            raise ConfigurationError(
                f"--health_port {port} cannot be used: {error.strerror}. Name another"
            ) from error
        self.port = self._server.server_address[1]

    def __enter__(self) -> "Health":
        serve = self._server.serve_forever
        threading.Thread(target=serve, args=(0.05,), name="health", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    """By IPv6 and IPv4, where the host has both."""

    daemon_threads = True
    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is nothing to tell."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def _handler(condition: Condition) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10.0  # a client that sends nothing holds no thread for ever

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/healthz":
                self._judge(condition.alive, "the supervisor looks at nothing any more")
            elif path == "/readyz":
                self._judge(condition.ready, "this start has not done a step yet")
            elif path == "/metrics":
                self._metrics()
            else:
                self._answer(404, "there are /healthz, /readyz and /metrics\n")

        def _judge(self, good: bool, otherwise: str) -> None:
            self._answer(200 if good else 503, "ok\n" if good else f"{otherwise}\n")

        def _metrics(self) -> None:
            try:
                text, kind = metrics(condition)
            except ModuleNotFoundError:
                self._answer(
                    501, "metrics need prometheus-client: pip install 'rangeflow[health]'\n"
                )
            else:
                self._answer(200, text, kind)

        def _answer(self, status: int, text: str, kind: str = "text/plain; charset=utf-8") -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Probes come every few seconds: nobody wants a line of each."""

    return Handler


def metrics(condition: Condition) -> tuple[str, str]:
    """The text that Prometheus reads, and its content type."""
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector

    class Seen(Collector):
        def collect(self) -> Iterator[Metric]:
            c = condition
            starts = CounterMetricFamily("rangeflow_starts", "Starts of torchrun", c.starts)
            yield starts
            ends = CounterMetricFamily("rangeflow_ends", "Ends, by exit code", labels=["code"])
            for code, count in sorted(c.ends.items()):
                ends.add_metric([str(code)], count)
            yield ends
            gauges: dict[str, tuple[str, float]] = {
                "rangeflow_ranks": ("Ranks of this host that have said where they are", c.ranks),
                "rangeflow_ready": ("1 when this start has done a step", int(c.ready)),
                "rangeflow_generation": ("Of the newest claim seen", c.generation),
                "rangeflow_step": ("Finished steps", c.step),
            }
            for name, (meaning, number) in gauges.items():
                yield GaugeMetricFamily(name, meaning, number)
            row = GaugeMetricFamily(
                "rangeflow_row", "What metrics.jsonl says of the newest step", labels=["name"]
            )
            for name, value in sorted(c.row.items()):
                row.add_metric([name], value)
            yield row

    registry = CollectorRegistry()
    registry.register(Seen())
    return generate_latest(registry).decode(), CONTENT_TYPE_LATEST
