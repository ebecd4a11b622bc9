"""The one Dockerfile, rendered for an image: a step for each layer that its lock fills."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

EACH = "# Rendered for each layer."
BEHIND = re.compile(r"# Rendered behind the layer (\w+)")
OWN = re.compile(r"# Rendered for the layer (\w+)")
LAST = "ARG ENTRYPOINTS"


def steps(text: str, layers: Sequence[str]) -> str:
    """The Dockerfile with a step for each of these layers, from the lowest up.

    ``text`` is images/recipes/Dockerfile. Its paragraph ``# Rendered for each layer.`` is repeated;
    a paragraph ``# Rendered behind the layer NAME`` comes behind that layer, or not at all. One
    that is rendered ``for the layer NAME`` is the step of that layer, where it stands.

    Raises:
        ValueError: it has no paragraph for the layers, or several.
    """
    paragraphs = text.rstrip("\n").split("\n\n")
    each = [p for p in paragraphs if p.startswith(EACH)]
    if len(each) != 1:
        raise ValueError(f"it needs one paragraph that begins with '{EACH}', and has {len(each)}")
    behind = {match[1]: p for p in paragraphs if (match := BEHIND.match(p))}
    own = {p: match[1] for p in paragraphs if (match := OWN.match(p))}
    found: list[str] = []
    for paragraph in paragraphs:
        if paragraph in own:
            found += [paragraph] if own[paragraph] in layers else []
        elif paragraph == each[0]:
            for number, layer in enumerate(name for name in layers if name not in own.values()):
                found.append(_step(paragraph, layer, told=number == 0))
                found += [behind[layer]] if layer in behind else []
        elif paragraph not in behind.values():
            found.append(paragraph)
    return "\n\n".join(found) + "\n"


def _step(paragraph: str, layer: str, *, told: bool) -> str:
    """The step of one layer; what it is for is told once."""
    lines = [line for line in paragraph.splitlines() if told or not line.startswith("#")]
    step = "\n".join(lines).replace("ARG LAYER", f"ARG {layer.upper()}")
    return step.replace("/mnt/context/install layer", f"/mnt/context/install {layer}")


def above(text: str, release: str, base: str) -> str:
    """The Dockerfile on a release image: ``text`` is images/recipes/release.Dockerfile.

    Its last paragraph is what ``base``, the Dockerfile of the base, sets; but for the path, which
    is the release image's own.
    """
    paragraphs = text.rstrip("\n").replace("${RELEASE}", release).split("\n\n")
    settings = [p for p in base.rstrip("\n").split("\n\n") if not re.search(r"(?m)^FROM ", p)]
    settings = [re.sub(r"(?m)^ENV PATH=\S+ \\\n\s*", "ENV ", p) for p in settings]
    return "\n\n".join([*paragraphs[:-1], *settings]) + "\n"


def below(text: str) -> str:
    """What decides the layers below our own package: no comment, and not the last step."""
    paragraphs = [p for p in text.split("\n\n") if LAST not in p.splitlines()]
    lines = "\n".join(paragraphs).splitlines()
    return "\n".join(line for line in lines if line and not line.startswith("#"))


def stamped(text: str, env: Mapping[str, str], labels: Mapping[str, str]) -> str:
    """A Dockerfile with the catalog's variables and the labels behind it.

    They are one instruction each. As options of the builder, every label would be a step.
    """
    parts = [text.rstrip("\n")]
    for instruction, values in (("ENV", env), ("LABEL", labels)):
        if values:
            quoted = {key: json.dumps(value, ensure_ascii=False) for key, value in values.items()}
            # A bare dollar sign would name a variable of the build.
            escaped = {key: value.replace("$", r"\$") for key, value in quoted.items()}
            pairs = [f"{key}={value}" for key, value in sorted(escaped.items())]
            parts.append(f"{instruction} " + " \\\n    ".join(pairs))
    return "\n\n".join(parts) + "\n"
