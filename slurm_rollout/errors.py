"""The exceptions of the package.

RolloutError
├── UsageError              a flag, a file or a situation that the person can mend        exit 2
│   └── SpecError           a value in the spec file: its path in the file, and what would be right
├── Unobservable            a question got no valid answer. NEVER means "nothing is running"   exit 1
├── Rejected                Slurm (or the machine) said no; its words are kept            exit 1
└── StoreError              the run directory
    ├── RunDirBusy          a living coordinator owns the run directory, the name or the ports
    ├── LeaseLost           a coordinator of a newer term took over
    └── CorruptFile         a file of the run directory cannot be understood
"""

from __future__ import annotations


class RolloutError(Exception):
    """Root of every error that this package raises on purpose."""

    exit_code = 1


class UsageError(RolloutError):
    """The person can mend it; nothing was started."""

    exit_code = 2


class SpecError(UsageError):
    """One or more wrong values in a spec file."""


class Unobservable(RolloutError):
    """A question could not be answered (time-out, refused, nonsense). Unknown is never "nothing is running"."""


class Rejected(RolloutError):
    """The request was understood and refused."""


class StoreError(RolloutError):
    """The run directory cannot be used."""


class RunDirBusy(StoreError):
    """A living coordinator owns it."""


class LeaseLost(StoreError):
    """A coordinator of a newer term took over: this one writes nothing and stops nothing."""


class CorruptFile(StoreError):
    """A file of the run directory cannot be understood."""
