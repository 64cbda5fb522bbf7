"""A C compiler for another target, from the `ziglang` package: zig_cc.py TARGET ARGUMENTS...

Called by tools/build/build_wheels.py as $CC. It only translates the few options that zig spells differently from GCC.
"""

import os
import re
import sys


def translate(argument: str) -> list[str]:
    """What zig wants in place of one GCC option."""
    march = re.fullmatch(r"-march=armv8[.\d]*-a((?:\+\w+)*)", argument)
    if march:
        return [f"-mcpu=generic{march[1]}"]
    # Debug information would double the size, and zig's libraries come without source paths anyway.
    return [] if argument == "-g" else [argument]


def main() -> None:
    target, *arguments = sys.argv[1:]
    translated = [new for argument in arguments for new in translate(argument)]
    command = [sys.executable, "-m", "ziglang", "cc", "-target", target, *translated]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main()
