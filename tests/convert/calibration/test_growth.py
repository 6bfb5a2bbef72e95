"""How much maxima still grow over the last prompts."""

import pytest

from omni_convert.convert.calibration.growth import growth_of, growth_report


@pytest.mark.parametrize(
    ("maxima", "prompts", "expected"),
    [
        ({0: 1.0, 1: 2.0, 2: 1.0, 3: 3.0}, 4, 0.5),
        ({0: 1.0, 1: 4.0, 2: 1.0, 3: 3.0}, 4, 0.0),
        ({0: 2.0, 5: 2.0, 6: 2.5, 7: 3.0}, 8, 0.5),
        ({0: 2.0, 5: 9.0, 6: 2.5}, 7, 0.0),  # 7 // 4 = 1: only the last prompt, in which the layer did not run
        ({0: 1.0, 2: 5.0}, 3, None),
        ({3: 5.0}, 4, None),
    ],
)
def test_growth_is_that_over_the_last_quarter(maxima: dict[int, float], prompts: int, expected: float | None) -> None:
    assert growth_of(maxima, prompts) == expected


def test_the_report_names_the_layers_that_grow_most() -> None:
    growth = {f"transformer.{place}": place / 100 for place in range(11)}
    first, *layers = growth_report(growth)
    assert first == (
        "over the last quarter of the prompts, the largest input of 10 of 11 layers grew: median of all 5.0%, "
        "most 10.0%; more prompts make static scales safer"
    )
    assert layers[0] == "transformer.10: largest input grew by 10.0%"
    assert len(layers) == 3
    assert list(growth_report({})) == []
