"""Writing the run directory, and how a late writer of an older term loses.

One coordinator writes; which one is `claim.py`'s business on one host. Files are prepared in `.t<term>/` and renamed
from there; a takeover deletes older staging directories, so that the late rename of an old writer fails.
"""

from __future__ import annotations

import contextlib
import errno
import json
import marshal
import os
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from importlib.machinery import SourceFileLoader
from importlib.util import MAGIC_NUMBER
from pathlib import Path
from typing import Any

from slurm_rollout import proc
from slurm_rollout.core import codec
from slurm_rollout.core.model import ClientState, Event, GroupState, Place, Request, RunState
from slurm_rollout.core.phases import Phase, Reason
from slurm_rollout.core.plan import FleetPlan
from slurm_rollout.errors import CorruptFile, LeaseLost, StoreError
from slurm_rollout.rundir import RunDir, read_json

# ------------------------------------------------------------------------------------------------------- preparation


def prepare(run: RunDir, plan: FleetPlan) -> None:
    """Make the run directory's parts and write the plan and the agent into it.

    The directory can be entered by others so that they may read `status.json`, unless the run is private; nothing else
    in it can be read by them.

    Raises:
        StoreError: it cannot be made or written.
    """
    try:
        _make_folders(run.path, 0o700 if plan.private else 0o711)
        for part in (run.requests, run.clients, run.logs, run.steps):
            part.mkdir(mode=0o700, exist_ok=True)
        for words in run.clients.glob("*.json"):  # of a trainer of before; its acknowledgements stay
            words.unlink(missing_ok=True)
        _write_early(run, run.plan, json.dumps(codec.encode(plan), indent=1))
        agent = Path(__file__).with_name("agent.py")
        _write_early(run, run.agent, agent.read_text(encoding="utf-8"))
        if not plan.slurm.python:  # the nodes' interpreter is ours: it need not compile the agent at every start
            _write_early(run, run.compiled_agent, _compiled(agent))
    except OSError as e:
        raise StoreError(
            f"{e.filename or run.path}: {e.strerror}. The run directory must be writable; nothing was started"
        ) from None


def _make_folders(path: Path, mode: int) -> None:
    """Make a directory and the way to it. What is there keeps its mode: `--run-dir .` is somebody's project."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(mode=mode, exist_ok=True)
        folder.chmod(mode)  # the umask may have taken bits
    if not missing:
        path.mkdir(exist_ok=True)  # fails unless it is a directory


def load_plan(run: RunDir) -> FleetPlan:
    """Return the plan of the run.

    Raises:
        StoreError: it is not there or not understood.
    """
    try:
        return codec.decode(FleetPlan, read_json(run.plan))
    except FileNotFoundError:
        raise StoreError(f"{run.plan} is missing: `slurm-rollout up` writes it") from None
    except ValueError as e:
        raise CorruptFile(f"{run.plan}: {e}") from None


def _compiled(source: Path) -> bytes:
    """Return what a .pyc of this source holds; compiled anew only where Python has not kept it beside the source."""
    code = SourceFileLoader(source.stem, str(source)).get_code(source.stem)
    return MAGIC_NUMBER + bytes(12) + marshal.dumps(code)  # run as a script, nobody compares it with a source


def _write_early(run: RunDir, path: Path, content: str | bytes) -> None:
    """Write a file before there is a coordinator."""
    staging = run.path / ".prepare"
    staging.mkdir(mode=0o700, exist_ok=True)
    _write(staging, path, content)


def _write(staging: Path, path: Path, content: str | bytes, mode: int = 0o600) -> None:
    """Replace a file in one step. FileNotFoundError without the staging directory: it must never be made here."""
    tmp = staging / path.name
    with _naming(path):
        fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with open(fd, "wb") as f:
            f.write(content if isinstance(content, bytes) else content.encode())
        # The umask may have taken bits that status.json needs.
        tmp.chmod(mode)
        os.replace(tmp, path)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Have an OSError name the file that it is about: that of a full disk names none."""
    try:
        yield
    except OSError as e:
        e.filename, e.filename2 = str(path), None
        raise


