"""A batch script that runs `up`: read from a template, filled in, and checked before anybody waits for it in a queue.

A template is a batch script that plain `sbatch` takes as well. Three of its lines are set here: `spec=…`, `run_dir=…`
and `trainer=(…)`; its directives can be overridden; everything else is kept.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slurm_rollout.allocation import outgoing_ports
from slurm_rollout.core.hostlist import expand
from slurm_rollout.core.request import Allocation
from slurm_rollout.errors import SpecError, UsageError
from slurm_rollout.spec import Spec, build_plan

Options = dict[str, str]
"""sbatch's options by their long names, without the dashes. An empty value: the option alone."""

SIGNALS_FOR_UP = ("TERM", "INT", "HUP", "CONT", "USR1", "USR2")
"""What `up` can take: it drains. Any other signal would kill it, and leave its engines behind."""

# fmt: off
_SHORT = {
    "A": "account", "C": "constraint", "c": "cpus-per-task", "D": "chdir", "d": "dependency", "e": "error", "G": "gpus",
    "J": "job-name", "k": "no-kill", "L": "licenses", "N": "nodes", "n": "ntasks", "o": "output", "p": "partition",
    "q": "qos", "t": "time", "w": "nodelist", "x": "exclude",
}
# fmt: on
_REFUSED = {
    "array": "every task of an array would run the same fleet: submit several times, with a --run-dir each",
    "wrap": "the template is the script",
    "parsable": "the job's id is read from sbatch's usual words; --json prints it for programs",
    "quiet": "the job's id is read from sbatch's usual words",
}
_OPPOSITE = {"requeue": "no-requeue", "no-requeue": "requeue"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """A batch script: directives of each component of the job (mostly one), then lines for bash."""

    source: str  # where it is from, for messages
    components: tuple[Options, ...]
    body: str

    @property
    def options(self) -> Options:
        """Those of the first component, of which the batch script is a part."""
        return self.components[0]


# ------------------------------------------------------------------------------------------------------------ templates


def templates() -> dict[str, Path]:
    """Return the templates that come with the package, by name."""
    package = Path(__file__).parent
    folders = (package / "templates", package.parent / "templates")  # of a wheel, of a checkout
    folder = next((f for f in folders if f.is_dir()), folders[0])
    return {path.stem: path for path in sorted(folder.glob("*.sbatch"))}


def read_template(name: str) -> Script:
    """Return a template of the package, by its name, or the batch script in a file.

    Raises:
        UsageError: there is none, or it is not of the kind that `submit` can fill in.
    """
    path = templates().get(name) or Path(name)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(
            f"no template {name!r}: there are {', '.join(templates())}, and there is no file of that name"
        ) from None
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"template {path} cannot be read: {e}") from None
    return parse_template(text, source=str(path))


