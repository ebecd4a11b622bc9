"""Runs inside ROLL's processes: counts the refits of its own sender, and tampers with them if told.

Ray calls :func:`setup` in each process before anything of ROLL does (``worker_process_setup_hook``
of its runtime environment). What it does stands in the environment.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rollout.frameworks import training_refits
from rollout.frameworks.training_checkout import HERE

SETUP = f"{__name__}.setup"
SENDER = "roll.third_party.fsdp2.model_update"
UPDATER = "FSDP2WeightUpdater.model_update"
GATHER = "gather_fsdp2_weights"  # what the updater sends comes from there, in buckets
TRAINER = "actor_train"  # ROLL's name for the workers that train, in their environment
NETWORK = "roll.utils.network_utils"
_MARK = "_rollout_counts"

Bucket = list[tuple[str, Any]]


class Counted(training_refits.Counted):
    """The refits of this process, bucket by bucket."""

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
    refits = Counted(f"{SENDER}.{UPDATER}", environ)

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
    if training_refits.REFITS not in os.environ:
        return
    address()
    if os.environ.get("CLUSTER_NAME") == TRAINER:
        count(os.environ)
