"""Can the tests fail? Deliberate bugs, one at a time, in a copy of the package that is put first on PYTHONPATH.

    python -m tests.mutants                       # the simulation: seeds until each bug is caught, as a table
    python -m tests.mutants drop_the_fence ...    # only these
    python -m tests.mutants --pytest tests/test_decide.py tests/test_liveness_rules.py

A bug is (name, file, old text, new text). The old text must be in the file exactly once, else the script fails: a bug
that cannot be planted any more would count as caught.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "slurm_rollout"
SEEDS = 1000
TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Mutant:
    name: str
    file: str  # below the package
    old: str
    new: str
    simulated: bool = True  # False: in code that the simulation models, so only real processes can show it


MUTANTS = (
    Mutant(
        "drop_the_fence",
        "core/group.py",
        "    if not busy and not sweeping:\n        return _fenced(ctx, g, out)",
        "    if not sweeping:\n        return _fenced(ctx, g, out)",
    ),
    Mutant(
        "skip_the_agents_fence",
        "agent.py",
        "    began = time.monotonic()\n    gpu = GpuMemory(step, inbox)\n",
        '    return reports.say("fenced", ended=[])\n    began = time.monotonic()\n    gpu = GpuMemory(step, inbox)\n',
        simulated=False,
    ),
    Mutant(
        "skip_the_verify",
        "core/group.py",
        "    proved = {e.rank for e in ctx.seen.endpoints if e.proved}\n",
        "    proved = {e.rank for e in ctx.seen.endpoints}\n",
    ),
    Mutant(
        "fence_by_ports_that_nobody_looked_at",
        "core/group.py",
        "    busy = ctx.seen.ports_open\n",
        "    busy = ctx.seen.ports_open or ()\n",
    ),
    Mutant(
        "forget_one_member",
        "core/group.py",
        "    living = _not_ended(ctx, g, ctx.seen.steps, out)\n",
        "    living = _not_ended(ctx, g, ctx.seen.steps[1:], out)\n",
    ),
    Mutant(
        "publish_before_verify",
        "core/pools.py",
        "    return g.phase is Phase.READY\n",
        "    return g.phase is Phase.READY or (g.phase is Phase.STARTING and g.go_sent_at is not None)\n",
    ),
    Mutant(
        "reuse_an_epoch",
        "core/barrier_rules.py",
        "epoch = run.epoch + ((alive, serving) != (run.alive, run.serving))",
        "epoch = run.epoch + (len(alive) + len(serving) > len(run.alive) + len(run.serving))",
    ),
    Mutant(
        "epoch_starts_over_at_a_takeover",
        "store.py",
        "        started_at=old.started_at or now,\n",
        "        started_at=old.started_at or now,\n        epoch=0,\n",
    ),
    Mutant(
        "ignore_the_term",
        "store.py",
        "            if entry == self._staging:\n",
        "            if entry == self._staging or number.isdigit():\n",
    ),
    Mutant(
        "believe_an_srun_exit",
        "core/group.py",
        "listing.asked_at <= step.exited_at:\n        return None\n",
        "listing.asked_at <= step.exited_at:\n        return True\n",
    ),
    Mutant(
        "believe_an_old_listing",
        "core/group.py",
        "    if step.exited_at is None or listing is None or listing.asked_at <= step.exited_at:\n",
        "    if step.exited_at is None or listing is None:\n",
    ),
    Mutant(
        "restart_a_saturated_engine",
        "core/health.py",
        "    return _fold_liveness_failure(after, result) if result.kind",
        "    return replace(after, failures=after.failures + 1) if result.kind",
    ),
    Mutant(
        "never_suspect_itself",
        "core/decide.py",
        "ask_agents=suspect",
        "ask_agents=False",
    ),
    Mutant(
        "charge_at_the_jobs_end",
        "core/group.py",
        "        charge=failure if charged else None,\n"
        "        goes_to=Phase.FAILED if spent else Phase.FENCING,\n"
        "        not_before=now + delay,\n"
        "        runtime_failures=runtime,\n"
        "        start_failures=start,\n",
        "        charge=None,\n"
        "        goes_to=Phase.FAILED if spent else Phase.FENCING,\n"
        "        not_before=now + delay,\n"
        "        runtime_failures=(*runtime, now) if charged and not failure.startup else runtime,\n"
        "        start_failures=(*start, now) if charged and failure.startup else start,\n",
    ),
    Mutant(
        "never_charge",
        "core/group.py",
        "    return replace(g, charge=None, runtime_failures=(*g.runtime_failures, g.charge.at))\n",
        "    return replace(g, charge=None)\n",
    ),
    Mutant(
        "short_window",
        "core/restart.py",
        "now - t < policy.window_s",
        "now - t < policy.window_s / 4",
    ),
    Mutant(
        "go_before_all_are_fenced",
        "core/group.py",
        "not all(s.fenced for s in steps)",
        "not any(s.fenced for s in steps)",
    ),
    Mutant(
        "go_is_said_once",
        "core/group.py",
        "    if deaf and now >= g.go_sent_at + 1.0:\n",
        "    if not g and now >= g.go_sent_at + 1.0:\n",
    ),
    Mutant(
        "reuse_an_incarnation",
        "core/group.py",
        "        incarnation=g.incarnation + 1,\n",
        "        incarnation=max(1, g.incarnation),\n",
    ),
    Mutant(
        "never_cancel",
        "core/group.py",
        "        out.actions.append(Cancel(group=g.id, incarnation=g.incarnation, nodes=nodes))\n",
        "",
    ),
    Mutant(
        "stay_unready",
        "core/group.py",
        "    if g.phase is Phase.UNREADY and answering",
        "    if g.phase is Phase.READY and answering",
    ),
    Mutant(
        "a_dead_pool_waits",
        "core/pools.py",
        "    if possible < pool.min_ready:\n",
        "    if possible < 0:\n",
    ),
    Mutant(
        "a_takeover_starts_over",
        "store.py",
        "    if not same:\n        groups =",
        "    if same:\n        groups =",
    ),
    Mutant(
        "launch_while_the_run_ends",
        "core/decide.py",
        "        if run.ending:\n            g = _end_group(ctx, run, g)\n",
        "",
    ),
    Mutant(
        "reader_believes_a_late_writer",
        "barrier.py",
        "            if (state.term, state.seq) < (last.term, last.seq) or state.epoch < last.epoch:\n",
        "            if state.term < 0:\n",
    ),
    Mutant(
        "forget_a_failure_over_a_takeover",
        "core/failures.py",
        "        if step.process is not Process.RUNNING and step.exited_at is not None:\n",
        "        if step.process is not Process.RUNNING and step.exit_code is not None:\n",
    ),
    # ------------------------------------------------------------------------------------------- the trainer's side
    Mutant(
        "believe_an_ack_of_an_old_incarnation",
        "core/clients.py",
        "            if g.incarnation == named[g.id] and g.phase in ALIVE:\n",
        "            if g.phase in ALIVE:\n",
    ),
    Mutant(
        "an_incarnation_inherits_its_weights",
        "core/group.py",
        "        weights_version=None,\n",
        "",
    ),
    Mutant(
        "serve_a_stale_group",
        "core/pools.py",
        """    return is_alive(g) and weights(pool, run, g) != "stale"\n""",
        "    return is_alive(g)\n",
    ),
    Mutant(
        "a_version_falls_without_rollback",
        "core/clients.py",
        "        if target is not None and ack.version < target and not ack.rollback:\n",
        "        if target is not None and ack.version < 0 and not ack.rollback:\n",
    ),
    Mutant(
        "a_number_stands_for_two_weights",
        "core/clients.py",
        "    versions = dict.fromkeys(void) | dict.fromkeys(taken, ack.version)\n",
        "    versions = dict.fromkeys(taken, ack.version)\n",
    ),
    Mutant(
        "forget_acks_at_a_takeover",
        "store.py",
        "ClientState(id=c.id, seq=c.echo, echo=c.echo, acks=c.acks)",
        "ClientState(id=c.id, seq=c.echo, echo=c.echo)",
    ),
    Mutant(
        "forget_versions_at_a_takeover",
        "store.py",
        "clients=clients, paused=()\n",
        "clients=clients, paused=(), targets={}\n",
    ),
    Mutant(
        "ignore_a_hold",
        "core/clients.py",
        "            if client.hold_s:\n                return ",
        "            if client.hold_s < 0:\n                return ",
    ),
    Mutant(
        "grant_a_hold_while_a_group_starts",
        "core/clients.py",
        "    hold = client.hold or (client.hold_s > 0 and not any(p.heeds_holds for p in starting))\n",
        "    hold = client.hold or client.hold_s > 0\n",
    ),
    Mutant(
        "a_hold_never_expires",
        "core/clients.py",
        "    if client.hold_s and now >= client.heard_at + client.hold_s:\n",
        "    if client.hold_s and now < client.heard_at:\n",
    ),
    Mutant(
        "start_while_the_trainer_trains",
        "core/clients.py",
        "    permitted = TRAINING not in phases and (SYNCING in phases or short)\n",
        "    permitted = SYNCING in phases or short\n",
    ),
    Mutant(
        "echo_training_while_an_engine_loads",
        "core/clients.py",
        "    if client.phase == TRAINING and any(",
        "    if not client.phase and any(",
    ),
    Mutant(
        "a_wait_never_ends",
        "core/clients.py",
        "    if client.waiting_s and now >= client.heard_at + client.waiting_s:\n",
        "    if client.waiting_s and now < client.heard_at:\n",
    ),
    Mutant(
        "echo_before_probes_are_drained",
        "core/clients.py",
        "    if loud := tuple(_loud(plan, run, obs, client)):\n",
        "    if loud := ():\n",
    ),
    Mutant(
        "probe_while_paused",
        "core/clients.py",
        "            paused.append(pool.name)\n",
        "            pass\n",
    ),
    Mutant(
        "the_prober_never_rests",
        "probes.py",
        "            if key.group in self._paused:\n                start_at =",
        "            if key.group in ():\n                start_at =",
        simulated=False,
    ),
    Mutant(
        "tell_only_who_is_gone",
        "core/barrier_rules.py",
        "    moved = {group for group, _ in set(alive) ^ set(run.alive)}\n",
        "    moved = {group for group, _ in set(run.alive) - set(alive)}\n",
    ),
    Mutant(
        "a_client_counts_from_one_again",
        "barrier.py",
        """        seq = 1 + max(self._seq, self._written_seq(), self._echo(last, "seq"))\n""",
        "        seq = 1 + max(self._seq, self._written_seq())\n",
    ),
    # ----------------------------------------------------------------------------------------------- nodes and places
    Mutant(
        "meet_where_an_old_rank_may_meet",
        "core/moves.py",
        """    if left:\n        old.append(f"{group.master_address}:{group.master_port}")\n""",
        "",
    ),
    Mutant(
        "give_up_one_of_several_silent_nodes",
        "core/nodes.py",
        "        return (Exclusion.LOST, silent) if _others_answer(plan, run, obs, name) else None\n",
        "        return Exclusion.LOST, silent\n",
    ),
    Mutant(
        "move_before_the_node_is_lost",
        "core/group.py",
        "        if ended(ctx, g, step) is True or step.node in ctx.lost:\n",
        "        if ended(ctx, g, step) is True or step.node in ctx.excluded:\n",
    ),
    Mutant(
        "use_a_node_again_on_which_a_step_lives",
        "core/nodes.py",
        "            if node.name in answering and node.name not in left_on and up:\n",
        "            if node.name in answering and up:\n",
    ),
    Mutant(
        "charge_a_lost_node",
        "core/group.py",
        "        charge=None,\n        goes_to=Phase.FENCING,\n        reason=Reason.NODE_LOST,\n",
        "        goes_to=Phase.FENCING,\n        reason=Reason.NODE_LOST,\n",
    ),
    Mutant(
        "forget_a_lost_step",
        "core/decide.py",
        "        lost_steps += out.lost_steps\n",
        "",
    ),
    Mutant(
        "forget_lost_steps_at_a_takeover",
        "store.py",
        "    groups = [g if g.since else replace(g, since=now",
        "    old = replace(old, lost_steps=())\n    groups = [g if g.since else replace(g, since=now",
    ),
    Mutant(
        "never_cancel_what_was_left",
        "core/nodes.py",
        "        wants.cancel = CancelLost(steps=tuple(again))\n",
        "        pass\n",
    ),
    Mutant(
        "use_a_drained_node_again",
        "core/nodes.py",
        "                if node.drained:\n",
        "                if not node:\n",
    ),
    Mutant(
        "burn_a_spare_for_what_slurm_refuses",
        "core/group.py",
        "    if charged and failure.node and failure.kind in (FailureClass.STARTUP, FailureClass.NODE):\n",
        "    if charged and failure.node:\n",
    ),
    Mutant(
        "two_groups_take_one_spare",
        "core/moves.py",
        "        now = _without_waiting(placed(plan, run), run, g.id)\n        away =",
        "        now = replace(plan, pools=tuple(\n"
        "            replace(p, groups=tuple(placed(plan, run).group(g.id) if h.id == g.id else h for h in p.groups))\n"
        "            for p in plan.pools\n"
        "        ))\n        away =",
    ),
    Mutant(
        "take_ports_that_another_group_has",
        "core/moves.py",
        "            if other.id != g.id or m.rank in stays:\n",
        "            if other.id == g.id and m.rank in stays:\n",
    ),
    Mutant(
        "say_where_it_was",
        "journal.py",
        "        plan = moves.placed(self._plan, state)\n        self._store.write_barrier(",
        "        plan = self._plan\n        self._store.write_barrier(",
    ),
    Mutant(
        "believe_that_one_node_is_silent_while_all_are",
        "core/nodes.py",
        "    return bool(answering) and not any(n.silent_s for n in others)\n",
        "    return True\n",
    ),
    Mutant(
        "tell_no_agent_who_left_its_node",
        "steps.py",
        "if n and group not in here}",
        "if n < 0 and group not in here}",
    ),
    Mutant(
        "start_although_the_job_ends",
        "core/restart.py",
        "    if left_s >= takes_s + margin_s:\n",
        "    if left_s >= takes_s or left_s:\n",
    ),
    Mutant(
        "never_start_again_when_there_is_time",
        "core/group.py",
        "        if ctx.too_late:\n            return g\n        reason =",
        "        return g\n        reason =",
    ),
    Mutant(
        "wait_for_time_that_there_is",
        "core/restart.py",
        "min(measured), pool.restart.end_margin_s, max(",
        "3.0 * max(measured), pool.restart.end_margin_s, max(",
    ),
    Mutant(
        "keep_from_the_trainer_that_time_is_short",
        "core/pools.py",
        "    elif possible - late < pool.min_ready:\n",
        "    elif possible - late < 0:\n",
    ),
    Mutant(
        "charge_the_coordinators_silence",
        "core/failures.py",
        "            charged = reason is not Reason.SELF_FENCED\n",
        "            charged = True\n",
    ),
    Mutant(
        "launch_all_at_once",
        "steps.py",
        "            for step in queued[: max(0, room)]:\n",
        "            for step in queued[: max(99, room)]:\n",
    ),
    Mutant(
        "forget_what_waits_for_its_turn",
        "steps.py",
        "            if step.process is Process.QUEUED:\n                step.process, step.exited_at",
        "            if step.process is Process.RUNNING:\n                step.process, step.exited_at",
    ),
)


def plant(mutant: Mutant, folder: Path) -> None:
    """Make a copy of the package in `folder` that has the bug.

    Raises:
        SystemExit: the old text is not in the file exactly once.
    """
    shutil.copytree(ROOT / PACKAGE, folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / PACKAGE / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.name}: the text is {text.count(mutant.old)} times in {mutant.file}, not once")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")


def run(argv: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python on the copy in `folder`."""
    environ = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *argv], cwd=folder, env=environ, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def by_simulation(folder: Path, seeds: int) -> tuple[bool, str]:
    """Tell whether the simulation catches the bug, and after how many seeds."""
    done = run(["-m", f"{PACKAGE}.simulation.soak", "--until-failure", f"--seeds={seeds}"], folder)
    try:
        said = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return True, f"    1  it cannot even run: {done.stderr.strip().splitlines()[-1:]}"
    if said["number"] is None:
        return False, f"> {seeds}  NOT CAUGHT"
    return True, f"{said['seeds']:5}  {said['broken'].splitlines()[0][:100]}"


