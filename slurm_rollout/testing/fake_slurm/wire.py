"""How the fake's processes talk: JSON lines to the controller, frames between srun and the daemon of a step.

Imported by every fake command: nothing here that is slow to load.
"""

from __future__ import annotations

import array
import json
import os
import socket
from typing import Any

SOCKET = "controller"
MAX_FDS = 253  # the kernel's SCM_MAX_FD
HEADER = 9
"""Bytes of a frame's header: its kind, a task or signal number, the length of what follows."""


def address(folder: int) -> str:
    """Return the controller's address in an open folder: a socket's path may have only 107 bytes, a test's has more."""
    return f"/proc/self/fd/{folder}/{SOCKET}"


def connect(folder: str) -> socket.socket:
    """Return a connection to the controller.

    Raises:
        OSError: it has ended.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address(fd))
        return connection
    finally:
        os.close(fd)


def line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


class Lines:
    """Messages, and the descriptors that came with them, out of a stream."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.fds: list[int] = []
        self._buffer = bytearray()

    def read(self) -> list[dict[str, Any]] | None:
        """Read once; return the complete messages, or None at the end of the stream."""
        try:
            data, ancillary, _, _ = self.connection.recvmsg(1 << 18, socket.CMSG_SPACE(MAX_FDS * 4))
        except ConnectionError:
            return None
        for _, _, raw in ancillary:
            numbers = array.array("i")
            numbers.frombytes(raw[: len(raw) - len(raw) % numbers.itemsize])
            self.fds += numbers
        if not data:
            return None
        self._buffer += data
        *complete, rest = self._buffer.split(b"\n")
        self._buffer = bytearray(rest)
        return [json.loads(part) for part in complete]


def frame(kind: bytes, number: int, data: bytes = b"") -> bytes:
    return kind + number.to_bytes(4, "big") + len(data).to_bytes(4, "big") + data


class Frames:
    """Frames out of a stream."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._buffer = bytearray()

    def read(self) -> list[tuple[bytes, int, bytes]] | None:
        """Read once; return the complete frames as (kind, number, data), or None at the end of the stream."""
        try:
            data = self.connection.recv(1 << 18)
        except ConnectionError:
            return None
        if not data:
            return None
        self._buffer += data
        found = []
        while len(self._buffer) >= HEADER:
            end = HEADER + int.from_bytes(self._buffer[5:HEADER], "big")
            if len(self._buffer) < end:
                break
            number = int.from_bytes(self._buffer[1:5], "big")
            found.append((bytes(self._buffer[:1]), number, bytes(self._buffer[HEADER:end])))
            del self._buffer[:end]
        return found
