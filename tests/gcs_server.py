"""A server on loopback for the part of Google Cloud Storage's JSON API that gcsfs uses.

It keeps objects in memory, honours preconditions, gives generations and checksums, and does wrong
what `faults` says. Each behaviour names the page of Google's that describes it. Nothing in it knows
gcsfs or RangeFlow, so that it can be compared with a real bucket.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c

from tests.server_faults import Broken, Faults, First, Reset, Silence, Status

_QUANTUM = 256 * 1024


@dataclass
class Stored:
    """One generation of an object."""

    data: bytes
    generation: int
    metageneration: int = 1
    updated: str = field(default_factory=lambda: datetime.now(UTC).isoformat())


@dataclass
class Session:
    """A resumable upload that is not finished, or is."""

    bucket: str
    name: str
    condition: str | None
    received: bytearray = field(default_factory=bytearray)


class GcsServer(ThreadingHTTPServer):
    """Buckets by name, each a mapping of names to objects. `url` goes to STORAGE_EMULATOR_HOST.

    `read` are the names of the objects that were asked for, in order.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, *buckets: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock = threading.Lock()
        self.buckets: dict[str, dict[str, Stored]] = {name: {} for name in buckets}
        self.sessions: dict[str, Session] = {}
        self.faults = Faults()
        self.page = 1000
        self.read: list[str] = []
        self.generations = 1_700_000_000_000_000
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def store(self, bucket: str, name: str, data: bytes, condition: str | None) -> Stored | None:
        """A new generation, or None when the condition does not hold.

        `ifGenerationMatch=0` holds only if there is no live version; the check and the write are
        one: https://cloud.google.com/storage/docs/request-preconditions#special-case
        """
        with self.lock:
            present = self.buckets[bucket].get(name)
            live = present.generation if present else 0
            if condition is not None and int(condition) != live:
                return None
            self.generations += 1
            stored = Stored(data, self.generations)
            self.buckets[bucket][name] = stored
            return stored

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is none."""


@contextmanager
def running(server: GcsServer) -> Iterator[GcsServer]:
    """The server, answering in threads of its own until the end."""
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: GcsServer
    fault: Any = None

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.fault = None
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        route = [unquote(part) for part in parts.path.strip("/").split("/")]
        operation, act = self._routed(route)
        fault = self.server.faults.next(operation)
        if isinstance(fault, Status):
            self._error(fault.status, "a fault of the test's")
        elif isinstance(fault, Silence):
            fault.until.wait()
            self._reset()
        elif isinstance(fault, Reset):
            self.fault = fault
            if fault.done:
                act()
            self._reset()
        else:
            if isinstance(fault, First):
                fault.act()
            self.fault = fault
            act()

    def _routed(self, route: list[str]) -> tuple[str, Any]:
        """The name of the operation, and what does it."""
        match [self.command, *route]:
            case ["POST", "upload", "storage", "v1", "b", bucket, "o"]:
                condition = self.query.get("ifGenerationMatch")
                if self.query.get("uploadType") == "resumable":
                    return "begin", lambda: self._begin(bucket, condition)
                if self.query.get("uploadType") != "media":
                    return "unknown", lambda: self._error(400, "no such type of upload")
                name = "write" if condition is None else "create"
                return name, lambda: self._media(bucket, condition)
            case ["POST" | "PUT", "session", identity]:
                return "part", lambda: self._part(identity)
            case ["DELETE", "session", identity]:
                return "take back", lambda: self._take_back(identity)
            case ["GET", "download", "storage", "v1", "b", bucket, "o", name]:
                return "read", lambda: self._read(bucket, name)
            case ["GET", "storage", "v1", "b", bucket, "o", name]:
                return "look up", lambda: self._look_up(bucket, name)
            case ["GET", "storage", "v1", "b", bucket, "o"]:
                return "list", lambda: self._list(bucket)
            case ["GET", "storage", "v1", "b", bucket]:
                return "bucket", lambda: self._bucket(bucket)
            case ["DELETE", "storage", "v1", "b", bucket, "o", name]:
                return "delete", lambda: self._delete(bucket, name)
        return "unknown", lambda: self._error(404, "no such method")

    def _media(self, bucket: str, condition: str | None) -> None:
        """The data are the body, the name is in the query.

        https://cloud.google.com/storage/docs/uploading-objects#uploading-an-object (media)
        """
        self._finish(bucket, self.query["name"], self.body, condition)

    def _begin(self, bucket: str, condition: str | None) -> None:
        """The address of a session, in `Location`.

        https://cloud.google.com/storage/docs/performing-resumable-uploads#initiate-session
        """
        if bucket not in self.server.buckets:
            return self._error(404, "The specified bucket does not exist.")
        name = self.query.get("name") or json.loads(self.body)["name"]
        identity = uuid.uuid4().hex
        self.server.sessions[identity] = Session(bucket, name, condition)
        return self._send(200, b"", {"Location": f"{self.server.url}/session/{identity}"})

    def _part(self, identity: str) -> None:
        """308 with what has been received, until the last part makes the object.

        Every part but the last is a multiple of 256 KiB, and begins where the last one ended.
        https://cloud.google.com/storage/docs/performing-resumable-uploads#chunked-upload
        """
        session = self.server.sessions.get(identity)
        if session is None:
            return self._error(404, "no such session")
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", self.headers["Content-Range"])
        assert found is not None
        start, end = int(found[1]), int(found[2])
        last = found[3] != "*" and end + 1 == int(found[3])
        size = end + 1 - start
        if (
            start != len(session.received)
            or size != len(self.body)
            or (size % _QUANTUM and not last)
        ):
            return self._error(400, "a part of the wrong size or place")
        session.received += self.body
        if last:
            del self.server.sessions[identity]
            data = bytes(session.received)
            return self._finish(session.bucket, session.name, data, session.condition)
        return self._send(308, b"", {"Range": f"bytes=0-{len(session.received) - 1}"})

    def _take_back(self, identity: str) -> None:
        """499: https://cloud.google.com/storage/docs/performing-resumable-uploads#cancel-upload"""
        if self.server.sessions.pop(identity, None) is None:
            return self._error(404, "no such session")
        return self._send(499, b"")

    def _finish(self, bucket: str, name: str, data: bytes, condition: str | None) -> None:
        """The object resource, or 412.

        https://cloud.google.com/storage/docs/json_api/v1/status-codes#412-precondition-failed
        """
        if bucket not in self.server.buckets:
            return self._error(404, "The specified bucket does not exist.")
        stored = self.server.store(bucket, name, data, condition)
        if stored is None:
            return self._error(
                412, "At least one of the pre-conditions you specified did not hold."
            )
        return self._json(_resource(bucket, name, stored))

    def _read(self, bucket: str, name: str) -> None:
        """The bytes, or a range of them with 206; 416 beyond the end.

        https://cloud.google.com/storage/docs/json_api/v1/parameters#range
        """
        self.server.read.append(name)
        stored = self.server.buckets.get(bucket, {}).get(name)
        if stored is None:
            return self._error(404, f"No such object: {bucket}/{name}")
        data, headers = stored.data, {"X-Goog-Hash": f"crc32c={_crc32c(stored.data)}"}
        if "Range" not in self.headers:
            return self._send(200, data, headers)
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"])
        assert found is not None
        start, end = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
        if start >= len(data):
            return self._error(416, "The requested range cannot be satisfied.")
        headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
        return self._send(206, data[start : end + 1], headers)

    def _look_up(self, bucket: str, name: str) -> None:
        """https://cloud.google.com/storage/docs/json_api/v1/objects/get"""
        stored = self.server.buckets.get(bucket, {}).get(name)
        if stored is None:
            return self._error(404, f"No such object: {bucket}/{name}")
        return self._json(_resource(bucket, name, stored))

    def _list(self, bucket: str) -> None:
        """Names in order of their UTF-8, strongly consistent, in pages.

        https://cloud.google.com/storage/docs/json_api/v1/objects/list
        """
        if bucket not in self.server.buckets:
            return self._error(404, "The specified bucket does not exist.")
        prefix, token = self.query.get("prefix", ""), self.query.get("pageToken", "")
        begin = self.query.get("startOffset", "")
        with self.server.lock:
            objects = sorted(self.server.buckets[bucket].items())
        wanted = [
            (name, stored)
            for name, stored in objects
            if name.startswith(prefix) and name >= begin and name > token
        ]
        size = min(self.server.page, int(self.query.get("maxResults") or self.server.page))
        answer: dict[str, Any] = {"kind": "storage#objects"}
        answer["items"] = [_resource(bucket, name, stored) for name, stored in wanted[:size]]
        if len(wanted) > size:
            answer["nextPageToken"] = wanted[size - 1][0]
        return self._json(answer)

    def _bucket(self, bucket: str) -> None:
        """https://cloud.google.com/storage/docs/json_api/v1/buckets/get"""
        if bucket not in self.server.buckets:
            return self._error(404, "The specified bucket does not exist.")
        return self._json({"kind": "storage#bucket", "id": bucket, "name": bucket})

    def _delete(self, bucket: str, name: str) -> None:
        """204: https://cloud.google.com/storage/docs/json_api/v1/objects/delete"""
        with self.server.lock:
            stored = self.server.buckets.get(bucket, {}).pop(name, None)
        if stored is None:
            return self._error(404, f"No such object: {bucket}/{name}")
        return self._send(204, b"")

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, message: str) -> None:
        """https://cloud.google.com/storage/docs/json_api/v1/status-codes"""
        body = {"error": {"code": status, "message": message, "errors": [{"reason": "test"}]}}
        self._send(status, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        if isinstance(self.fault, Reset):
            return  # done, and nobody hears of it
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if isinstance(self.fault, Broken):
            body = body[: self.fault.after_bytes]
            self.close_connection = True
        self.wfile.write(body)
        self.wfile.flush()
        if isinstance(self.fault, Broken):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _reset(self) -> None:
        """RST instead of FIN: closing with a linger time of zero (socket(7))."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.wfile.close()
        self.connection.close()

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are in `faults.seen`."""


def _resource(bucket: str, name: str, stored: Stored) -> dict[str, Any]:
    """https://cloud.google.com/storage/docs/json_api/v1/objects#resource"""
    return {
        "kind": "storage#object",
        "bucket": bucket,
        "name": name,
        "size": str(len(stored.data)),
        "generation": str(stored.generation),
        "metageneration": str(stored.metageneration),
        "crc32c": _crc32c(stored.data),
        "md5Hash": base64.b64encode(hashlib.md5(stored.data).digest()).decode(),
        "updated": stored.updated,
        "timeCreated": stored.updated,
    }


def _crc32c(data: bytes) -> str:
    """Base64 of the big-endian bytes: https://cloud.google.com/storage/docs/hashes-etags"""
    return base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()
