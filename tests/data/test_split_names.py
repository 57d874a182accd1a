"""Names that stand for the sides of a split."""

import pytest

from bora_pyro.data.split_names import find_split, split_name
from bora_pyro.errors import InputError


@pytest.mark.parametrize(
    ("side", "names"),
    [
        ("train", ["train", "Training", " TRN\t"]),
        ("validation", ["validation", "VALID", "val", "validate", "dev", "devel", "Development", " eval ", "evaluation"]),
        ("test", ["test", "Testing", "tst"]),
    ],
)
def test_usual_names_stand_for_their_side(side, names):
    assert {split_name(name, "row 1") for name in names} == {find_split(name) for name in names} == {side}


@pytest.mark.parametrize("cell", ["", "tarin", "tests", "train/test", "0", 1, None, float("nan"), True, ["train"], "x" * 5000])
def test_other_names_are_refused_in_a_short_line(cell):
    with pytest.raises(
        InputError, match=r"^row 3: column 'part' is .*; allowed: train, validation, test \(also as training,"
    ) as error:
        split_name(cell, "row 3: column 'part'")
    assert len(str(error.value)) < 300
    assert not isinstance(cell, str) or find_split(cell) is None


def test_the_nearest_name_is_offered():
    with pytest.raises(InputError, match="did you mean 'training'"):
        split_name("trainning", "row 3")
