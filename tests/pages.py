"""Commands of a page, as a shell reads them."""

from __future__ import annotations

import re
import shlex


def commands(text: str) -> list[list[str]]:
    """The commands of all console blocks of a page, each as its words, without its prompt."""
    found = []
    for block in re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.match(r"(?:[a-z]+)?\$ (.*)", line)
            if command:
                found.append(shlex.split(command[1]))
    return found
