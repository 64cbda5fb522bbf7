"""Numbers, amounts, durations and times of day in words or digits, as values. Knows nothing of models or of slots."""

from __future__ import annotations

import re

UNITS = {
    word: number for number, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen".split()
    )
}  # fmt: skip
UNITS |= {"oh": 0, "dozen": 12}
_SCALES = {"hundred": 100, "thousand": 1000}
TENS = {word: 10 * tens for tens, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
_PARTS = {"half": 0.5, "quarter": 0.25, "third": 1 / 3, "quarters": 0.25, "1/2": 0.5, "1/4": 0.25, "3/4": 0.75}
_SECONDS = {"second": 1, "sec": 1, "minute": 60, "min": 60, "hour": 3600, "hr": 3600, "day": 86400, "week": 604800}
_LEVELS = {
    "full": 100, "max": 100, "maximum": 100, "highest": 100, "brightest": 100, "loudest": 100, "fully": 100,
    "completely": 100,
    "all": 100, "high": 80, "half": 50, "halfway": 50, "medium": 50, "middle": 50, "low": 20, "min": 1, "minimum": 1,
    "lowest": 1,
    "dimmest": 1, "quietest": 1, "off": 0, "nothing": 0,
}  # fmt: skip
_CLOCKS = {"noon": "12:00", "midday": "12:00", "midnight": "00:00"}
_AFTERNOON = {"pm", "p", "afternoon", "evening", "tonight", "night"}
_MORNING = {"am", "morning"}


def number(words: str) -> float | None:
    """The number that words say, "twenty one and a half" or "21.5"; None where they say none or more than that."""
    parts = [word for word in re.split(r"[\s-]+", words.strip()) if word]
    value, rest = _number_at(parts)
    return value if value is not None and not rest else None


def _number_at(parts: list[str]) -> tuple[float | None, list[str]]:
    """The number that a list of words begins with, and the words after it."""
    if not parts:
        return None, parts
    fraction = _fraction(parts)
    if fraction:
        return fraction[0], parts[fraction[1] :]
    if re.fullmatch(r"\d+(?:[.,]\d+)?", parts[0]):
        value, i = float(parts[0].replace(",", ".")), 1
    elif parts[0] in ("a", "an"):
        value, i = (2.0, 2) if parts[1:2] == ["couple"] else (1.0, 1)
        if parts[1:2] and parts[1] in _SCALES:
            value, i = _integer(["one", *parts[1:]])
    else:
        value, i = _integer(parts)
    if i == 0:
        return None, parts
    fraction = _fraction(parts[i + 1 :]) if parts[i : i + 1] == ["and"] else None
    if fraction:
        return value + fraction[0], parts[i + 1 + fraction[1] :]
    if parts[i : i + 1] in (["point"], ["dot"]):
        decimals, rest = _integer(parts[i + 1 :])
        if rest:
            return value + float(f"0.{decimals:.0f}"), parts[i + 1 + rest :]
    return value, parts[i:]


def _integer(parts: list[str]) -> tuple[float, int]:
    """The whole number that words begin with, and how many words it has: 0 where they begin with none.

    Words go on with a number as long as each says something smaller than what stands before it: "twenty one" but not
    "one twenty".
    """
    total, current, room, i = 0.0, 0.0, 1e9, 0
    while i < len(parts):
        word = parts[i]
        digit = TENS.get(word, UNITS.get(word))
        if digit is not None and digit < room:
            current += digit
            room = 10 if word in TENS else 0
        elif word in _SCALES and current and room <= 10 and _SCALES[word] > current:
            current *= _SCALES[word]
            room = _SCALES[word]
            if word == "thousand":
                total, current = total + current, 0.0
        elif not (
            word == "and" and i and parts[i - 1] in _SCALES and i + 1 < len(parts) and parts[i + 1] in UNITS | TENS
        ):
            break
        i += 1
    return total + current, i


def _fraction(parts: list[str]) -> tuple[float, int] | None:
    """ "a half", "half", "three quarters" -> (its value, how many words)."""
    if parts and parts[0] in _PARTS:
        return _PARTS[parts[0]], 1
    if len(parts) > 1 and parts[1] in _PARTS and parts[0] in UNITS | {"a": 1, "an": 1}:
        return UNITS.get(parts[0], 1) * _PARTS[parts[1]], 2
    return None


def percent(words: str) -> int | None:
    """An amount as percent, 0 to 100: "fifty percent", "7", "half", "maximum"; None for "a bit" and the like."""
    parts = [
        word
        for word in words.split()
        if word not in ("percent", "percentage", "the", "level", "to", "brightness", "volume", "by")
    ]
    value = number(" ".join(parts))
    if value is not None:
        return round(min(max(value * 100 if 0 < value < 1 else value, 0), 100))
    named = [_LEVELS[part] for part in parts if part in _LEVELS]
    return named[0] if named else None


def degrees(words: str) -> float | None:
    """A temperature, "twenty one and a half" -> 21.5; None where there is none."""
    below = words.startswith(("minus ", "negative "))
    kept = [
        word
        for word in words.split()
        if word not in ("degrees", "degree", "celsius", "fahrenheit", "minus", "negative", "c", "f")
    ]
    value = number(" ".join(kept))
    return None if value is None else -value if below else value


def seconds(words: str) -> int | None:
    """A duration, "an hour and twenty minutes" -> 4800, "90 seconds", "half an hour"; None where there is none."""
    parts = [word for word in re.split(r"[\s,-]+", words) if word]
    total, seen, last = 0.0, False, 0
    while parts:
        if parts[0] in ("and", "of", "the") and not (seen and _fraction(parts[1:])):
            parts = parts[1:]
            continue
        if parts[0] == "and":  # "an hour and a half"
            found = _fraction(parts[1:])
            assert found is not None
            rest = parts[1 + found[1] :]
            if rest and _unit(rest[0]):
                total, rest = total + found[0] * _unit(rest[0]), rest[1:]
            else:
                total += found[0] * last
            parts = rest
            continue
        value, rest = _number_at(parts)
        if value is None:
            return None
        while rest and rest[0] in ("a", "an", "of"):  # "half an hour", "a quarter of an hour"
            rest = rest[1:]
        if not rest and last == 3600:  # "one hour and five"
            return round(total + value * 60)
        if not rest or not _unit(rest[0]):
            return None
        last = _unit(rest[0])
        total, seen, parts = total + value * last, True, rest[1:]
    return round(total) if seen else None


def duration_parts(seconds: int) -> dict[str, int]:
    """4800 -> {"hours": 1, "minutes": 20}: seconds in units, without those of which there are none."""
    parts = {"hours": seconds // 3600, "minutes": seconds // 60 % 60, "seconds": seconds % 60}
    return {unit: count for unit, count in parts.items() if count}


def _unit(word: str) -> int:
    return _SECONDS.get(word.removesuffix("s"), 0)


def clock(words: str) -> str | None:
    """A time of day as "HH:MM": "half past six" -> "06:30", "7:30 pm", "quarter to nine in the evening", "noon".

    None for what is no time of day.
    """
    parts = [
        word
        for word in words.split()
        if word
        not in ("o'clock", "oclock", "at", "in", "the", "m", "sharp", "exactly", "around", "about", "this", "hours")
    ]
    if len(parts) == 1 and parts[0] in _CLOCKS:
        return _CLOCKS[parts[0]]
    half_day = "pm" if _AFTERNOON & set(parts) else "am" if _MORNING & set(parts) else ""
    parts = [word for word in parts if word not in _AFTERNOON | _MORNING]
    spoken = _spoken_clock(parts)
    if spoken is None:
        return None
    hour, minute = spoken
    if half_day == "pm" and hour < 12:
        hour += 12
    elif half_day == "am" and hour == 12:
        hour = 0
    return f"{hour:02d}:{minute:02d}" if 0 <= hour < 24 and 0 <= minute < 60 else None


def _spoken_clock(parts: list[str]) -> tuple[int, int] | None:
    text = " ".join(parts)
    digits = re.fullmatch(r"(\d{1,2})[:.](\d{2})", text) or re.fullmatch(r"(\d{1,2})(\d{2})", text)
    if digits:
        return int(digits[1]), int(digits[2])
    for word, sign in (("past", 1), ("after", 1), ("to", -1), ("before", -1), ("till", -1)):
        if word in parts:
            at = parts.index(word)
            minutes, hour = _minutes(parts[:at]), number(" ".join(parts[at + 1 :]))
            if minutes is None or hour is None or not 0 < minutes < 60:
                return None
            return (int(hour), minutes) if sign > 0 else ((int(hour) - 1) % 24, 60 - minutes)
    hour, rest = _number_at(parts)
    if hour is None or hour != int(hour):
        return None
    if not rest:
        # "four hundred": as soldiers say it; "six thirty" is one number after the other.
        return (int(hour) // 100, int(hour) % 100) if hour >= 100 else (int(hour), 0)
    minute = number(" ".join(word for word in rest if word not in ("oh", "hundred", "hours")) or "zero")
    return None if minute is None else (int(hour), int(minute))


def _minutes(parts: list[str]) -> int | None:
    parts = [word for word in parts if word not in ("minutes", "minute", "a")]
    if parts in (["half"], ["quarter"]):
        return 30 if parts == ["half"] else 15
    value = number(" ".join(parts))
    return None if value is None else int(value)
