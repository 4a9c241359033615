"""Does a port still accept a connection? The coordinator's half of the fence; the agents' bind tests are the other."""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from collections.abc import Iterable, Sequence

AT_ONCE = 256
"""Connections that one check has open; a fleet has thousands of ports, a process often 1,024 descriptors."""

LATE_S = 0.25
"""This much later than its time-out, a check was held up by this process and saw nothing."""

OWN_TROUBLE = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL, errno.ENETDOWN, errno.ENETUNREACH}
)
"""What a connection attempt fails with when the trouble is on this host: nothing was learnt about the other side."""


async def connectable(host: str, port: int, timeout_s: float) -> bool | None:
    """Try one TCP connection.

    True: it was accepted. False: refused, timed out or unreachable, which does not prove the port free. None: not
    observed, because of trouble on this host (no descriptor, no local port, no name resolution, or stopped meanwhile).
    """
    started_at = time.monotonic()
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host, port)
    except TimeoutError as error:
        if error.errno is not None:  # the kernel's own verdict, ETIMEDOUT
            return False
        return None if time.monotonic() - started_at > timeout_s + LATE_S else False
    except socket.gaierror:
        return None
    except OSError as error:
        return None if error.errno in OWN_TROUBLE else False
    # On loopback, Linux may pick the free port that is asked for as the local port as well: a connection to itself.
    accepted: bool = writer.get_extra_info("sockname") != writer.get_extra_info("peername")
    writer.transport.abort()
    return accepted


async def answers(endpoints: Sequence[tuple[str, int]], timeout_s: float = 1.0) -> bool | None:
    """Tell whether a host answers at all: a refused connection is an answer, one that times out is none.

    None: not observed, because of trouble on this host.
    """

    async def check(host: str, port: int) -> bool | None:
        started_at = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                _, writer = await asyncio.open_connection(host, port)
        except ConnectionRefusedError:
            return True
        except TimeoutError:
            return None if time.monotonic() - started_at > timeout_s + LATE_S else False
        except OSError as error:
            return None if isinstance(error, socket.gaierror) or error.errno in OWN_TROUBLE else False
        writer.transport.abort()
        return True

    found = await asyncio.gather(*(check(host, port) for host, port in endpoints))
    if True in found:
        return True
    return None if None in found else False


async def open_ports(endpoints: Iterable[tuple[str, int]], timeout_s: float = 1.0) -> tuple[str, ...] | None:
    """Return those that accept a connection, as "host:port" in the given order; None when not all were observed."""
    slots = asyncio.Semaphore(AT_ONCE)

    async def check(host: str, port: int) -> bool | None:
        async with slots:
            return await connectable(host, port, timeout_s)

    asked = list(endpoints)
    answers = await asyncio.gather(*(check(host, port) for host, port in asked))
    if None in answers:
        return None
    return tuple(f"{host}:{port}" for (host, port), accepted in zip(asked, answers, strict=True) if accepted)
