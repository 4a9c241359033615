"""Hostlists: what Slurm writes is understood, what is wrong is said with its place, and folding loses nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm_rollout.core.hostlist import MAX_HOSTS, expand, fold


@pytest.mark.parametrize(
    ("hostlist", "names"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1 n2"),
        ("gpu[05-07,30],n1", "gpu05 gpu06 gpu07 gpu30 n1"),
        ("gpu[008-011]", "gpu008 gpu009 gpu010 gpu011"),
        ("gpu[9-11]", "gpu9 gpu10 gpu11"),
        ("gpu[98-101]", "gpu98 gpu99 gpu100 gpu101"),
        ("gpu[1,02,003]", "gpu1 gpu02 gpu003"),
        ("r[1-2]n[1-3]", "r1n1 r1n2 r1n3 r2n1 r2n2 r2n3"),
        ("a[1-2]-ib,b3-ib", "a1-ib a2-ib b3-ib"),
        ("[1-3]", "1 2 3"),
        ("n[3,1]", "n3 n1"),
        ("n1,n1", "n1 n1"),
    ],
)
def test_expand(hostlist: str, names: str) -> None:
    assert expand(hostlist) == tuple(names.split())


@pytest.mark.parametrize(
    ("hostlist", "character", "why"),
    [
        ("", 1, "a node name is missing"),
        ("n1,", 4, "a node name is missing"),
        ("n1,,n2", 4, "a node name is missing"),
        (",n1", 1, "a node name is missing"),
        ("n[1-2", 2, "'[' without its partner"),
        ("n1]", 3, "']' without its partner"),
        ("n[1-[2]]", 2, "'[' without its partner"),
        ("n1, n2", 4, "a space does not belong here"),
        ("n[]", 3, "'' is not a number or a range"),
        ("n[1,,2]", 5, "'' is not a number or a range"),
        ("n[1-2,x]", 7, "'x' is not a number or a range"),
        ("n[1-2-3]", 3, "'1-2-3' is not a number or a range"),
        ("n[٣]", 3, "is not a number or a range"),
        ("n[5-2]", 3, "the range 5-2 runs backwards"),
        ("n[0-65536]", 3, "more than 65536 numbers"),
        ("n[1-300]x[1-300]", 17, "more than 65536 names"),
    ],
)
def test_a_wrong_list_is_refused_at_its_place(hostlist: str, character: int, why: str) -> None:
    with pytest.raises(ValueError, match="is not a hostlist") as raised:
        expand(hostlist)
    assert f"at character {character}: " in str(raised.value)
    assert why in str(raised.value)


def test_the_largest_range_is_allowed() -> None:
    assert len(expand(f"n[1-{MAX_HOSTS}]")) == MAX_HOSTS


@pytest.mark.parametrize(
    ("names", "hostlist"),
    [
        ("", ""),
        ("n1", "n1"),
        ("login", "login"),
        ("login login", "login,login"),
        ("gpu05 gpu06 gpu07 gpu30 n1", "gpu[05-07,30],n1"),
        ("gpu08 gpu09 gpu10", "gpu[08-10]"),
        ("gpu9 gpu10", "gpu[9-10]"),
        ("gpu99 gpu100", "gpu[99-100]"),
        ("gpu099 gpu100", "gpu[099-100]"),
        ("gpu99 gpu0100", "gpu[99,0100]"),
        ("n3 n1 n2", "n[3,1-2]"),
        ("n1 a n2", "n1,a,n2"),
        ("r1n1 r1n2 r2n1", "r1n[1-2],r2n1"),
        ("a1-ib a2-ib", "a[1-2]-ib"),
    ],
)
def test_fold(names: str, hostlist: str) -> None:
    assert fold(names.split()) == hostlist


NAMES = st.from_regex(r"[a-z0-9._-]{0,5}[0-9]{0,4}[a-z-]{0,2}", fullmatch=True).filter(bool)
RUNS = st.builds(
    lambda prefix, start, count, width: [f"{prefix}{n:0{width}}" for n in range(start, start + count)],
    st.sampled_from(["gpu", "r1n", "node-a100-", ""]),
    st.integers(0, 1200),
    st.integers(1, 12),
    st.integers(1, 5),
)


@given(st.lists(st.one_of(NAMES.map(lambda n: [n]), RUNS), min_size=1))
def test_fold_then_expand_gives_the_same_names(runs: list[list[str]]) -> None:
    names = tuple(name for run in runs for name in run)
    assert expand(fold(names)) == names
