"""How fast formats run: the peak rates of tensor cores over BF16's, by bits of the operands.

Hardware makers state these ratios for dense products (Hopper: 8 bits; Blackwell: 8 and 4 bits). They were not measured
here. A format whose runtime leaves the inputs in BF16 multiplies in BF16.
"""

from __future__ import annotations

from omni_convert.formats.format import Format

__all__ = ["relative_time"]

#: Bits of both operands to the rate over BF16's.
RATES = {8: 2.0, 4: 4.0}


def relative_time(fmt: Format) -> float:
    """The time of a matrix product in a format over that in BF16."""
    return 1.0 if fmt.operand_bits is None else 1.0 / RATES[fmt.operand_bits]
