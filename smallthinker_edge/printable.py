"""Text from a file as a person may safely see it: in an error, a log, a terminal.

Used wherever names, keys, templates and what a model says are shown. It never changes what is stored or returned.
"""

from __future__ import annotations

import re

# Control characters of ASCII and of C1, which terminals obey; line separators; what overrides the direction of text, so
# that it reads in another order than it stands; and half characters, which are no text.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    """The text with each character that a terminal could obey, or be misled by, written as Python would: \\x1b, \\n.

    keep: characters to leave as they are, such as "\\n\\t" where lines are wanted.
    """
    return UNSAFE.sub(lambda match: match[0] if match[0] in keep else ascii(match[0])[1:-1], text)
