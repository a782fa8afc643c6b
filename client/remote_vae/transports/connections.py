"""Kept-alive connections of `requests`, with a socket that another thread can shut down in the middle of a request: a read that
waits ends at once, and the server sees its client hang up."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection


class OpenSocket:
    """The socket that requests of this thread go over, once there is one."""

    def __init__(self) -> None:
        self._socket: Any = None
        self._is_shut = False

    def opened(self, opened: Any) -> None:
        self._socket = opened
        if self._is_shut:
            self.shut_down()

    def shut_down(self) -> None:
        """End what is sent and received over it; for any thread."""
        self._is_shut = True
        if isinstance(self._socket, socket.socket):
            with suppress(OSError):  # it has ended by itself
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # not TLS's own, which waits for the other side


_open_socket: ContextVar[OpenSocket | None] = ContextVar("open_socket", default=None)


@contextmanager
def open_socket() -> Iterator[OpenSocket]:
    """The socket of the request that is made within."""
    opened = OpenSocket()
    token = _open_socket.set(opened)
    try:
        yield opened
    finally:
        _open_socket.reset(token)


def session(connections: int) -> requests.Session:
    """A session that keeps so many connections to a server."""
    made = requests.Session()
    for scheme in ("http://", "https://"):
        made.mount(scheme, _Adapter(pool_maxsize=connections))
    return made


class _TellsItsSocket:
    """A connection of urllib3: says which socket a request goes over, whether it is a new one or was kept."""

    sock: Any

    def connect(self) -> None:
        super().connect()  # type: ignore[misc]
        self._tell()

    def request(self, *arguments: Any, **named: Any) -> Any:
        self._tell()
        return super().request(*arguments, **named)  # type: ignore[misc]

    def _tell(self) -> None:
        if self.sock is not None and (opened := _open_socket.get()) is not None:
            opened.opened(self.sock)


class _Connection(_TellsItsSocket, HTTPConnection):
    """Of HTTP."""


class _SecureConnection(_TellsItsSocket, HTTPSConnection):
    """Of HTTPS."""


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


class _Adapter(HTTPAdapter):
    """Makes them, with a proxy between or not."""

    def init_poolmanager(self, *arguments: Any, **named: Any) -> None:
        super().init_poolmanager(*arguments, **named)
        self._have_them_tell(self.poolmanager)

    def proxy_manager_for(self, *arguments: Any, **named: Any) -> Any:
        manager = super().proxy_manager_for(*arguments, **named)
        self._have_them_tell(manager)
        return manager

    def _have_them_tell(self, manager: Any) -> None:
        manager.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}
