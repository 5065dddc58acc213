"""Figures as text: as many digits as their interval is worth, the same in every format."""

from __future__ import annotations

import math

MISSING = "—"


def format_number(value: float, decimals: int, *, signed: bool = False) -> str:
    """`value` with `decimals` places, never "-0.0".

    >>> format_number(-0.004, 2), format_number(3.14159, 2, signed=True)
    ('0.00', '+3.14')
    """
    text = f"{value:+.{decimals}f}" if signed else f"{value:.{decimals}f}"
    return text.lstrip("+-") if float(text) == 0 else text


def format_figure(value: float, low: float | None, high: float | None, decimals: int, *, signed: bool = False) -> str:
    """``value ± half width``, or ``value [low, high]`` where the interval leans by over a tenth of its half width.

    Args:
        value: the figure.
        low: of its interval; None where there is none.
        high: likewise.
        decimals: places at most; fewer where two digits of the half width take fewer.
        signed: with a plus sign, for differences.

    >>> format_figure(191.587, 181.47, 201.71, 2), format_figure(79.553, 79.41, 79.69, 2)
    ('192 ± 10', '79.55 ± 0.14')
    """
    if low is None or high is None:
        return format_number(value, decimals, signed=signed)
    half = (high - low) / 2
    places = places_worth(low, high, decimals)
    text = format_number(value, places, signed=signed)
    if abs((high + low) / 2 - value) > 0.1 * half:
        bounds = (format_number(bound, places, signed=signed) for bound in (low, high))
        return f"{text} [{', '.join(bounds)}]"
    width = format_number(half, places)
    return f"{text} ± {'<' + format_number(10.0**-places, places) if half > 0 and float(width) == 0 else width}"


def places_worth(low: float | None, high: float | None, decimals: int) -> int:
    """Decimal places that show two digits of an interval's half width, at most `decimals`; these without an interval.

    >>> places_worth(123.2, 132.7, 2), places_worth(181, 202, 2), places_worth(None, None, 2)
    (1, 0, 2)
    """
    if low is None or high is None or high <= low:
        return decimals
    return min(decimals, max(0, 1 - math.floor(math.log10((high - low) / 2))))
