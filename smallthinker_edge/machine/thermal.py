"""Temperature, and whether the board slows its processor down because of heat or a weak power supply.

Called by SmallThinker.stats() and doctor.py. Reads files, psutil and, on a Raspberry Pi whose kernel has no file for
it, the `vcgencmd` program; it changes nothing. `root` is there for the tests.
"""

from __future__ import annotations

import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

# Bits of the Raspberry Pi firmware's get_throttled (its documentation, "vcgencmd get_throttled"): now, and the same 16
# bits higher for "since boot".
FIRMWARE_BITS = {0: "under-voltage", 1: "clock capped", 2: "throttled", 3: "soft temperature limit"}
FIRMWARE_FILE = "sys/devices/platform/soc/soc:firmware/get_throttled"
# Names of the sensor that sits in the processor: ARM boards, RK3588, Intel, AMD.
SENSORS = ("cpu_thermal", "soc_thermal", "package_thermal", "coretemp", "k10temp")


def readings(root: Path = Path("/")) -> dict[str, object]:
    """What the board tells; a key is absent where it tells nothing.

    Keys: temperature_celsius (float, the hottest processor sensor), throttled (str: what slows the processor now, ""
    where nothing does), throttled_since_boot (str, Raspberry Pi only).
    """
    result: dict[str, object] = {}
    temperature = _temperature()
    if temperature is not None:
        result["temperature_celsius"] = temperature
    firmware, cooling = _firmware_bits(root), _cooling(root)
    if firmware is not None or cooling is not None:
        now = [name for bit, name in FIRMWARE_BITS.items() if firmware and firmware >> bit & 1]
        result["throttled"] = ", ".join(now + (["thermal clock limit"] if cooling else []))
    if firmware is not None:
        result["throttled_since_boot"] = ", ".join(
            name for bit, name in FIRMWARE_BITS.items() if firmware >> (bit + 16) & 1
        )
    return result


def _temperature() -> float | None:
    read = getattr(psutil, "sensors_temperatures", None)  # psutil has it on Linux only
    sensors: dict[str, list[Any]] = {}
    with suppress(OSError, RuntimeError):
        sensors = read() if read else {}
    found = [entry.current for name in SENSORS for entry in sensors.get(name, []) if entry.current is not None]
    return max(found, default=None)


def _firmware_bits(root: Path) -> int | None:
    """The Raspberry Pi firmware's word; None on other boards."""
    with suppress(OSError, ValueError):
        return int((root / FIRMWARE_FILE).read_text(), 16)
    if not (root / "dev/vcio").exists() or shutil.which("vcgencmd") is None:
        return None
    with suppress(OSError, ValueError, subprocess.SubprocessError):
        answer = subprocess.run(["vcgencmd", "get_throttled"], capture_output=True, text=True, timeout=2, check=True)
        return int(answer.stdout.strip().removeprefix("throttled="), 16)
    return None


def _cooling(root: Path) -> bool | None:
    """Whether the kernel holds the processor's clock down for heat; None where no cooling device concerns it."""
    states = []
    for device in (root / "sys/class/thermal").glob("cooling_device*"):
        with suppress(OSError, ValueError):
            kind = (device / "type").read_text().strip().lower()
            if "cpufreq" in kind or kind == "processor":
                states.append(int((device / "cur_state").read_text()) > 0)
    return any(states) if states else None