def by_pytest(folder: Path, files: Sequence[str], expression: str) -> tuple[bool, str]:
    """Tell whether tests catch the bug, and which."""
    paths = [str(ROOT / file) for file in files]
    # The repository's root stays behind the copy on the path, in the tests' own process, too.
    options = ["-q", "--no-header", "-p", "no:cacheprovider", f"--rootdir={ROOT}", "-o", "pythonpath=", "-n", "2"]
    done = run(["-m", "pytest", *options, "-k", expression, "--maxfail=2", *paths], folder)
    failed = [line.partition(" - ")[0] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode in (1, 2), "\n    ".join(failed or [f"exit code {done.returncode}: NOT CAUGHT"])


def main(argv: Sequence[str] | None = None) -> int:
    """Return 1 when a bug is not caught."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="bugs (default: all)")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="seeds after which the simulation gives up")
    parser.add_argument("--pytest", nargs="+", metavar="FILE", help="let these test files look instead")
    parser.add_argument("--only", default="", metavar="EXPRESSION", help="of those, the tests that this names (-k)")
    args = parser.parse_args(argv)
    able = [m for m in MUTANTS if m.simulated or args.pytest]
    chosen = [m for m in able if not args.names or m.name in args.names]
    missed = []
    print(f"{'BUG':38} {'SEEDS' if not args.pytest else 'TEST':>5}  CAUGHT BY", flush=True)
    for mutant in chosen:
        with tempfile.TemporaryDirectory(prefix="rollout-mutant-") as made:
            folder, began = Path(made), time.monotonic()
            plant(mutant, folder)
            caught, how = (
                by_pytest(folder, args.pytest, args.only) if args.pytest else by_simulation(folder, args.seeds)
            )
            print(f"{mutant.name:38} {how}  ({time.monotonic() - began:.0f} s)", flush=True)
            if not caught:
                missed.append(mutant.name)
    print(f"{len(chosen) - len(missed)} of {len(chosen)} caught" + (f"; missed: {', '.join(missed)}" if missed else ""))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
