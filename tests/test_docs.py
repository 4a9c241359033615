"""The documents say what the code does, where that can be compared."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from slurm_rollout import agent, barrier, cli
from slurm_rollout.barrier import Barrier
from slurm_rollout.core.barrier_rules import barrier_document
from slurm_rollout.core.failure_classes import FailureClass
from slurm_rollout.core.history import UNSEEN
from slurm_rollout.core.model import EVENT_TYPES
from slurm_rollout.core.phases import Phase, PoolPhase, Reason, diagram
from slurm_rollout.core.placeholders import PLACEHOLDERS
from slurm_rollout.spec_models import Spec, Table
from slurm_rollout.testing.world import World, make_plan

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SPEC = (ROOT / "docs/spec.md").read_text(encoding="utf-8")
TROUBLES = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------- spec file


def tables(model: type[Table] = Spec, path: str = "") -> Iterator[tuple[str, type[Table]]]:
    """Yield the heading of every table of a spec file that has keys, and its model; pools' own defaults only once."""
    if keys(model):
        yield f"`{path}`" if path else "Top level", model
    below = []
    for name, field in model.model_fields.items():
        inner = inner_table(field.annotation)
        if inner is None or (path == "[[pool]]" and name in Spec.model_fields and name != "env"):
            continue
        if name == "pool":
            below.append((inner, "[[pool]]"))
        elif name == "env":
            below.append((inner, "[env.NAME]"))
        else:
            below.append((inner, f"[{'.'.join([*re.findall(r'[a-z_]+', path), name])}]"))
    for inner, inner_path in below:
        yield from tables(inner, inner_path)


def inner_table(annotation: Any) -> type[Table] | None:
    """Return the table that a key holds, also one among others (`[[pool]]`) or one that may be missing."""
    if isinstance(annotation, type) and issubclass(annotation, Table):
        return annotation
    return next(filter(None, map(inner_table, get_args(annotation))), None)


def keys(model: type[Table]) -> dict[str, str]:
    """Return the keys of a table that are no tables themselves, each with what its default cell must hold."""
    found = {}
    for name, field in model.model_fields.items():
        if inner_table(field.annotation):
            continue
        if field.is_required():
            found[name] = "required"
        elif field.default is None:
            found[name] = "unset"
        else:
            value = field.default
            found[name] = f"`{value:.15g}`" if isinstance(value, float) else f"`{json.dumps(value)}`"
    return found


def documented() -> dict[str, dict[str, str]]:
    """Return the sections of docs/spec.md that have a table of keys: heading to key to default cell."""
    sections = {}
    for section in re.split(r"^## ", SPEC, flags=re.MULTILINE)[1:]:
        heading, _, body = section.partition("\n")
        _, _, table = body.partition("| key | default | meaning |\n")
        rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| \S.* \|$", table, re.MULTILINE)
        sections[heading.strip()] = dict(rows)
    return sections


@pytest.mark.parametrize(("heading", "model"), list(tables()), ids=lambda v: v if isinstance(v, str) else "")
def test_every_key_of_the_spec_is_described_with_its_default(heading: str, model: type[Table]) -> None:
    assert documented().get(heading) == keys(model)


def test_no_table_is_described_that_a_spec_does_not_have() -> None:
    assert list(documented()) == [heading for heading, _ in tables()]


def test_every_placeholder_is_described() -> None:
    for name in PLACEHOLDERS:
        assert f"`{{{name}}}`" in SPEC


# ------------------------------------------------------------------------------------------------------------- barrier


def test_the_barrier_file_is_described_as_it_is_written(tmp_path: Path) -> None:
    text = (ROOT / "docs/barrier.md").read_text(encoding="utf-8")
    example = text.partition("```json\n")[2].partition("```")[0]
    shown = json.loads(example)
    world = World(make_plan())
    written: dict[str, Any] = barrier_document(world.plan, world.state, now=0.0, seq=1)
    assert list(shown) == list(written)
    for part in ("pools", "groups"):
        assert list(shown[part][0]) == list(written[part][0])
    for name in (*written, *written["pools"][0], *written["groups"][0]):
        assert re.search(rf"^\|.*[`.]{name}[`\[]", text, re.MULTILINE), name
    for phase in PoolPhase:
        assert f"| `{phase}` |" in text
    path = tmp_path / "barrier.json"
    path.write_text(example, encoding="utf-8")
    assert Barrier(path, job="").current().urls == ("http://n4:18000",)