def parse_template(text: str, *, source: str) -> Script:
    """Return the script in `text`; `source` names it in messages.

    Raises:
        UsageError: `submit` cannot fill it in; the message says why.
    """
    lines = text.splitlines()
    if not lines or lines[0].rstrip() not in ("#!/bin/bash", "#!/usr/bin/bash", "#!/usr/bin/env bash"):
        raise UsageError(
            f"{source}: the first line must be #!/bin/bash, which is what submitit writes (for a login shell's "
            "settings: `source /etc/profile` among the lines below)"
        )
    # sbatch, too, reads no directive after the first command.
    head = next((n for n, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    directives = [n for n in range(head) if lines[n].startswith("#SBATCH")]
    components: list[Options] = [{}]
    for n in directives:
        try:
            words = shlex.split(lines[n].removeprefix("#SBATCH"), comments=True)
        except ValueError as e:
            raise UsageError(f"{source}, line {n + 1}: {e}") from None
        if words in (["hetjob"], ["packjob"]):
            components.append({})
        else:
            components[-1].update(_options(words, f"{source}, line {n + 1}"))
    body = "\n".join(lines[max(directives, default=0) + 1 :]).strip("\n")
    if not re.search(r"^exec\s+(\S*/)?slurm-rollout\s+up\b", body, re.MULTILINE):
        raise UsageError(
            f"{source}: its last command must be `exec slurm-rollout up …`: without exec neither scancel nor the time "
            "limit reaches `up`"
        )
    return Script(source=source, components=tuple(components), body=body)


def _options(words: Sequence[str], where: str) -> Iterator[tuple[str, str]]:
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            name, has_value, value = word[2:].partition("=")
        elif word.startswith("-") and word[1:2] in _SHORT:
            name, value = _SHORT[word[1]], word[2:]
            has_value = value
        else:
            raise UsageError(f"{where}: {word!r} is not understood: write --name=value")
        if not has_value and rest and not rest[0].startswith("-"):
            value = rest.pop(0)
        yield name, value


def parse_option(text: str) -> tuple[str, str]:
    """Return the option that `--sbatch` names: NAME=VALUE, or NAME alone.

    Raises:
        UsageError: `submit` cannot pass it on.
    """
    name, _, value = text.strip().removeprefix("--").partition("=")
    if not re.fullmatch(r"[a-z][a-z-]+", name):
        raise UsageError(f"--sbatch {text!r}: an option of sbatch by its long name is needed, such as --sbatch mem=0")
    return name, value


# ----------------------------------------------------------------------------------------------------------- filling in


def fill_in(
    template: Script, options: Mapping[str, str], *, spec: Path, run_dir: Path | None, trainer: Sequence[str]
) -> Script:
    """Return the template with its lines set. `options` override directives of the first component.

    `run_dir` None, and `trainer` empty: what the template says. In the job, `slurm-rollout` is also looked for where
    this one is.

    Raises:
        UsageError: a line to set is not there, or an option is one that would break the job.
    """
    body = _set_line(template, template.body, "spec", r"\S.*", shlex.quote(str(spec.absolute())))
    if run_dir is not None:
        body = _set_line(template, body, "run_dir", r"\S.*", shlex.quote(str(run_dir.absolute())))
    if trainer:
        body = _set_line(template, body, "trainer", r"\(.*\).*", f"({shlex.join(trainer)})")
    path = f"PATH=$PATH:{shlex.quote(str(Path(sys.executable).parent))} # for a job that did not inherit it"
    merged = dict(template.options)
    for name, value in options.items():
        merged.pop(_OPPOSITE.get(name, ""), None)
        merged[name] = value
    script = replace(template, components=(merged, *template.components[1:]), body=f"{path}\n\n{body}")
    _check_options(script)
    return script


def _set_line(template: Script, body: str, name: str, pattern: str, value: str) -> str:
    changed, count = re.subn(rf"^{name}={pattern}$", lambda _: f"{name}={value}", body, flags=re.MULTILINE)
    if count == 1:
        return changed
    example = f"{name}=(python train.py)" if name == "trainer" else f"{name}=…"
    found = "has no line" if not count else f"has {count} lines"
    hint = "; a template without one starts no trainer" if name == "trainer" and not count else ""
    raise UsageError(f"{template.source} {found} `{example}` for `submit` to set{hint}")


def _check_options(script: Script) -> None:
    for component in script.components:
        for name, why in _REFUSED.items():
            if name in component:
                raise UsageError(f"--{name} cannot be used with `submit`: {why}")
    if "time" not in script.options:
        raise UsageError(f"no time limit: say --time, or give {script.source} one (submitit would take 5 minutes)")
    # sbatch's environment variables win over directives.
    for signal in (script.options.get("signal"), os.environ.get("SBATCH_SIGNAL")):
        if signal and not _is_harmless(signal):
            raise UsageError(
                f"--signal={signal}, from {script.source}, the options or SBATCH_SIGNAL, would harm the run: without "
                "`B:` Slurm sends it to every step, and USR1 is what agents are told to end their engines by; "
                f"with it, only {', '.join(SIGNALS_FOR_UP)} do not kill `up`. Say, for example, --signal=B:USR1@120"
            )


def _is_harmless(signal: str) -> bool:
    to_whom, _, name = signal.upper().partition(":")
    return "B" in to_whom and name.partition("@")[0].removeprefix("SIG") in SIGNALS_FOR_UP


def run_dir_of(script: Script, job: str) -> str | None:
    """Return the run directory of a job with this script; None when only the job itself knows it."""
    found = re.search(r"^run_dir=(.*)$", script.body, re.MULTILINE)
    if found is None:
        return None
    known = {**os.environ, "SLURM_JOB_ID": job, "SLURM_JOB_NAME": script.options.get("job-name", "$")}
    value = re.sub(r"\$\{?(\w+)\}?", lambda m: known.get(m[1], m[0]), " ".join(shlex.split(found[1], comments=True)))
    if re.search(r"[$`]", value):
        return None
    return str(Path.cwd() / script.options.get("chdir", "") / Path(value).expanduser())


# ------------------------------------------------------------------------------------------------------------- checking


def check_fits(spec: Spec, script: Script) -> None:
    """See that the fleet fits into the nodes that the script asks for, as far as that can be known before.

    Raises:
        SpecError: it does not. The job would find that out too, after its time in the queue.
    """
    allocation = _expected(spec, script)
    if allocation is None:
        return
    try:
        build_plan(spec, allocation, backend="slurm", port_range=outgoing_ports())
    except SpecError as e:
        raise SpecError(
            f"the job would not have room for the fleet: {e}. (The nodes' names stand for those that Slurm will "
            f"choose; the numbers are from {script.source} and the options. In a heterogeneous job only "
            "--gpus-per-node tells of the GPUs of further components)"
        ) from None


def _expected(spec: Spec, script: Script) -> Allocation | None:
    """Return an allocation such as the job will get; None when the directives do not tell."""
    nodes: dict[str, int] = {}  # node -> its component
    gpus: dict[str, int] = {}
    named = list(expand(spec.nodes.include)) if spec.nodes.include is not None else []
    for number, options in enumerate(script.components):
        count = re.match(r"\d+", options.get("nodes", ""))
        # Of --gres, Slurm (22.05) tells a batch script only what the first component has.
        per_node = _gpus_per_node({k: v for k, v in options.items() if not number or k != "gres"})
        if count is None or per_node is None:
            return None
        for _ in range(int(count[0])):
            node = named.pop(0) if named else f"node{len(nodes) + 1}"
            nodes[node], gpus[node] = number, per_node
    is_het = len(script.components) > 1
    return Allocation(
        job="",
        nodes=tuple(nodes),
        cpus=dict.fromkeys(nodes, 1),
        gpus=gpus,
        addresses={node: node for node in nodes},
        het_jobs=tuple(str(n) for n in range(len(script.components))) if is_het else (),
        het_groups=nodes if is_het else {},
    )


def _gpus_per_node(options: Options) -> int | None:
    """Return how many GPUs of a node the job asks for; None when that is said in a way that depends on more."""
    if any(name.startswith("gpus") and name != "gpus-per-node" for name in options):
        return None
    words = [w.removeprefix("gres/") for w in options.get("gres", "").split(",") if w]
    asked = [w.partition(":")[2] or "1" for w in words if w.partition(":")[0] == "gpu"]
    asked += [w for w in options.get("gpus-per-node", "").split(",") if w]
    numbers = [re.sub(r"\(.*", "", a).rpartition(":")[2] for a in asked]
    return sum(map(int, numbers)) if all(n.isdigit() for n in numbers) else None
