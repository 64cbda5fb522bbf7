"""The tools for ARM: option translation, finding inner loops, and the arithmetic behind the predictions."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sysconfig

import predict
import pytest
import zig_cc

LISTING = """
0000000000000000 <other>:
   0:	sdot	v0.4s, v1.16b, v2.16b
   4:	b.ne	0 <other>
0000000000000010 <gemv>:
  10:	mov	x0, #0
  14:	ldr	q1, [x1]
  18:	add	x3, x3, #1
  1c:	b.ne	18 <gemv+0x8>
  20:	sdot	v0.4s, v1.16b, v2.4b[0]
  24:	sdot	v3.4s, v1.16b, v2.4b[1]
  28:	b.ne	20 <gemv+0x10>  // b.any
  2c:	b.lt	14 <gemv+0x4>  // b.tstop
  30:	ret
"""


@pytest.mark.parametrize(
    ("gcc", "zig"),
    [
        ("-march=armv8.2-a+dotprod+i8mm", ["-mcpu=generic+dotprod+i8mm"]),
        ("-march=armv8-a", ["-mcpu=generic"]),
        ("-g", []),
        ("-mavx2", ["-mavx2"]),
    ],
)
def test_options_are_spelled_as_zig_wants_them(gcc: str, zig: list[str]) -> None:
    assert zig_cc.translate(gcc) == zig


COMPILER = shlex.split(sysconfig.get_config_var("CC") or "cc")


@pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="needs a C compiler")
def test_what_is_counted_calls_the_kernels_as_they_are() -> None:
    """It is compiled by hand only, for ARM: a kernel's new argument would stay unseen."""
    source = predict.ROOT / "tools" / "arm" / "arm_count.c"
    flags = ["-fsyntax-only", "-std=gnu11", "-Werror", "-Wall", f"-I{predict.ROOT / 'include'}"]
    subprocess.run([*COMPILER, *flags, source], check=True)


def test_the_inner_loop_is_the_one_that_multiplies() -> None:
    assert predict.inner_loop(LISTING, "gemv") == [
        "sdot	v0.4s, v1.16b, v2.4b[0]",
        "sdot	v3.4s, v1.16b, v2.4b[1]",
        "b.ne	loop",
    ]


@pytest.mark.parametrize(
    ("name", "silent", "megabytes"),
    # Bytes that a token must touch, from the sizes in the models' config.json: dense, and with 62 % silent neurons.
    [("4B", 0.0, 485), ("21B", 0.0, 1870), ("4B", 0.62, 385), ("21B", 0.62, 1460)],
)
def test_bytes_of_a_token_are_those_of_the_model(name: str, silent: float, megabytes: int) -> None:
    assert predict.MODELS[name].bytes(silent) / 1e6 == pytest.approx(megabytes, rel=0.03)


def test_storage_is_waited_for_and_memory_hides_computing() -> None:
    counts = {"instructions_per_weight": {"neon": dict.fromkeys(predict.KERNELS, 0.1)}}
    board = predict.Board("test", "neon", 4, 1e9, 1.0, bandwidth=1e9, storage=1e8)
    seconds = predict.predict(predict.MODELS["4B"], board, counts, misses=0.5)
    assert seconds["memory"] > seconds["compute"]
    # Half of 32 layers x 4 experts of 1,990,656 bytes at 100 MB/s.
    assert seconds["storage"] == pytest.approx(0.5 * 128 * 1990656 / 1e8)
    assert seconds["total"] == pytest.approx(seconds["memory"] + seconds["storage"])