# ---------------------------------------------------------------------------------------------------------- all of them


def test_the_diagram_of_the_phases_is_the_one_that_the_table_of_transitions_gives() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    assert f"```mermaid\n{diagram()}\n```" in text


def test_the_readme_lists_every_command() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for kind in cli.COMMANDS.values():
        for name in kind:
            assert re.search(rf"^\| `{name}\b", text, re.MULTILINE), name


def test_the_tests_of_the_invariants_are_there() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+\.py)`", text))
    assert named
    assert sorted(name for name in named if not (ROOT / "tests" / name).exists()) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file_of_the_repository(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_into_a_document_leads_to_a_heading(document: Path) -> None:
    for file, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", document.read_text(encoding="utf-8")):
        text = (document.parent / file if file else document).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, anchor


# ------------------------------------------------------------------------------------------------------ troubleshooting

ENTRIES = {
    "a_killed_member_brings_its_whole_group_back_and_no_other": "A member crashed",
    "two_members_of_a_group_that_die_at_once_are_one_failure": "A member crashed",
    "two_groups_that_die_at_once_recover_in_parallel": "A member crashed",
    "all_members_that_die_while_the_job_ends_cause_no_restart_and_no_charge": "The job is ending",
    "a_group_that_fails_too_late_is_left_down_and_the_trainer_is_told": "Too little time left",
    "a_start_that_crashes_until_the_budget_is_spent_fails_its_group_and_disturbs_no_other": (
        "A start that crashes until the budget is spent"
    ),
    "a_pool_that_cannot_be_ready_any_more_is_failed_and_a_waiting_trainer_is_told": "The fleet failed",
    "a_pool_below_its_quorum_waits_and_is_ready_again_when_the_group_is_back": "From `status` to the section",
    "a_stopped_process_is_a_hang_and_is_ended_and_replaced": "A group hangs",
    "what_a_hung_group_was_doing_is_written_down_and_its_stopped_member_named": "A group hangs",
    "a_single_group_that_hangs_is_believed_when_its_own_agents_see_it_too": "Most groups time out at once",
    "generation_dead_behind_a_good_health_page_is_found": "Generation is dead behind a good health page",
    "an_engine_that_listens_before_it_can_serve_is_not_offered_until_it_can": "A start takes too long",
    "an_engine_with_wrong_answers_leaves_the_barrier_and_is_then_replaced": "Wrong answers",
    "a_member_that_ignores_term_is_killed_after_its_grace": "The job is ending",
    "every_engine_saturated_with_a_rising_counter_is_left_alone": "Late answers",
    "a_minute_of_prefill_and_a_minute_under_load_end_no_engine": "A long prefill without a counter",
    "a_coordinator_that_is_cut_off_for_a_minute_ends_no_engine": "Most groups time out at once",
    "slow_answers_within_the_time_out_are_answers": "Late answers",
    "a_start_that_takes_longer_than_a_hang_is_no_hang": "A start takes too long",
    "restart_replaces_one_group_and_charges_nobody": "Drained, stopped, restarted by people",
    "a_drained_group_stays_down_until_it_is_resumed": "Drained, stopped, restarted by people",
    "a_failed_group_is_given_a_fresh_budget_by_resume": "A start that crashes until the budget is spent",
    "stop_ends_every_group_and_then_the_run": "Drained, stopped, restarted by people",
    "a_port_that_a_stranger_holds_is_waited_for_named_and_never_taken_by_force": "A port is held",
    "a_port_that_a_stranger_gives_back_in_time_lets_the_group_start": "A port is held",
    "a_stranger_that_answers_200_in_place_of_our_engine_is_not_our_engine": "A stranger answers on our port",
    "an_orphan_that_holds_a_port_without_a_mark_is_ended_before_the_next_start": "A leftover process",
    "a_child_that_left_its_engines_session_is_ended_with_it": "A leftover process",
    "a_coordinator_killed_at_any_moment_is_replaced_and_nothing_is_started_twice": "The coordinator was replaced",
    "a_failure_that_happens_while_no_coordinator_lives_is_not_forgotten": "The coordinator was replaced",
    "a_coordinator_that_was_stopped_for_a_while_blames_no_engine": "No heartbeat",
    "engines_without_a_coordinator_are_ended_and_the_next_one_starts_them_again": (
        "Agents ended their engines by themselves"
    ),
    "the_engines_of_a_node_that_is_cut_off_end_while_it_is": "Agents ended their engines by themselves",
    "while_the_run_directory_cannot_be_written_nothing_is_started_and_all_goes_on_after_it": (
        "The run directory cannot be written"
    ),
    "term_in_any_phase_drains_and_leaves_no_process": "The job is ending",
    "term_before_the_coordinator_can_take_a_signal_drains_all_the_same": "The job is ending",
    "a_restarted_group_serves_only_after_its_weights_were_acknowledged": "A group is stale",
    "an_acknowledgement_of_a_group_that_restarted_meanwhile_is_not_believed": "A group is stale",
    "sleeping_engines_are_asked_nothing_and_a_dead_one_waits_for_the_trainer": (
        "The trainer keeps a group from starting"
    ),
    "a_trainer_that_waits_permits_the_start_that_it_waits_for": "The trainer keeps a group from starting",
    "nothing_starts_under_a_hold_and_one_whose_client_is_gone_expires": "The trainer keeps a group from starting",
    "a_hold_waits_for_the_start_in_progress": "The trainer keeps a group from starting",
    "a_group_whose_node_is_lost_moves_to_the_spare_at_no_cost": "A node is lost",
    "the_only_group_needs_no_verdict_of_slurm_when_its_node_alone_is_silent": "A node is lost",
    "without_a_spare_a_group_waits_and_starts_by_itself_when_its_node_is_back": "No node is left",
    "a_drained_node_loses_its_group_to_the_spare_and_is_taken_back": "Drained, stopped, restarted by people",
    "a_full_disk_is_charged_to_nobody_and_tried_again_ever_later": "A disk is full",
    "a_signal_is_an_engine_crash_and_costs_one_restart": "A member crashed",
    "an_engine_that_ends_before_it_is_ready_costs_one_start_failure": "A start that crashes until the budget is spent",
    "a_restart_that_a_person_asks_for_is_of_the_operators_class": "Drained, stopped, restarted by people",
    "a_step_that_slurm_refuses_costs_a_start_failure_and_waits_first": "Slurm refuses a step",
    "a_controller_that_is_away_in_any_phase_costs_only_time": "Slurm does not answer",
    "a_controller_that_goes_away_between_launch_and_go_keeps_no_group_from_its_start": "Slurm does not answer",
    "a_run_that_is_stopped_while_the_controller_is_away_ends_its_engines_at_once": "Slurm does not answer",
    "a_scancel_that_has_no_effect_is_given_up_repeated_and_never_run_twice_at_once": "A process that cannot be killed",
    "steps_that_stay_completing_delay_no_recovery": "A process that cannot be killed",
    "a_step_that_stays_completing_without_a_word_of_its_agent_is_waited_for": "A process that cannot be killed",
    "step_creation_that_is_disabled_for_a_while_is_waited_for_and_said": "Step creation is disabled",
    "an_scontrol_that_does_not_answer_is_asked_less_and_less_often": "Slurm does not answer",
    "a_slurm_that_answers_again_is_seen_to_long_before_the_next_audit": "Slurm does not answer",
    "no_more_sruns_than_may_be_wait_for_their_steps_at_once": "A start takes its turn",
    "a_process_that_does_not_die_holds_its_group_back_and_is_told_until_it_does": "A process that cannot be killed",
    "a_wall_clock_that_jumps_by_hours_changes_nothing": "The clock was set",
    "a_step_that_slurm_lost_while_it_lives_on_is_fenced_by_its_port": "A port is held",
}
"""Test of the scenarios, without `test_`: the entry in docs/troubleshooting.md for the failure that it does."""


def row_of(name: str) -> bool:
    """Tell whether a row of a table in docs/troubleshooting.md begins with this name, alone or among others."""
    return bool(re.search(rf"^\|[^|]*`{re.escape(name)}`[^|]*\|", TROUBLES, re.MULTILINE))


def test_every_scenario_has_an_entry() -> None:
    found: list[str] = []
    for path in (ROOT / "tests/scenarios").glob("test_*.py"):
        found += re.findall(r"^def test_(\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(found) == sorted(ENTRIES)
    headings = re.findall(r"^#+ (.+)$", TROUBLES, re.MULTILINE)
    assert sorted({entry for entry in ENTRIES.values() if entry not in headings}) == []


@pytest.mark.parametrize("reason", [*(r for r in Reason if r), UNSEEN])
def test_every_reason_leads_to_an_entry(reason: str) -> None:
    assert row_of(reason)


@pytest.mark.parametrize("kind", FailureClass)
def test_every_class_of_failures_is_explained(kind: str) -> None:
    assert row_of(kind)


@pytest.mark.parametrize("phase", list(dict.fromkeys([*map(str, Phase), *map(str, PoolPhase)])))
def test_every_phase_leads_to_an_entry(phase: str) -> None:
    assert row_of(phase)


def emitted() -> set[str]:
    """Return the types of events that the code emits: the literals where an event is made."""
    found: set[str] = set()
    for path in (ROOT / "slurm_rollout").rglob("*.py"):
        if {"testing", "simulation"} & {*path.parts}:
            continue
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
                continue
            kinds = [k.value for k in call.keywords if k.arg == "type" and call.func.id == "Event"]
            kinds += call.args[1:2] if call.func.id in ("event", "_answer") else []
            for kind in kinds:
                branches = [kind.body, kind.orelse] if isinstance(kind, ast.IfExp) else [kind]
                found |= {b.value for b in branches if isinstance(b, ast.Constant) and isinstance(b.value, str)}
    return found


def test_every_event_that_is_emitted_is_explained() -> None:
    types = emitted()
    assert types == set(EVENT_TYPES), "what a user may name in on_event.types"
    assert sorted(kind for kind in types if not row_of(kind)) == []


def test_every_exception_of_the_trainers_client_is_explained() -> None:
    for name in barrier.__all__:
        known = getattr(barrier, name)
        if issubclass(known, Exception):
            assert row_of(name), name


def exit_codes(text: str) -> set[int]:
    """Return the exit codes that a text names after "exit codes:", up to the end of the paragraph."""
    told = "".join(re.findall(r"[Ee]xit codes:(.*?)(?:\n\n|\Z)", text, re.DOTALL))
    told = re.sub(r"128 \+ n|\d+ s\b", "", told)  # no code; a time
    return {int(code) for code in re.findall(r"(?<![-\w.])\d+\b", told)}


def test_every_exit_code_that_is_documented_elsewhere_is_explained() -> None:
    rows = re.findall(r"^\| ([^|]+) \| ([\d, ]+) \|", TROUBLES, re.MULTILINE)
    explained: dict[str, set[int]] = {}
    for who, codes in rows:
        explained.setdefault(who.strip(" `"), set()).update(map(int, codes.split(",")))
    everywhere = explained["all"]
    for name in commands():
        parser = parser_of(name)
        told = exit_codes(parser.format_help())
        assert told <= everywhere | explained.get(name, set()), name
    told = exit_codes((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {0, 3, 4, 70, 124, 126, 127} <= told, "the search finds them"
    assert told <= set().union(*explained.values())
    assert {code for code in agent.STATUS.values() if code} == explained["a step, in `sacct"]


# ------------------------------------------------------------------------------------------------- commands as printed


def commands() -> dict[str, str]:
    """Return every command and the module that has it."""
    return {name: module for kind in cli.COMMANDS.values() for name, (module, _) in kind.items()}


def parser_of(name: str) -> argparse.ArgumentParser:
    choices = argparse.ArgumentParser().add_subparsers()
    importlib.import_module(f"slurm_rollout.cli.{commands()[name]}").add_parser(choices)
    found = choices.choices[name]
    assert isinstance(found, argparse.ArgumentParser)
    return found


def printed() -> Iterator[tuple[str, str]]:
    """Yield (document, command line) of every call of ours in a console block."""
    for document in DOCUMENTS:
        for block in re.findall(
            r"^```console\n(.*?)^```", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
        ):
            for line in re.findall(r"^\$ (?:exec )?(slurm-rollout .*)$", block, re.MULTILINE):
                yield str(document.relative_to(ROOT)), line


@pytest.mark.parametrize(("document", "line"), sorted(set(printed())))
def test_every_command_line_of_a_console_block_is_understood(
    document: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *argv = shlex.split(line, comments=True)[1:]
    parser = parser_of(name)
    parser.allow_abbrev = False
    try:
        parser.parse_args(argv[: argv.index("--")] if "--" in argv else argv)
    except SystemExit:
        pytest.fail(f"{document}: {line}: {capsys.readouterr().err}")
