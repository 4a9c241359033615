"""Play one seed."""

from __future__ import annotations

import logging
import shutil
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from slurm_rollout.core.model import Event
from slurm_rollout.core.phases import IllegalTransition
from slurm_rollout.core.view import event_line
from slurm_rollout.errors import RolloutError
from slurm_rollout.simulation.broken import Broken
from slurm_rollout.simulation.case import START, Case, Outcome, make_case
from slurm_rollout.simulation.fleet import Fleet

__all__ = ["START", "Case", "Outcome", "make_case", "play_seed", "run"]


def run(case: Case) -> Outcome:
    """Play one case. What it broke is in the outcome; nothing is raised but by a bug of the simulation itself."""
    outcome = Outcome(case=case)
    folder = tempfile.mkdtemp(prefix="rollout-sim-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    fleet = Fleet(case, Path(folder))
    log = logging.getLogger("slurm_rollout")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)  # the trace tells it in virtual time
    try:
        fleet.play()
    except Broken as e:
        outcome.broken, outcome.number = str(e), e.number
    except IllegalTransition as e:
        outcome.broken, outcome.number = f"illegal transition: {e}", 6
    except (AssertionError, LookupError, TypeError, ValueError, RolloutError) as e:
        # The code under test may fall over, too.
        outcome.broken, outcome.number = f"{type(e).__name__}: {e}\n{traceback.format_exc()}", 99
    finally:
        log.setLevel(level)
        for client in fleet.clients:
            client.kill()
        if fleet.coordinator is not None:
            fleet.coordinator.die()
        shutil.rmtree(folder, ignore_errors=True)
    if outcome.broken:
        outcome.trace = [_line(at, words) for at, words in fleet.trace]
    outcome.hours = (fleet.time.now - START) / 3600.0
    outcome.ticks, outcome.terms, outcome.faults = fleet.ticks, fleet.terms, len(case.faults)
    outcome.recoveries, outcome.failures = fleet.checker.recoveries, fleet.checker.failures
    outcome.ready_s, outcome.spent = fleet.ready_s, fleet.checker.spent
    outcome.failed_at = fleet.first_failed_at
    return outcome


def play_seed(seed: int, hours: float) -> Outcome:
    """Play the case that a seed stands for."""
    return run(make_case(seed, hours=hours))


def _line(at: float, words: Sequence[object]) -> str:
    said = []
    for word in words:
        if isinstance(word, Event):
            said.append(event_line(asdict(word)))
        else:
            said.append(str(word))
    return f"{at:10.3f}  " + " ".join(said)
