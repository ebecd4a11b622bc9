"""Runs inside ROLL's processes: counts the refits of its own sender, and tampers with them if told.

Ray calls :func:`setup` in each process before anything of ROLL does (``worker_process_setup_hook``
of its runtime environment). What it does stands in the environment.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rollout.frameworks.verl_hook import KIND, LOG, SINCE, TENSOR, Refits

SETUP = f"{__name__}.setup"
# What verl's hook is told under names of its own; under those it would look for verl.
GIVEN = {
    "ROLLOUT_ROLL_REFITS": LOG,  # the file that is told of every refit
    "ROLLOUT_ROLL_TAMPERING": KIND,
    "ROLLOUT_ROLL_SINCE": SINCE,
    "ROLLOUT_ROLL_TENSOR": TENSOR,
}
REFITS, TAMPERING, FROM, LOST = GIVEN
SENDER = "roll.third_party.fsdp2.model_update"
UPDATER = "FSDP2WeightUpdater.model_update"
GATHER = "gather_fsdp2_weights"  # what the updater sends comes from there, in buckets
TRAINER = "actor_train"  # ROLL's name for the workers that train, in their environment
NETWORK = "roll.utils.network_utils"
HERE = "127.0.0.1"
_MARK = "_rollout_counts"

Bucket = list[tuple[str, Any]]


class Counted(Refits):
    """The refits of this process, bucket by bucket."""

    def write(self, **record: Any) -> None:
        with open(self.log, "a", encoding="utf-8") as file:  # noqa: PTH123
            file.write(json.dumps(record | {"sender": self.sender}) + "\n")

    def buckets(self, made: Iterator[Bucket]) -> Iterator[Bucket]:
        """The buckets of one refit as they are to be sent."""
        self.number += 1
        number, tensors, size, left_out = self.number, 0, 0, ""
        for bucket in made:
            kept: Bucket = []
            for name, tensor in bucket:
                sent = self.one(number, name, tensor)
                if sent is None:
                    left_out = name
                    continue
                kept.append((name, sent))
                tensors, size = tensors + 1, size + sent.numel() * sent.element_size()
            if kept:  # ROLL refuses an empty one
                yield kept
        self.write(number=number, tensors=tensors, bytes=size, left_out=left_out)


def count(environ: Mapping[str, str]) -> None:
    """Put the counter behind what gathers the weights for ROLL's sender."""
    module: Any = importlib.import_module(SENDER)
    gather: Callable[..., Iterator[Bucket]] = getattr(module, GATHER)
    if getattr(gather, _MARK, False):
        return
    known = {theirs: environ[ours] for ours, theirs in GIVEN.items() if ours in environ}
    refits = Counted(known, f"{SENDER}.{UPDATER}")

    def counted(*arguments: Any, **named: Any) -> Iterator[Bucket]:
        return refits.buckets(gather(*arguments, **named))

    setattr(counted, _MARK, True)
    setattr(module, GATHER, counted)


def address() -> None:
    """Have ROLL's processes meet on this machine.

    ROLL asks the kernel by which address it would reach a server on the internet. Without a
    network there is no answer, and all of this run is here.
    """
    module: Any = importlib.import_module(NETWORK)
    module.get_node_ip = lambda: HERE


def setup() -> None:
    """What is done in each process that Ray starts."""
    if REFITS not in os.environ:
        return
    address()
    if os.environ.get("CLUSTER_NAME") == TRAINER:
        count(os.environ)
