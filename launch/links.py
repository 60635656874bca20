"""Ends this process when another host of its world has vanished without a word.

A host without power or network answers nothing. What was sent to it is sent again for a quarter of
an hour (tcp(7), tcp_retries2), and so long a collective hangs. So each host holds one connection to
rank 0's: there the kernels ask each other for a sign of life, of which the processes know nothing,
however busy or stopped they are. All that is ever sent there is rank 0's word to the other hosts
that one has vanished.

Covers: hosts that lose power or network, rank 0's among them; the others end with it.
Does not cover: processes that hang while their host lives; two hosts that reach rank 0's and not
each other. The supervisor's limits end those.
"""

import hmac
import logging
import os
import selectors
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Protocol

from launch.exit_codes import START_AGAIN

logger = logging.getLogger(__name__)

IDLE_SECONDS = 5
ASK_SECONDS = 5
QUESTIONS = 3
VANISHED_SECONDS = IDLE_SECONDS + ASK_SECONDS * QUESTIONS
"""Without an answer for so long, a host counts as lost."""
_JOIN_SECONDS = 20.0


class Ranks(Protocol):
    """The processes of a world."""

    rank: int
    size: int
    host_ranks: range

    def gather(self, value: Any) -> list[Any]: ...


class HostLostError(Exception):
    """Another host of the world has vanished."""


def leave(host: str, last_word: Callable[[int, Exception], object]) -> None:
    """End this process: no thread of it can be trusted to return from a collective."""
    said = f"{host} has not answered for {VANISHED_SECONDS} s"
    sys.stderr.write(f"error: {said}; leaving, to start again without it\n")
    sys.stderr.flush()
    last_word(START_AGAIN, HostLostError(said))
    os._exit(START_AGAIN)


@contextmanager
def watched_hosts(world: Ranks, address: str, lost: Callable[[str], None]) -> Iterator[None]:
    """Call `lost`, on a thread of its own, with the address of a host that has vanished.

    `address` is that of rank 0's host. Every process of the world enters; only the first of each
    host has anything to watch, and on one host nobody has.
    """
    with ExitStack() as stack:
        try:
            links = _linked(world, address, stack)
        except OSError as error:
            links = {}
            logger.warning("the loss of a host will be noticed late, if ever: %s", error)
        if links:
            stack.enter_context(_watching(links, lost))
        yield


def _linked(world: Ranks, address: str, stack: ExitStack) -> dict[socket.socket, str]:
    """The connections of this process, each with the address at its other end."""
    if len(world.host_ranks) == world.size:
        return {}
    offer = None
    if world.rank == 0:
        listener = stack.enter_context(_listener())
        offer = [listener.getsockname()[1], uuid.uuid4().hex]
    told = world.gather({"first": world.host_ranks.start, "offer": offer})
    port, token = told[0]["offer"]
    others = {one["first"] for one in told} - {world.host_ranks.start}
    if world.rank == 0:
        return _accepted(listener, token.encode(), len(others), stack)
    if world.rank != world.host_ranks.start:
        return {}
    link = stack.enter_context(socket.create_connection((address, port), timeout=_JOIN_SECONDS))
    link.sendall(token.encode())
    return {_kept_alive(link): address}


def _listener() -> socket.socket:
    if socket.has_dualstack_ipv6():
        with suppress(OSError):  # it may be switched off
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _accepted(
    listener: socket.socket, token: bytes, count: int, stack: ExitStack
) -> dict[socket.socket, str]:
    """Connections of so many hosts; whoever else calls, a port scanner, is hung up on."""
    links: dict[socket.socket, str] = {}
    listener.settimeout(_JOIN_SECONDS)
    while len(links) < count:
        link, peer = listener.accept()
        stack.enter_context(link)
        link.settimeout(_JOIN_SECONDS)
        try:
            said = link.recv(len(token), socket.MSG_WAITALL)
        except OSError:
            said = b""
        if hmac.compare_digest(said, token):
            links[_kept_alive(link)] = str(peer[0]).removeprefix("::ffff:")
        else:
            link.close()
    return links


def _kept_alive(link: socket.socket) -> socket.socket:
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform.startswith("linux"):
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE_SECONDS)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, ASK_SECONDS)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, QUESTIONS)
    return link


@contextmanager
def _watching(links: Mapping[socket.socket, str], lost: Callable[[str], None]) -> Iterator[None]:
    """Watch on a thread until the end of the block."""
    ours, theirs = socket.socketpair()
    thread = threading.Thread(
        target=_watch, args=(dict(links), theirs, lost), name="links", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        ours.close()
        thread.join()
        theirs.close()


def _watch(
    links: dict[socket.socket, str], end: socket.socket, lost: Callable[[str], None]
) -> None:
    with selectors.DefaultSelector() as ready:
        ready.register(end, selectors.EVENT_READ)
        for each in links:
            ready.register(each, selectors.EVENT_READ)
        while len(ready.get_map()) > 1:
            for key, _ in ready.select():
                if key.fileobj is end:
                    return
                link = key.fileobj
                assert isinstance(link, socket.socket), "as registered"
                try:
                    missed = link.recv(64).decode()
                except ConnectionResetError:
                    missed = ""
                except OSError:  # timed out, or there is no route to it
                    missed = links[link]
                    _tell(links, missed)
                ready.unregister(link)
                if missed:  # else that process has ended, which collectives notice at once
                    lost(missed)


def _tell(links: Mapping[socket.socket, str], missed: str) -> None:
    """Tell the others of a host that has vanished: they may be waiting for nobody but it."""
    for link, address in links.items():
        if address != missed:
            with suppress(OSError):
                link.send(missed.encode(), socket.MSG_DONTWAIT)
