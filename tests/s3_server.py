"""moto's S3 on loopback, with the faults that a test asks for in front of it."""

import socket
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

from tests.server_faults import Broken, Faults, First, Reset, Silence, Status

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
"""What s3fs needs to know besides the address, which goes to AWS_ENDPOINT_URL."""


class _Quiet(MotoRequestHandler):
    disable_nagle_algorithm = True  # or each answer's body waits 40 ms for the ACK of its head

    def log(self, type: str, message: str, *args: Any) -> None:
        """Requests are in `faults.seen`."""


class S3Server:
    """moto, faults, and one writer at a time: moto's check of `If-None-Match` is not atomic."""

    def __init__(self) -> None:
        self.faults = Faults()
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._writing = threading.Lock()
        self._server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=_Quiet)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def make_bucket(self, name: str) -> None:
        urllib.request.urlopen(
            urllib.request.Request(f"{self.url}/{name}", method="PUT"), timeout=300
        ).close()

    def __call__(self, environ: dict[str, Any], respond: Callable[..., Any]) -> Iterable[bytes]:
        fault = self.faults.next(_operation(environ))
        if isinstance(fault, Status):
            body = f"<Error><Code>{fault.code}</Code><Message>a fault</Message></Error>".encode()
            headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            respond(f"{fault.status} Fault", headers)
            return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]
        if isinstance(fault, Silence):
            fault.until.wait()
            raise _reset(environ)
        if isinstance(fault, Reset):
            if fault.done:
                list(self._done(environ, lambda *answer: None))
            raise _reset(environ)
        if isinstance(fault, First):
            fault.act()
        answer = self._done(environ, respond)
        if isinstance(fault, Broken):
            return _broken(environ, answer, fault.after_bytes)
        return answer

    def _done(self, environ: dict[str, Any], respond: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] != "PUT":
            return self._moto(environ, respond)
        with self._writing:
            return list(self._moto(environ, respond))


@contextmanager
def running(server: S3Server) -> Iterator[S3Server]:
    """The server, answering in threads of its own until the end."""
    inner = server._server
    thread = threading.Thread(target=inner.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        inner.shutdown()
        inner.server_close()
        thread.join()


def _operation(environ: dict[str, Any]) -> str:
    """As the store names it."""
    if environ["PATH_INFO"].strip("/").count("/") == 0:
        return "list" if environ["REQUEST_METHOD"] == "GET" else "bucket"
    if environ["REQUEST_METHOD"] == "PUT":
        return "create" if environ.get("HTTP_IF_NONE_MATCH") == "*" else "write"
    return {"GET": "read", "HEAD": "look up", "DELETE": "delete"}[environ["REQUEST_METHOD"]]


def _reset(environ: dict[str, Any]) -> ConnectionResetError:
    """The connection ends here and now; werkzeug alone would keep it open for another request."""
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    return ConnectionResetError("a fault")


def _broken(environ: dict[str, Any], answer: Iterable[bytes], after_bytes: int) -> Iterator[bytes]:
    yield b"".join(answer)[:after_bytes]
    raise _reset(environ)
