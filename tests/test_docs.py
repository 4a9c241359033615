"""The documents say what the code does, where that can be compared."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from slurm_rollout import cli
from slurm_rollout.barrier import Barrier
from slurm_rollout.core.barrier_rules import barrier_document
from slurm_rollout.core.phases import PoolPhase, diagram
from slurm_rollout.engines.command import PLACEHOLDERS
from slurm_rollout.spec_models import Spec, Table
from slurm_rollout.testing.world import World, make_plan

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SPEC = (ROOT / "docs/spec.md").read_text(encoding="utf-8")


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
    written: dict[str, Any] = barrier_document(world.plan, world.state, now=0.0, seq=1, clients={})
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
