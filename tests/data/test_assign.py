"""Groups and the sides of a split: a group stands on one side in all tasks."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bora_pyro.data.assign import assign_groups, task_generator

FRACTIONS = (0.6, 0.2, 0.2)
SIDES = ("train", "validation", "test")


def assigned_alone(documents, fractions, generator):
    """The rule for a task that shares no group, written once more."""
    groups = sorted(documents)
    target = dict(zip(SIDES, (fraction * sum(documents.values()) for fraction in fractions), strict=True))
    filled, sides = Counter(), {}
    for position in generator.permutation(len(groups)):
        open_sides = [side for side in ("train", "test", "validation") if target[side] > 0]
        side = max(open_sides, key=lambda side: 1 - filled[side] / target[side])
        filled[side] += documents[groups[position]]
        sides[groups[position]] = side
    return sides


sizes = st.integers(1, 9)
own_groups = st.dictionaries(st.text("ab", min_size=1, max_size=3), sizes, min_size=1, max_size=12)
#: Tasks that share many groups.
tasks = st.dictionaries(st.sampled_from("ABCDEFG"), own_groups, min_size=1, max_size=7)


@given(tasks, st.sampled_from([FRACTIONS, (0.5, 0, 0.5), (0.1, 0.8, 0.1), (1, 0, 0)]), st.integers(0, 3))
@settings(max_examples=300, deadline=None)
def test_a_group_is_on_one_side_everywhere_and_every_task_trains(documents, fractions, seed):
    sides = assign_groups(documents, fractions, seed=seed)
    assert {task: set(groups) for task, groups in sides.items()} == {task: set(groups) for task, groups in documents.items()}
    of_group = {}
    for groups in sides.values():
        for group, side in groups.items():
            assert of_group.setdefault(group, side) == side
        assert "train" in groups.values()
    assert all(fractions[SIDES.index(side)] > 0 for side in of_group.values())
    # neither the order of the tasks nor that of the groups has an influence
    shuffled = [(task, random.Random(0).sample([*groups.items()], len(groups))) for task, groups in documents.items()][::-1]
    assert assign_groups({task: dict(groups) for task, groups in shuffled}, fractions, seed=seed) == sides


@given(tasks, st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_a_task_of_own_groups_is_split_alone(documents, seed):
    own = {task: {f"{task} {group}": number for group, number in groups.items()} for task, groups in documents.items()}
    expected = {task: assigned_alone(groups, FRACTIONS, task_generator(seed, task)) for task, groups in own.items()}
    assert assign_groups(own, FRACTIONS, seed=seed) == expected
    # tasks that share groups with each other change nothing
    both = {"X": {"one": 3, "two": 1}, "Y": {"one": 1, "three": 2}}
    found = assign_groups(own | both, FRACTIONS, seed=seed)
    assert {task: found[task] for task in own} == expected


@pytest.mark.parametrize("seed", range(3))
def test_shares_are_met_where_chapters_have_many_speakers(seed):
    draw = random.Random(0)
    documents = {
        f"speaker {d}": {f"chapter {n}": draw.randint(1, 8) for n in range(234) if draw.random() < 0.9 / (1 + 0.3 * d)}
        for d in range(20)
    }
    sides = assign_groups(documents, FRACTIONS, seed=seed)
    for task, groups in documents.items():
        counts = Counter()
        for group, number in groups.items():
            counts[sides[task][group]] += number
        shares = [counts[side] / sum(groups.values()) for side in SIDES]
        assert shares == pytest.approx(FRACTIONS, abs=0.07)


def test_own_groups_fill_what_shared_ones_left():
    """The shared groups hold half of each task; its own groups bring each side to its share."""
    documents = {task: {f"shared {n}": 1 for n in range(10)} | {f"{task} {n}": 1 for n in range(10)} for task in "ab"}
    for seed in range(5):
        for groups in assign_groups(documents, FRACTIONS, seed=seed).values():
            assert Counter(groups.values()) == {"train": 12, "validation": 4, "test": 4}
