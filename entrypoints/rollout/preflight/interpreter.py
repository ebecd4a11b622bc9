"""What a job's variables make of Python: proved was an interpreter without them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rollout import added
from rollout.environment import printable
from rollout.preflight import image
from rollout.preflight.files import below
from rollout.preflight.finding import Finding, Host


def look(host: Host) -> Iterator[Finding]:
    """What PYTHONPATH and PYTHONHOME do to every command: one finding, or none."""
    home = added.other_home(host.environ)
    if home:
        sentence = (
            f"PYTHONHOME is {printable(home)}: Python takes its standard library from there, which "
            "is not the image's, or does not start; unset it"
        )
        yield Finding("variables", "python-home-replaced", sentence, stops=False)
        return
    hidden = added.hidden(below(host.root, image.prefix(host)), host.environ)
    if hidden:
        held = "; ".join(f"{folder} holds {_listed(names)}" for folder, names in hidden.items())
        sentence = (
            f"PYTHONPATH: {printable(held)}, which the lock has too: Python takes it from there, "
            "and what was proved is not what runs; take the folder out of PYTHONPATH"
        )
        yield Finding("variables", "python-path-hides", sentence, stops=False)


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = [f"{len(names) - most} more"] if len(names) > most else []
    shown = [*names[:most], *more]
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))
