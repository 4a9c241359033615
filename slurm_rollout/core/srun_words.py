"""What srun says on its standard error, as far as it is of use. Pure, and light: `describe` loads it."""

from __future__ import annotations

UNANSWERED = ("Socket timed out", "Unable to contact slurm controller")
"""srun's words for a controller that does not answer (22.05 to 25.11): then it refused nothing."""

PUT_OFF = "step creation"
"""Of "Job 1 step creation temporarily disabled, retrying": there is no step yet, and srun waits (20.11 to 25.11)."""

# Said of --cpu-bind=none where TaskPlugin cannot bind; it is no reason for anything (22.05).
_CHATTER = "cluster configuration lacks support for cpu binding"


def last_words(stderr: str) -> str:
    """Return the last things of interest, on one line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip() and not line.endswith(_CHATTER)]
    return "; ".join(line.removeprefix("srun: ").removeprefix("error: ") for line in lines[-2:])[:300]
