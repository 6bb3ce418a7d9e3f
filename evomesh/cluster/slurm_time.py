"""Time limits as Slurm writes them."""

from __future__ import annotations

import math
import re

from evomesh.errors import UserError

FORMS = "MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS, DAYS-HOURS:MINUTES or DAYS-HOURS:MINUTES:SECONDS"
WITHOUT_LIMIT = ("infinite", "unlimited")
# Days, and up to three numbers of smaller units: "1-12", "90", "1:30:00".
TIME_LIMIT = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", re.ASCII)
UNITS_S = (3600, 60, 1)  # hours, minutes, seconds
DAY_S = 86_400


def seconds_of(text: str) -> float:
    """Return the seconds of a time limit; infinity for one without an end.

    The meaning of a number depends on how many there are, and on a day in front of
    them: ``90`` and ``90:00`` are 90 minutes, ``1:30:00`` and ``0-1:30`` an hour and a
    half.

    Raises:
        UserError: Slurm would not read the text, or read nothing but zeros.
    """
    if text.lower() in WITHOUT_LIMIT:
        return math.inf
    match = TIME_LIMIT.fullmatch(text)
    if match is None:
        raise _not_a_time(text)
    days, *smaller = match.groups()
    numbers = [int(number) for number in smaller if number is not None]
    # Without a day, one number or two begin with the minutes.
    begins_with_hours = days is not None or len(numbers) == 3
    first_unit = 0 if begins_with_hours else 1
    units = UNITS_S[first_unit:]
    seconds = DAY_S * int(days or 0)
    for number, unit in zip(numbers, units, strict=False):
        seconds += number * unit
    # Slurm itself takes 0 for "no limit", which nobody means by it.
    if seconds == 0:
        raise _not_a_time(text)
    return seconds


def _not_a_time(text: str) -> UserError:
    return UserError(
        f"{text!r} is not a time limit",
        where="--time",
        expected=FORMS,
        fix="for a day: --time 24:00:00 or --time 1-0; for half an hour: --time 30",
        code="EVO-CLUSTER-002",
    )
