"""Fake metadata services of three clouds over HTTP: scripted, as unreliable as a test wants them.

Usage as a program: metadata_server.py ADDRESS PORT CLOUD ANSWER,ANSWER... ; it prints `ready`.
"""

import json
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

ANSWERS = ("no", "notice", "404", "401", "500", "nonsense", "hang", "reset")
TOKEN = "a-session-token"
NAME = "this-machine"


class MetadataServer:
    """Answers each look by the next of `script`, the last one for ever. Use it with `with`."""

    def __init__(
        self, cloud: str, script: Sequence[str], address: str = "127.0.0.1", port: int = 0
    ) -> None:
        assert set(script) <= set(ANSWERS)
        self.cloud = cloud
        self.script = list(script)
        self.looks = 0
        self.tokens = 0
        self.long_polls = 0
        self.at = "2026-11-21T12:02:00Z"
        self.resources = [NAME]
        self.released = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def do_PUT(self) -> None:
                server.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer((address, port), Handler)
        self._http.daemon_threads = True
        self.url = f"http://{address}:{self._http.server_address[1]}"

    def __enter__(self) -> "MetadataServer":
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.released.set()
        self._http.shutdown()
        self._http.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        if self.cloud == "aws" and request.command == "PUT" and path == "/latest/api/token":
            assert request.headers["X-aws-ec2-metadata-token-ttl-seconds"]
            self.tokens += 1
            say(request, 200, TOKEN)
        elif self.cloud == "azure" and path == "/metadata/instance/compute/name":
            say(request, 200, NAME)
        elif request.command == "GET" and path == PATHS[self.cloud]:
            self._look(request)
        else:
            say(request, 404, "not here")

    def _look(self, request: BaseHTTPRequestHandler) -> None:
        self.long_polls += "wait_for_change=true" in request.path
        answer = self.script[min(self.looks, len(self.script) - 1)]
        self.looks += 1
        name, value = HEADER[self.cloud]
        if request.headers.get(name) != value:
            say(request, 401 if self.cloud == "aws" else 403, "the header is missing")
        elif answer == "hang":
            self.released.wait()
        elif answer == "reset":
            request.close_connection = True
        elif answer in ("404", "401", "500"):
            say(request, int(answer), "no")
        elif answer == "nonsense":
            say(request, 200, "<html>captive portal</html>")
        elif answer == "no" and self.cloud == "aws":
            say(request, 404, "nothing is planned")
        else:
            say(request, 200, self._body(notice=answer == "notice"), ETag=f"etag{self.looks}")

    def _body(self, *, notice: bool) -> str:
        if self.cloud == "gce":
            return "TRUE" if notice else "FALSE"
        if self.cloud == "aws":
            return json.dumps({"action": "terminate", "time": self.at})
        event = {
            "EventType": "Preempt",
            "Resources": self.resources,
            "NotBefore": "Sat, 21 Nov 2026 12:00:30 GMT",
        }
        return json.dumps({"DocumentIncarnation": 1, "Events": [event] if notice else []})


PATHS = {
    "gce": "/computeMetadata/v1/instance/preempted",
    "aws": "/latest/meta-data/spot/instance-action",
    "azure": "/metadata/scheduledevents",
}
HEADER = {
    "gce": ("Metadata-Flavor", "Google"),
    "aws": ("X-aws-ec2-metadata-token", TOKEN),
    "azure": ("Metadata", "true"),
}


def say(request: BaseHTTPRequestHandler, status: int, text: str, **headers: str) -> None:
    body = text.encode()
    request.send_response(status)
    for name, value in {"Metadata-Flavor": "Google", **headers}.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


if __name__ == "__main__":
    _, address, port, cloud, script = sys.argv
    with MetadataServer(cloud, script.split(","), address, int(port)) as server:
        print("ready", server.url, flush=True)
        threading.Event().wait()
