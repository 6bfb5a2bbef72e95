"""Steps and layers are named as users of serving engines name them."""

import pytest

from omni_convert.formats.errors import RecipeError
from omni_convert.loaders.attention.index_ranges import IndexRanges


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("0-9,20,25-30", {*range(10), 20, *range(25, 31)}),
        (" 1 , 3 - 4 ", {1, 3, 4}),
        ([0, "2-3", 5], {0, 2, 3, 5}),
        (range(2), {0, 1}),
        (None, set()),
        ([], set()),
    ],
)
def test_numbers_and_ranges_with_both_ends(spec, expected):
    selector = IndexRanges.parse(spec, "skip_layers")
    assert {number for number in range(-1, 100) if number in selector} == expected
    assert bool(selector) == bool(expected)


def test_it_is_printed_as_it_is_written():
    assert str(IndexRanges.parse(" 0-9,20, 25-30", "skip_layers")) == "0-9,20,25-30"


@pytest.mark.parametrize(
    "spec", ["", "a", "1,,2", "5-2", "-1", "1-", [1.5], [-1], [True], b"1", 1.5, "0x1", "9" * 5000]
)
def test_anything_else_is_an_error_that_names_the_option(spec):
    with pytest.raises(RecipeError, match=r"^skip_steps: found .*expected numbers and ranges"):
        IndexRanges.parse(spec, "skip_steps")


def test_a_range_takes_no_memory_for_its_length():
    assert 999_999_998 in IndexRanges.parse("0-999999999", "skip_layers")
