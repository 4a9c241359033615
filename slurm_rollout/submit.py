"""`submit`: a batch script handed to Slurm by submitit, or rehearsed by it. The one place that knows submitit.

submitit (1.5.4) would run the function that it is given under srun, or as a child of the batch shell; it takes TERM
from it, and has Slurm send USR2 to every step of the job 90 s before the time limit, which ends the trainer's tasks.
None of that is for a process that must be the batch script's own. So the template's lines, with their
`exec slurm-rollout up …`, are submitit's set-up lines: nothing of submitit runs in the job, and nobody waits for its
results (it would expect one for each node).
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from slurm_rollout.batch_script import Script
from slurm_rollout.errors import Rejected, UsageError

HARMLESS_SIGNAL = "B:CONT@0"
"""`--signal` has to be said, or submitit says its own. With 0 s Slurm never sends it; and CONT does nothing."""


def _submitit() -> Any:
    try:
        import submitit
    except ImportError:
        raise UsageError(
            "`submit` needs submitit, which is not installed here: pip install 'slurm-rollout[submit]'. Without it: "
            "copy a template (templates/), fill it in, and call sbatch yourself"
        ) from None
    return submitit


def _parameters(script: Script, *, after: str = "") -> dict[str, Any]:
    """Return what submitit makes the script of.

    sbatch takes the last of two equal options, and submitit sorts them: so each has the spelling that submitit's has.
    """
    # afternotok: a job that ended well has finished the training, and the rest of the chain ends itself.
    chain = {"dependency": f"afternotok:{after}", "kill-on-invalid-dep": "yes"} if after else {}
    first, *others = [component | chain for component in script.components]
    flags: dict[str, str | bool] = {"signal": HARMLESS_SIGNAL, "wckey": ""}
    for name, value in first.items():
        flags[name if name == "open-mode" else name.replace("-", "_")] = value or True
    het = []
    for component in others:
        het += ["#SBATCH hetjob"]
        het += [
            f"#SBATCH {shlex.quote(f'--{name}={value}' if value else f'--{name}')}" for name, value in component.items()
        ]
    never = "# Nothing comes back from this `exec`: what submitit has written below is never reached."
    return {
        "use_srun": False,
        "stderr_to_stdout": True,
        "additional_parameters": flags,
        "setup": [*het, *script.body.splitlines(), never],
    }


def script_text(script: Script, folder: Path) -> str:
    """Return the file that would be submitted. Needs no Slurm.

    Raises:
        UsageError: submitit is not installed.
    """

    class Look(_submitit().SlurmExecutor):  # type: ignore[misc]  # imported when asked for
        @classmethod
        def affinity(cls) -> int:  # "can jobs be submitted from here?": that does not matter
            return 1

    executor = Look(folder)
    executor.update_parameters(**_parameters(script))
    return str(executor._make_submission_file_text(executor._submitit_command_str, ""))


def submit(script: Script, folder: Path, *, chain: int = 1) -> tuple[str, ...]:
    """Submit the script, `chain` times: each job after the one before it, if that did not end well. Return their ids.

    `folder` keeps the submitted scripts.

    Raises:
        UsageError: submitit or Slurm is not here.
        Rejected: sbatch said no; its words are kept.
    """
    submitit = _submitit()
    _make_folder(folder)
    try:
        executor = submitit.AutoExecutor(folder, cluster="slurm")
    except RuntimeError as e:
        raise UsageError(
            f"no Slurm here ({e}). Submit from a login node, or rehearse with --executor local, or look with --dry-run"
        ) from None
    jobs: list[str] = []
    said = io.StringIO()
    for _ in range(chain):
        after = jobs[-1] if jobs else ""
        executor.update_parameters(**{f"slurm_{k}": v for k, v in _parameters(script, after=after).items()})
        try:
            with contextlib.redirect_stderr(said):  # it would be printed twice
                job = executor.submit(become, [])
        except (RuntimeError, OSError) as e:
            words = " ".join(str(e).split()) or type(e).__name__
            before = f". Of the chain, {', '.join(jobs)} were submitted, and stay: scancel {' '.join(jobs)}"
            raise Rejected(f"the job was not submitted: {words}{before if jobs else ''}") from None
        job.paths.submitted_pickle.unlink(missing_ok=True)  # nobody will load it
        jobs.append(job.job_id)
    return tuple(jobs)


def rehearse(executor: str, argv: Sequence[str], folder: Path) -> tuple[int, Path]:
    """Run `up` here, through submitit: as a process that outlives this one ("local"), or in its place ("debug").

    Return the pid of the process that holds it, and the file of its output; with "debug" never.

    Raises:
        UsageError: submitit is not here.
    """
    submitit = _submitit()
    _make_folder(folder)
    auto = submitit.AutoExecutor(folder, cluster=executor)
    # submitit hides every GPU that it was not asked for, and ends what runs for longer than it was told.
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    auto.update_parameters(timeout_min=10 * 365 * 24 * 60, stderr_to_stdout=True)
    if executor == "debug":
        auto.submit(become, argv, {"CUDA_VISIBLE_DEVICES": gpus}).results()
    with _output_kept():
        job = auto.submit(become, argv, {"CUDA_VISIBLE_DEVICES": gpus})
    return int(job.job_id), job.paths.stdout


@contextlib.contextmanager
def _output_kept() -> Iterator[None]:
    """What is started meanwhile does not inherit this process's output: whoever reads that waits for its last owner."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        for fd, old in zip((1, 2), kept, strict=True):
            os.dup2(old, fd)
            os.close(old)
        os.close(nowhere)


def become(argv: Sequence[str], environ: Mapping[str, str | None] | None = None) -> NoReturn:
    """Replace this process, and submitit with its signal handlers, by `argv`. `environ`: changes; None removes."""
    for name in [name for name in os.environ if name.startswith("SUBMITIT_")]:
        del os.environ[name]
    for name, value in (environ or {}).items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    os.execvp(argv[0], list(argv))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        raise Rejected(f"{e.filename or folder}: {e.strerror}. Nothing was submitted") from None
