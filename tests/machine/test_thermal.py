"""Throttling from fake /sys trees, and from a fake vcgencmd: what boards without the file have."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from smallthinker_edge.machine import thermal


@pytest.fixture(autouse=True)
def no_sensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "sensors_temperatures", dict, raising=False)


def firmware(root: Path, word: str) -> Path:
    path = root / thermal.FIRMWARE_FILE
    path.parent.mkdir(parents=True)
    path.write_text(word)
    return root


def cooling(root: Path, kind: str, state: int) -> Path:
    folder = root / "sys/class/thermal" / f"cooling_device_{kind}"
    folder.mkdir(parents=True)
    (folder / "type").write_text(kind + "\n")
    (folder / "cur_state").write_text(f"{state}\n")
    return root


def test_a_board_that_tells_nothing_adds_nothing(tmp_path: Path) -> None:
    assert thermal.readings(tmp_path) == {}


@pytest.mark.parametrize(
    ("word", "now", "before"),
    [
        ("0", "", ""),
        ("50005", "under-voltage, throttled", "under-voltage, throttled"),  # the Raspberry Pi manual's example
        ("80000", "", "soft temperature limit"),
    ],
)
def test_the_firmware_word_is_told_in_words(tmp_path: Path, word: str, now: str, before: str) -> None:
    assert thermal.readings(firmware(tmp_path, word)) == {"throttled": now, "throttled_since_boot": before}


def test_vcgencmd_is_asked_where_there_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/vcio").touch()
    program = tmp_path / "vcgencmd"
    program.write_text("#!/bin/sh\necho throttled=0x4\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert thermal.readings(tmp_path)["throttled"] == "throttled"


def test_a_thermally_limited_clock_is_reported(tmp_path: Path) -> None:
    cooling(tmp_path, "fan", 3)
    assert thermal.readings(tmp_path) == {}
    cooling(tmp_path, "cpufreq-cpu0", 0)
    assert thermal.readings(tmp_path) == {"throttled": ""}
    cooling(tmp_path, "cpufreq-cpu4", 2)
    assert thermal.readings(tmp_path) == {"throttled": "thermal clock limit"}


def test_the_hottest_processor_sensor_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sensors = {"cpu_thermal": [SimpleNamespace(current=61.5)], "nvme": [SimpleNamespace(current=80.0)]}
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: sensors, raising=False)
    assert thermal.readings(tmp_path) == {"temperature_celsius": 61.5}
