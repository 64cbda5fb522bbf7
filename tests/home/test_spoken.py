"""Numbers, amounts, durations and times of day in people's words."""

from __future__ import annotations

import pytest

from smallthinker_edge.home import spoken


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("twenty one", 21), ("21.5", 21.5), ("twenty one and a half", 21.5), ("ninety three point five", 93.5),
        ("one hundred and five", 105),
        ("two hundred", 200), ("a", 1), ("three quarters", 0.75), ("nineteen", 19), ("twenty-five", 25),
        ("one thousand two hundred", 1200),
        ("", None), ("kitchen", None), ("two lamps", None), ("five six", None), ("twenty thirty", None), ("and",
        None), ("point five", None),
    ],
)  # fmt: skip
def test_numbers(words: str, value: float | None) -> None:
    assert spoken.number(words) == value


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("fifty percent", 50), ("7", 7), ("half", 50), ("the maximum", 100), ("a quarter", 25), ("100", 100), ("250",
        100), ("zero", 0),
        ("to level two", 2), ("33.4 percent", 33), ("a bit", None), ("a little", None), ("more", None),
    ],
)  # fmt: skip
def test_percent(words: str, value: int | None) -> None:
    assert spoken.percent(words) == value


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("21.5", 21.5), ("twenty two degrees", 22), ("nineteen and a half", 19.5), ("minus five", -5),
        ("seventy degrees fahrenheit", 70),
        ("warm", None),
    ],
)  # fmt: skip
def test_degrees(words: str, value: float | None) -> None:
    assert spoken.degrees(words) == value


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("an hour and twenty minutes", 4800), ("90 seconds", 90), ("half an hour", 1800), ("an hour and a half",
        5400), ("ten minutes", 600),
        ("two and a half hours", 9000), ("three quarters of an hour", 2700), ("1 hour 30 min", 5400),
        ("16-hour 84 seconds", 57684),
        ("an hour and a half and ten seconds", 5410), ("a couple of minutes", 120), ("one hour and five", 3900),
        ("two days", 172800),
        ("five", None), ("the night", None), ("", None), ("and", None), ("minutes", None),
    ],
)  # fmt: skip
def test_seconds(words: str, value: int | None) -> None:
    assert spoken.seconds(words) == value


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("half past six", "06:30"), ("7:30 pm", "19:30"), ("quarter to nine in the evening", "20:45"), ("noon",
        "12:00"), ("six am", "06:00"),
        ("twelve am", "00:00"), ("twelve pm", "12:00"), ("six forty five am", "06:45"), ("ten past seven", "07:10"),
        ("midnight", "00:00"),
        ("eight oh five pm", "20:05"), ("17:45", "17:45"), ("twenty to one", "00:40"), ("730 am", "07:30"),
        ("nineteen hundred hours", "19:00"),
        ("seven o'clock tonight", "19:00"), ("five", "05:00"), ("twenty one thirty", "21:30"),
        ("morning", None), ("in a while", None), ("25:00", None), ("half past", None), ("six seventy", None), ("past",
        None), ("", None),
    ],
)  # fmt: skip
def test_clock(words: str, value: str | None) -> None:
    assert spoken.clock(words) == value


@pytest.mark.parametrize("read", [spoken.number, spoken.percent, spoken.degrees, spoken.seconds, spoken.clock])
def test_no_words_break_a_reader(read: object) -> None:
    assert callable(read)
    pieces = [
        "",
        "and",
        "a",
        "half",
        "an",
        "hour",
        "past",
        "to",
        "twenty",
        "hundred",
        "point",
        "five",
        "7:30",
        "1/2",
        "minus",
        "of",
        "pm",
        "0",
    ]
    for first in pieces:
        for second in pieces:
            for third in pieces:
                read(" ".join((first, second, third)).strip())
