"""`up`'s small parent process: it owns the trainer and the coordinator, and what a dead coordinator leaves behind.

As subreaper it becomes the parent of the sruns of a coordinator that died, keeps their exit codes in `exits.jsonl` for
the next one, and starts that one with a higher term. It decides nothing about groups.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from slurm_rollout import proc
from slurm_rollout.core.phases import Reason
from slurm_rollout.core.plan import FleetPlan
from slurm_rollout.rundir import RunDir, read_json

log = logging.getLogger("slurm_rollout")

FLEET_FAILED = 70
"""Exit code of `up` when a pool can never again have `min_ready` groups."""

REQUEUE = 75
"""Exit code of `up` when the end of its job ended it, and the spec wants the job to be requeued."""

TRAINER_AFTER_FAILURE_S = 60.0
"""How long a trainer may take to end by itself after the barrier said `failed`."""

DRAIN_MARGIN_S = 15.0
"""On top of each pool's grace: by then the coordinator has ended every step, or gives up and says which are left."""

GAVE_UP, SUPERSEDED, CANNOT_START = 3, 4, 5
FINAL = {
    GAVE_UP: "the coordinator gave up the drain: it says above which steps are left",
    SUPERSEDED: "another coordinator took over the run directory",
    CANNOT_START: "the coordinator could not start: it says above why",
}
"""Exit statuses of the coordinator after which no other one is started."""

SUPERVISOR = "ROLLOUT_SUPERVISOR"
"""The environment variable in which the coordinator finds whose end is its own."""

LAST_MEASURES = ((None, 2.0), (signal.SIGTERM, 3.0), (signal.SIGKILL, 1.0))
"""What is done to processes that are left at the very end, and for how many seconds each is waited for."""

JOB_END = signal.SIGUSR1
"""What the coordinator is told to end by when the job's end is near, instead of TERM."""

TIME_LEFT = Reason.TIME_LEFT.value

_WARNINGS = frozenset({signal.SIGUSR1, signal.SIGUSR2})
"""What `#SBATCH --signal=B:…` is for: the job goes on for a while."""

_FROM_SLURM = _WARNINGS | {signal.SIGTERM}

_ENDS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, *_WARNINGS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """What a coordinator is started with."""

    job: str
    restart_count: int
    first_term: int


def drain_bound_s(plan: FleetPlan) -> float:
    """Return how long `up` takes at most from a signal to its own end, in seconds."""
    grace = max(p.stop.grace_s + p.stop.cancel_after_s for p in plan.pools)
    return max(grace + DRAIN_MARGIN_S, plan.trainer.grace_s) + 5.0


