"""What kind of failure it was: whose budget pays for it, how soon the next start may come, what people are told. Pure.

`Reason` says how a failure was seen, `FailureClass` what that means. Evidence beats the way in which it was seen: an
engine that exits because its disk is full is no engine crash, and a spare node would not help it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from slurm_rollout.core.phases import Reason


class FailureClass(StrEnum):
    """The value is what events, `status.json` and tables show."""

    ENGINE_CRASH = "engine_crash"
    HANG = "hang"
    STARTUP = "startup"
    NODE = "node"
    SLURM_REFUSED = "slurm_refused"
    DISK_FULL = "disk_full"
    OPERATOR = "operator"
    JOB_ENDING = "job_ending"


class Budget(StrEnum):
    """What pays for a failure."""

    RESTARTS = "restarts"
    START_FAILURES = "start_failures"
    NODES = "nodes"  # the nodes that are left: counted apart from what engines do
    NONE = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What follows from a class."""

    budget: Budget
    paced: bool  # the first start after it waits, too: what was so a moment ago is so now
    short: str  # for a table
    sentence: str  # what it means and what to do, one line


RULES: dict[FailureClass, Rule] = {
    FailureClass.ENGINE_CRASH: Rule(
        budget=Budget.RESTARTS,
        paced=False,
        short="an engine's process ended; see its last lines",
        sentence=(
            "An engine's process ended by itself: its last lines say why, as far as it knew. One restart is charged."
        ),
    ),
    FailureClass.HANG: Rule(
        budget=Budget.RESTARTS,
        paced=False,
        short="engines ran, but did not answer; see the black box",
        sentence=(
            "The engines ran, but gave no good answer and made no progress: the black box says which rank was stuck "
            "first. One restart is charged."
        ),
    ),
    FailureClass.STARTUP: Rule(
        budget=Budget.START_FAILURES,
        paced=False,
        short="the engines did not come up; see their last lines",
        sentence=(
            "The group did not come up: what is wrong with its command, model, ports or memory is wrong again at the "
            "next start. One start-up failure is charged."
        ),
    ),
    FailureClass.NODE: Rule(
        budget=Budget.NODES,
        paced=False,
        short="a node or its GPU is broken; tell the admins",
        sentence=(
            "A node, or a GPU of it, is broken or lost, not the engine: keep it out of the next job "
            "(sbatch --exclude=NODE) and tell the admins."
        ),
    ),
    FailureClass.SLURM_REFUSED: Rule(
        budget=Budget.START_FAILURES,
        paced=True,
        short="Slurm started no step; see its words",
        sentence=(
            "Slurm started no step: its own words say what was asked too much, or what it waits for. One start-up "
            "failure is charged, unless Slurm did not answer."
        ),
    ),
    FailureClass.DISK_FULL: Rule(
        budget=Budget.NONE,
        paced=True,
        short="a file system is full: make room",
        sentence=(
            "A file system is full or a quota is spent: make room there. It is tried again by itself, ever later; "
            "nothing is charged, and no node is blamed."
        ),
    ),
    FailureClass.OPERATOR: Rule(
        budget=Budget.NONE,
        paced=False,
        short="somebody asked for it",
        sentence="Somebody asked for it: nothing is wrong, and nothing is charged.",
    ),
    FailureClass.JOB_ENDING: Rule(
        budget=Budget.NONE,
        paced=False,
        short="the job or the run is ending",
        sentence="The job or the run was ending: nothing is wrong with the engines, and nothing is charged.",
    ),
}

_WANTED = {
    Reason.OPERATOR: FailureClass.OPERATOR,
    Reason.RUN_ENDING: FailureClass.JOB_ENDING,
    Reason.JOB_ENDING: FailureClass.JOB_ENDING,
}

_HANGS = frozenset({Reason.NOT_ANSWERING, Reason.ANSWERS_ERROR})

# strerror of ENOSPC and EDQUOT, and how Python shows their numbers.
_FULL = re.compile(r"No space left on device|Disk quota exceeded|\[Errno (?:28|122)\]", re.IGNORECASE)

# "Node failure on n3" (22.05, when SlurmdTimeout is over), "Task launch for StepId=… failed on node n3: Communication
# connection failure" (22.05, a node that does not answer yet counts as up), "Required node not available (down, drained
# or reserved)". Before 23.02 srun may exit with 0 after the first.
_NODE_LOST = ("Node failure on", "Communication connection failure", "Required node not available")

# Of a node that is down (22.05) as well as of a step that asks for more than a node has.
_NODE_OR_WISH = ("Requested node configuration is not available",)


def classify(
    reason: Reason,
    *,
    startup: bool,
    launched: bool = True,
    accepted: bool = False,
    words: str = "",
    disk: str = "",
    hardware: str = "",
) -> FailureClass:
    """Return the class of a failure that was seen as `reason`.

    Args:
        startup: before the incarnation was ready.
        launched: an agent spoke, so Slurm did start a step.
        accepted: Slurm has started a step of this shape for the group before, so what is asked for can be had.
        words: what srun said, or the message of an agent that could not do its work.
        disk: which file system the agent found full; empty: none.
        hardware: what the agent saw of a broken GPU; empty: nothing.
    """
    if reason in _WANTED:
        return _WANTED[reason]
    if disk or says_full(words):
        return FailureClass.DISK_FULL
    if (
        reason is Reason.SELF_FENCED
        or hardware
        or names_lost_node(words)
        or (accepted and any(w in words for w in _NODE_OR_WISH))
    ):
        return FailureClass.NODE
    if not launched and reason is Reason.LAUNCH_FAILED:
        return FailureClass.SLURM_REFUSED
    if startup:
        return FailureClass.STARTUP
    return FailureClass.HANG if reason in _HANGS else FailureClass.ENGINE_CRASH


def of_wish(reason: str) -> str:
    """Return the class of an end or a phase that somebody wanted; empty where `reason` is no such wish."""
    return next((kind.value for wish, kind in _WANTED.items() if wish == reason), "")


def says_full(text: str) -> bool:
    """Tell whether these words are those of a full disk or a spent quota."""
    return _FULL.search(text) is not None


def names_lost_node(words: str) -> bool:
    """Tell whether srun's words blame the node, whatever was asked of it."""
    return any(w in words for w in _NODE_LOST)