def load_state(
    run: RunDir, plan: FleetPlan, *, job: str, restart_count: int, term: int, first_term: int, now: float
) -> RunState:
    """Return the state that a coordinator of this term starts from; `first_term` is that of its `up`'s first one.

    In the same allocation it goes on where the last one was. In another one (a requeue, or a new job on the same run
    directory) nothing of the old steps is believed: groups start over, incarnations and epoch go on. So does a group
    that is not where the plan wants it; that its old steps ended is for the caller to see (`without_place`).

    Raises:
        CorruptFile: state.json is there but not understood. Starting from nothing would let epochs fall.
    """
    found = _read_state(run)
    if found is None:
        found = RunState(run_id=uuid.uuid4().hex[:12], job=job, restart_count=restart_count, term=0), ""
    old, boot_id = found
    known = {g.id: g if has_place(plan, g) else _fresh(g) for g in old.groups}
    groups = [known.get(g.id, GroupState(id=g.id)) for g in plan.groups]
    another_up = old.term < first_term
    same = (old.job, old.restart_count) == (job, restart_count) and boot_id == proc.boot_id()
    if not same:
        groups = [_fresh(g) for g in groups]
        old = replace(old, nodes=(), lost_steps=())
    elif another_up:
        groups = [_begin_again(g) for g in groups]
    if not same or another_up:
        # A trainer that starts now waits for all groups of a pool, as the first one did.
        # What the last one said is void; what it pushed is not: versions do not go backwards by a restart. Its files
        # are gone, so the next one can only tell from the echo with which number to go on.
        clients = tuple(ClientState(id=c.id, seq=c.echo, echo=c.echo, acks=c.acks) for c in old.clients)
        old = replace(
            old, ending=Reason.NONE, ending_at=0.0, pools_once_ready=(), started_at=0.0, clients=clients, paused=()
        )
    groups = [g if g.since else replace(g, since=now, since_wall=time.time()) for g in groups]
    return replace(
        old,
        job=job,
        restart_count=restart_count,
        term=term,
        groups=tuple(groups),
        started_at=old.started_at or now,
        blind_since=None,
        suspect_self_since=None,
    )


def _read_state(run: RunDir) -> tuple[RunState, str] | None:
    """Return what the last coordinator knew, and the boot of its host; None when there was none."""
    try:
        data = read_json(run.state)
        return codec.decode(RunState, data["state"]), str(data.get("boot_id"))
    except FileNotFoundError:
        return None
    except (CorruptFile, ValueError, KeyError, TypeError) as e:
        raise CorruptFile(
            f"{run.state} is not understood: {e}. It holds the run's epochs and incarnations: "
            "move it away only if no trainer relies on them"
        ) from None


def has_place(plan: FleetPlan, g: GroupState) -> bool:
    """Tell whether the plan has the group's steps where they were started. Their names count by the plan's order."""
    planned = next((group.nodes for group in plan.groups if group.id == g.id), ())
    if g.places and len(g.places) == sum(len(p.members) for p in plan.groups if p.id == g.id):
        if not {p.node for p in g.places} <= plan.hosts.keys():
            return False
        planned = tuple(dict.fromkeys(p.node for p in g.places))
    started = tuple(s.node for s in g.steps if not s.sweep)
    return started in ((), planned) and all(s.node in planned for s in g.steps)


def without_place(run: RunDir, plan: FleetPlan, *, job: str, restart_count: int) -> tuple[GroupState, ...]:
    """Return the groups that an earlier `up` of this allocation started where this plan does not have them.

    Raises:
        CorruptFile: as `load_state`.
    """
    found = _read_state(run)
    if found is None or (found[0].job, found[0].restart_count, found[1]) != (job, restart_count, proc.boot_id()):
        return ()
    return tuple(g for g in found[0].groups if not has_place(plan, g))


def _fresh(g: GroupState, places: tuple[Place, ...] = ()) -> GroupState:
    return GroupState(
        id=g.id, incarnation=g.incarnation, restarts=g.restarts, changed=g.changed, start_s=g.start_s, places=places
    )


def _begin_again(g: GroupState) -> GroupState:
    """A new `up` in the same allocation: what ended starts over, what was being ended comes back after that."""
    if g.phase in (Phase.STOPPED, Phase.FAILED):
        return replace(_fresh(g, g.places), retired=g.retired)
    if g.phase is Phase.DRAINING:
        return replace(g, phase=Phase.STOPPING, goes_to=Phase.FENCING, charge=None)
    return g


def next_term(run: RunDir) -> int:
    """Return a term above every one that left a trace in the run directory."""
    terms = [0]
    with contextlib.suppress(FileNotFoundError, StoreError, KeyError, TypeError):
        terms.append(int(read_json(run.state)["state"]["term"]))
    for entry in run.path.glob(".t*"):
        if entry.name[2:].isdigit():
            terms.append(int(entry.name[2:]))
    return max(terms) + 1


# ------------------------------------------------------------------------------------------------------------- writing