def hold_signals() -> None:
    """Let signals that end `up` wait until `Supervisor.run` can take them: it is told to end, not killed."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)


class Supervisor:
    """Runs until the fleet is drained and the trainer, if there is one, has ended."""

    def __init__(self, plan: FleetPlan, run: RunDir, term: Term, trainer: Sequence[str]) -> None:
        self._plan = plan
        self._run = run
        self._how = term
        self._argv = list(trainer)
        self._term = term.first_term - 1
        self._coordinator: subprocess.Popen[bytes] | None = None
        self._told_term = 0  # the term whose coordinator was told to drain
        self._restart_at = 0.0
        self._crashes: list[float] = []
        self._trainer: subprocess.Popen[bytes] | None = None
        self._trainer_code: int | None = None
        self._code: int | None = None  # decided once `up` is to end
        self._end_by = float("inf")
        self._kill_trainer_at = float("inf")
        self._failed_at: float | None = None
        self._over = False
        self._signals: list[int] = []
        self._job_ends = False  # why it is to end: a signal such as Slurm sends, or too little time left
        self._warned = False  # and the job still goes on for a while
        self._terminated = False  # TERM came, first or later: Slurm may be ending the job

    def run(self) -> int:
        """Return the exit code of `up`."""
        logging.raiseExceptions = False  # a log on a full disk is no reason for anything
        proc.become_subreaper()
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in _ENDS:
            # nohup, or a shell's `&`, asked that HUP or INT shall not end this.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda n, _: self._signals.append(n))
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDS)
        self._start_coordinator()
        while not self._is_done():
            select.select([reader], [], [], 0.2)
            with contextlib.suppress(BlockingIOError):
                os.read(reader, 4096)
            self._step()
        self._end_the_rest()
        _forget_unwritten_log()
        return self._exit_code()

    # ---------------------------------------------------------------------------------------------------------- steps

    def _step(self) -> None:
        now = time.monotonic()
        if self._signals:
            names = ", ".join(signal.Signals(n).name for n in self._signals)
            told = frozenset(self._signals)
            self._signals.clear()
            self._terminated |= signal.SIGTERM in told
            if self._code is None:
                self._job_ends, self._warned = bool(told & _FROM_SLURM), bool(told & _WARNINGS)
            self._begin_to_end(0, f"{names}: draining the fleet")
        self._reap()
        if self._coordinator is None and not self._over and now >= self._restart_at:
            self._start_coordinator()
        barrier, reason = self._read_barrier()
        if self._argv and self._trainer is None and self._code is None and barrier in ("ready", "needs_weights"):
            self._start_trainer()
        if barrier == "failed" and self._code is None:
            self._on_fleet_failed(now)
        elif reason == TIME_LEFT and barrier == "stopped" and self._code is None and self._argv:
            if self._trainer is None:
                # Not to be requeued: the next life would have no more time than this one.
                self._begin_to_end(FLEET_FAILED, "ending: the job has too little time left to start the fleet")
        elif barrier == "ready" and self._code is None and self._failed_at is not None:
            log.warning("the fleet is ready again: somebody restarted it in time")
            self._failed_at = None
        if now >= self._kill_trainer_at:
            self._signal_trainer(signal.SIGKILL)
        self._tell_coordinator()

    def _is_done(self) -> bool:
        if time.monotonic() >= self._end_by:
            log.error("the drain took longer than %.0f s: what is left is killed", drain_bound_s(self._plan))
            self._code = self._code or 1
            return True
        trainer_ended = self._trainer is None or self._trainer_code is not None
        return self._over and trainer_ended

    def _begin_to_end(self, code: int, why: str) -> None:
        """Drain: the coordinator and the trainer are told at the same time."""
        if self._code is not None:
            return
        log.info("%s", why)
        self._code = code
        self._end_by = time.monotonic() + drain_bound_s(self._plan)
        self._restart_at = 0.0
        if self._trainer is not None and self._trainer_code is None:
            # With TERM, Slurm has sent it to the tasks of the trainer's srun itself: another one on top would end them.
            wanted = "TERM" if self._terminated else self._plan.trainer.signal
            self._signal_trainer(signal.Signals[f"SIG{wanted}"])
            self._kill_trainer_at = time.monotonic() + self._plan.trainer.grace_s

    def _tell_coordinator(self) -> None:
        """Pass on, once, that the run is to end; not before the coordinator can hear it.

        While its interpreter starts, a TERM would be its death. Its staging directory is the first thing that it makes
        after its signal handlers.
        """
        if self._code is None or self._coordinator is None or self._told_term == self._term:
            return
        try:
            self._run.staging(self._term).stat()
        except FileNotFoundError:
            return
        except OSError:
            pass  # it cannot be seen just now; too early a TERM costs a start, one that is never sent all grace
        self._told_term = self._term
        # Not Popen's: that looks first whether it has ended, and then nobody else would hear of its end.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._coordinator.pid, JOB_END if self._warned else signal.SIGTERM)

    def _on_fleet_failed(self, now: float) -> None:
        """A dead fleet never leaves a trainer waiting: its barrier says so; here it gets time to end by itself."""
        failed_at = self._note_failure(now)
        waits = self._trainer is not None and self._trainer_code is None
        if not waits or now - failed_at >= TRAINER_AFTER_FAILURE_S:
            self._begin_to_end(FLEET_FAILED, "ending, because the fleet failed")

    def _note_failure(self, now: float) -> float:
        """Return when the failure was first seen."""
        if self._failed_at is None:
            self._failed_at = now
            log.error("the fleet failed: see `slurm-rollout status --run-dir %s`", self._run.path)
        return self._failed_at

    # ------------------------------------------------------------------------------------------------------- children

    def _start_coordinator(self) -> None:
        self._term += 1
        argv = [
            sys.executable,
            "-P",  # a queue.py in the user's directory must not be taken for Python's
            "-m",
            "slurm_rollout.coordinator",
            f"--run-dir={self._run.path}",
            f"--term={self._term}",
            f"--first-term={self._how.first_term}",
            f"--job={self._how.job}",
            f"--restart-count={self._how.restart_count}",
        ]
        if self._code is not None:
            argv += ["--drain", "--end-is-near"] if self._warned else ["--drain"]
            self._told_term = self._term
        # A session of its own: a terminal's Ctrl-C reaches only the supervisor, which drains in order.
        self._coordinator = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, SUPERVISOR: str(os.getpid())},
        )

    def _start_trainer(self) -> None:
        environ = dict(os.environ)
        environ["ROLLOUT_BARRIER"] = str(self._run.barrier)
        environ["ROLLOUT_RUN_DIR"] = str(self._run.path)
        environ["ROLLOUT_TRAINER_NODELIST"] = ",".join(self._plan.trainer_nodes)
        environ["ROLLOUT_TRAINER_NNODES"] = str(len(self._plan.trainer_nodes))
        try:
            self._trainer = subprocess.Popen(self._argv, env=environ, start_new_session=True)
        except OSError as e:
            log.error("the trainer %s could not be started: %s", self._argv[0], e.strerror)
            self._begin_to_end(127 if isinstance(e, FileNotFoundError) else 126, "ending, because there is no trainer")
            return
        log.info("trainer started (pid %d): %s", self._trainer.pid, self._argv[0])

    def _reap(self) -> None:
        """Collect every child that ended, orphans of an earlier coordinator included."""
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            pid = ended.si_pid
            was = proc.read(pid)  # the start time is gone once it is reaped
            _, status = os.waitpid(pid, 0)
            code = os.waitstatus_to_exitcode(status)
            if self._coordinator is not None and pid == self._coordinator.pid:
                self._on_coordinator_end(code)
            elif self._trainer is not None and pid == self._trainer.pid:
                self._on_trainer_end(code)
            elif was is not None:
                self._keep_exit(pid, was.started, code)

    def _on_coordinator_end(self, code: int) -> None:
        assert self._coordinator is not None
        self._coordinator.returncode = code  # it was reaped here, not by Popen
        self._coordinator = None
        # What a first one could not read, nobody could. A later one leaves engines alone by not starting.
        if code in (0, *FINAL) and not (code == CANNOT_START and self._term > self._how.first_term):
            self._over = True
            self._begin_to_end(1 if code else 0, FINAL.get(code, "the fleet is drained"))
            if code:
                self._code = 1
            return
        now = time.monotonic()
        self._crashes = [t for t in self._crashes if now - t < 60.0] + [now]
        # At once the first time; a coordinator that cannot live must not burn a core.
        delay = 0.0 if len(self._crashes) == 1 else min(30.0, 0.5 * 2 ** (len(self._crashes) - 2))
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        log.error("the coordinator died (%s): the engines go on, the next one starts in %.1f s", how, delay)
        self._restart_at = now + delay

    def _on_trainer_end(self, code: int) -> None:
        assert self._trainer is not None
        self._trainer.returncode = code
        self._trainer_code = 128 - code if code < 0 else code
        # It may have read of the failure before this process did.
        if self._code is None:
            phase, reason = self._read_barrier()
            if phase == "failed":
                self._note_failure(time.monotonic())
            # It went because nothing will serve it any more in this job, not because it had finished.
            self._job_ends = self._warned = phase == "stopped" and reason == TIME_LEFT and code != 0
        code = self._trainer_code if self._failed_at is None else self._trainer_code or FLEET_FAILED
        self._begin_to_end(code, f"the trainer ended with {self._trainer_code}")

    def _keep_exit(self, pid: int, started: int, code: int) -> None:
        line = json.dumps({"pid": pid, "started": started, "code": code}) + "\n"
        # A full disk loses an exit code, which is only a hint anyway, never the supervisor.
        with contextlib.suppress(OSError):
            fd = os.open(self._run.exits, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with open(fd, "w", encoding="ascii") as f:
                f.write(line)

    def _signal_trainer(self, number: int) -> None:
        if self._trainer is not None and self._trainer_code is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._trainer.pid, number)

    # ------------------------------------------------------------------------------------------------------------ end

    def _end_the_rest(self) -> None:
        """Leave no process: normally there is none left."""
        if self._trainer is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._trainer.pid, signal.SIGKILL)
        # An srun whose agent said its last word may take a moment more. TERM makes srun end its step; KILL leaves that
        # to its twin.
        for number, patience_s in LAST_MEASURES:
            left = proc.descendants(os.getpid())
            if number is not None:
                for process in left:
                    log.warning("ending what is left: %s (pid %d)", process.comm, process.pid)
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(process.pid, number)
            deadline = time.monotonic() + patience_s
            while left and time.monotonic() < deadline:
                time.sleep(0.02)
                self._reap()
                left = proc.descendants(os.getpid())
            if not left:
                return

    @property
    def requeue_now(self) -> bool:
        """Whether the spec wants `scontrol requeue`, and the job can be requeued: it has ended neither for itself nor
        for Slurm. One that somebody cancelled must not come back."""
        wanted = self._plan.slurm.requeue == "scontrol" and self._plan.backend == "slurm"
        return wanted and not self._terminated and self._exit_code() == REQUEUE

    def _exit_code(self) -> int:
        orderly = self._failed_at is None and self._code != 1
        if self._plan.slurm.requeue != "no" and self._job_ends and orderly:
            return REQUEUE
        if self._trainer_code is not None and self._failed_at is None:
            return self._trainer_code
        return self._code or 0

    def _read_barrier(self) -> tuple[str, str]:
        """Return the phase and reason that the barrier of this `up` says; empty while there is none of it."""
        try:
            document = read_json(self._run.barrier)
            ours = int(document["term"]) >= self._how.first_term
            return (str(document["phase"]), str(document.get("reason", ""))) if ours else ("", "")
        except Exception:  # whatever is wrong with the file: this process must outlive it
            return "", ""


def _forget_unwritten_log() -> None:
    """Python ends with 120, whatever else was wanted, when it cannot flush its standard error at the end."""
    try:
        sys.stderr.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stderr.fileno())
        os.close(nowhere)