class Store:
    """The one writer of a term.

    Raises (every method that writes):
        OSError: the run directory cannot be written; nothing may be started then. It names the file.
        LeaseLost: a coordinator of a newer term took over.
    """

    def __init__(self, run: RunDir, term: int, *, private: bool) -> None:
        self.run = run
        self._term = term
        self._staging = run.staging(term)
        self._private = private
        self._is_open = False
        self._events_size = 0  # of whole lines; what is behind that is half a line
        self._count = 0

    def open(self) -> None:
        """Begin the term: older writers' staging directories go, and with them their right to rename.

        Where that fails for now, the next write tries again.
        """
        for entry in self.run.path.glob(".t*"):
            number = entry.name[2:]
            if entry == self._staging:
                continue
            if number.isdigit() and int(number) > self._term:
                raise LeaseLost(f"{entry} is there: a newer coordinator took over. This one writes and stops nothing")
            with contextlib.suppress(FileNotFoundError):
                if number.isdigit():
                    # In one step: into a directory that is emptied file by file, its owner can still write.
                    entry = entry.rename(self.run.path / f".t{number}.before{self._term}")
                shutil.rmtree(entry, ignore_errors=True)
        with _naming(self._staging):
            self._staging.mkdir(mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self._events_size = self.run.events(self._term).stat().st_size
        self._is_open = True

    def close(self) -> None:
        """Let go of the term: who writes after this begins it again, or learns that it is lost."""
        self._is_open = False

    def add_events(self, events: Iterable[Event], wall: float) -> list[dict[str, Any]]:
        """Append events, all or none, and return them as they were written."""
        lines = []
        for n, event in enumerate(events, self._count + 1):
            line: dict[str, Any] = {"n": n, "at": round(wall, 3), "term": self._term}
            line |= {k: v for k, v in codec.encode(event).items() if v not in ("", None, {}, 0)}
            if event.rank is not None:
                line["rank"] = event.rank
            lines.append(line)
        if lines:
            self._begin()
            self._check_lease()
            with _naming(self.run.events(self._term)):
                self._append("".join(json.dumps(line) + "\n" for line in lines).encode())
            self._count += len(lines)
        return lines

    def _append(self, data: bytes) -> None:
        # Opened each time: NFS shows other hosts what was written when it is closed, and a handle may go stale.
        fd = os.open(self.run.events(self._term), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            size = os.fstat(fd).st_size
            if size > self._events_size:  # what a write left that failed half-way
                size = self._events_size
                os.ftruncate(fd, size)
            try:
                if os.write(fd, data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, size)
                raise
        finally:
            os.close(fd)
        self._events_size = size + len(data)

    def write_state(self, state: RunState) -> None:
        self._replace(self.run.state, {"boot_id": proc.boot_id(), "state": codec.encode(state)})

    def write_barrier(self, document: Mapping[str, object]) -> None:
        self._replace(self.run.barrier, document)

    def write_status(self, document: Mapping[str, object]) -> None:
        self._replace(self.run.status, document, 0o600 if self._private else 0o644)

    def _replace(self, path: Path, document: Mapping[str, object], mode: int = 0o600) -> None:
        self._begin()
        try:
            _write(self._staging, path, json.dumps(document), mode)
        except FileNotFoundError:
            self._check_lease()
            raise

    def _begin(self) -> None:
        if not self._is_open:
            self.open()

    def _check_lease(self) -> None:
        # Not `is_dir`: from Python 3.13 on that is False also for what cannot be seen just now (EACCES, ESTALE).
        try:
            self._staging.stat()
        except FileNotFoundError:
            raise self._lost() from None

    def _lost(self) -> LeaseLost:
        return LeaseLost(f"{self._staging} is gone: a newer coordinator took over. This one writes and stops nothing")


def last_seq(run: RunDir) -> int:
    """Return the newest `seq` that readers may have seen; 0 when there is none."""
    try:
        return int(read_json(run.barrier)["seq"])
    except (FileNotFoundError, StoreError, KeyError, TypeError, ValueError):
        return 0


def read_requests(run: RunDir) -> list[tuple[Path, Request]]:
    """Return the operators' waiting requests, oldest first. What is no request comes with an empty verb."""
    waiting = []
    with contextlib.suppress(OSError):  # a directory that cannot be read asks nothing for now
        for entry in run.requests.glob("[!.]*.json"):
            with contextlib.suppress(OSError):  # withdrawn
                info = entry.lstat()
                if stat.S_ISREG(info.st_mode):
                    waiting.append((info.st_mtime_ns, entry))
    found = []
    for _, entry in sorted(waiting):
        try:
            data = read_json(entry)
            request = Request(
                id=str(data["id"]),
                verb=str(data["verb"]),
                groups=tuple(str(g) for g in data.get("groups") or ()),
                who=str(data.get("who", "")),
            )
        except (FileNotFoundError, StoreError, KeyError, TypeError, AttributeError):
            request = Request(id=entry.stem, verb="")
        found.append((entry, request))
    return found


# --------------------------------------------------------------------------------------------------------------- lease


def read_lease(run: RunDir) -> dict[str, Any]:
    """Return what the last `up` on this run directory said of itself; empty when there was none.

    Raises:
        StoreError: it cannot be read or understood. Then it may be anybody's.
    """
    try:
        found = read_json(run.lease)
    except FileNotFoundError:
        return {}
    except CorruptFile as e:
        found = e
    if not isinstance(found, dict):
        raise CorruptFile(
            f"{run.lease} does not say who uses this run directory: {found}. Nothing was started. If no coordinator "
            "of another host does, remove it; else name another directory with --run-dir"
        )
    return found


def write_lease(run: RunDir, *, job: str, restart_count: int, ended: bool) -> None:
    """Say which host and job own the run directory now, or that they are done with it.

    Raises:
        StoreError: it cannot be written.
    """
    document = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": job,
        "restart_count": restart_count,
        "ended": ended,
        "at": round(time.time(), 3),
    }
    try:
        _write_early(run, run.lease, json.dumps(document))
    except OSError as e:
        raise StoreError(f"{e.filename or run.lease}: {e.strerror}") from None
