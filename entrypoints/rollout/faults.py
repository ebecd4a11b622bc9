"""Faults made on purpose: what a smoke test is worth shows only when something is broken.

``rollout smoke --inject FAULT`` wraps the engine in :class:`Faulty`, which works for every backend;
three faults need the engine's inside and are passed on to it. A fault of a refit can be aimed at
one transport, as ``dropped-tensor@disk``: weights that go by another arrive as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rollout.backends import Completion, Engine, Served
from rollout.backends.adapters import FAULTS as OF_ADAPTERS
from rollout.backends.adapters import KEPT, LOST, SCALED, UNDER, Adapting, adapting
from rollout.backends.crowd import LEAKED
from rollout.disaggregated import LOST_BROADCAST, STALE_RANK
from rollout.fp8_kv_faults import FACTOR, OLD, RESET
from rollout.fp8_kv_faults import LOST as LOST_SCALE
from rollout.pressure_faults import CROSSED, IGNORED, STALE
from rollout.pressure_faults import LOST as LOST_REQUEST
from rollout.problem import Problem

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Fault:
    """A fault: the check that has to fail first because of it, what happens, and what is said."""

    check: str
    what: str
    reason: str  # a part of the reason that the check has to give
    otherwise: str = (
        ""  # the check that finds it in an image that has not the first, where one does
    )

    def found_by(self, known: Collection[str]) -> str | None:
        """The one of an image's checks that has to fail first; None where none looks for it."""
        return next((check for check in (self.check, self.otherwise) if check in known), None)


def aimed(given: str) -> tuple[str, str]:
    """The name of a fault, and the transport that it is aimed at; empty for whatever is sent."""
    name, _, transport = given.partition("@")
    return name, transport


def find(given: str) -> Fault:
    """The fault of this name, wherever it is aimed.

    Raises:
        KeyError: there is none.
    """
    return FAULTS[aimed(given)[0]]


def unseen(fault: str, failed: Mapping[str, str], known: Collection[str]) -> str:
    """Why a run with a fault shows nothing, as a clause; empty if its own check found it.

    ``failed`` are the checks that failed, each with its reason; ``known`` all that the image has.
    """
    wanted, transport = find(fault), aimed(fault)[1]
    check = wanted.found_by(known)
    if list(failed) != [check]:
        return f"failed were {', '.join(failed) or 'no checks'}"
    reason = failed[str(check)]
    found = wanted.reason in reason and (not transport or reason.startswith(f"by {transport} "))
    return "" if found else f"{check} failed because {reason}"


HELD = "does not hold what was sent"
FAULTS = {
    "dropped-tensor": Fault("refit", "one tensor is never sent", HELD),
    "flipped-byte": Fault("refit", "one bit of one tensor changes on the way", HELD),
    "swapped-tensors": Fault(
        "refit", "two tensors of one shape arrive under each other's name", HELD
    ),
    "wrong-dtype": Fault("refit", "one tensor is sent as float16 bits and read as bfloat16", HELD),
    "partial-bucket": Fault(
        "refit", "the last tensor arrives half empty, as from a bucket cut short", HELD
    ),
    "refit-skipped": Fault("refit", "the refit reports success and does nothing", HELD),
    "stale-cache": Fault(
        "refit", "after the first refit the prefix cache is never reset again", "is still stale"
    ),
    "oracle-of-other-weights": Fault(
        "generation",
        "the oracle of this check is given other weights",
        "diverges from the float32 oracle",
    ),
    "sleep-frees-nothing": Fault(
        "sleep-1", "sleep reports success and does nothing", "sleep freed only", "sleep-2"
    ),
    "wake-restores-nothing": Fault(
        "sleep-1", "wake brings the memory back, not the weights", "the output is another"
    ),
    "leak-per-cycle": Fault(
        "sleep-1", "every cycle of sleep and wake keeps some memory", "memory grew"
    ),
    "lost-buffer": Fault(
        "sleep-2", "wake does not restore what is not in a checkpoint", "a buffer was lost"
    ),
    "cold-turns": Fault(
        "multi-turn", "the prefix cache forgets what a conversation said before", "from the cache"
    ),
    "lost-token": Fault(
        "partial-rollout", "of a rollout that is stopped one token is lost", "ends otherwise"
    ),
    LOST: Fault(
        "lora", "a sleep loses the adapter, which is listed as before", "is not what it was"
    ),
    KEPT: Fault(
        "lora", "a new adapter is taken with success, and the old one stays", "is not that of it"
    ),
    SCALED: Fault(
        "lora", "an adapter is added without its factor", "is not that of the merged weights"
    ),
    UNDER: Fault(
        "lora",
        "of the base's weights none arrives in a layer that has an adapter",
        "does not hold the base's weights",
    ),
    "deaf-server": Fault(
        "server",
        "the engine's server reports success for new weights and keeps its own",
        "not that of the weights sent",
    ),
    "frozen-rotary": Fault(
        "long",
        "from a position on every token is rotated as if it stood there",
        "long answers diverge from the float32 oracle",
    ),
    "halved-window": Fault(
        "long",
        "a token sees half as many before it as it should",
        "long answers diverge from the float32 oracle",
    ),
    "shifted-chunk": Fault(
        "long",
        "behind the first chunk of a prompt all positions are one too high",
        "long answers diverge from the float32 oracle",
    ),
    "wrong-blocks": Fault(
        "long",
        "a preempted request goes on with blocks that others have written",
        "preempted and resumed, answers diverge from the float32 oracle",
    ),
    LOST_REQUEST: Fault(
        "pressure", "one of hundreds of requests is never answered", "never answered"
    ),
    CROSSED: Fault(
        "pressure",
        "of hundreds of requests two are answered under each other's name",
        "diverge from the float32 oracle",
    ),
    IGNORED: Fault(
        "pressure",
        "aborted requests go on, and nobody is told of them",
        "requests that were ended",
    ),
    STALE: Fault(
        "pressure",
        "of the requests that wait for new weights half go on with the old ones",
        "diverge from the float32 oracle",
    ),
    LEAKED: Fault(
        "pressure",
        "of each aborted request a block of the KV cache is never given back",
        "in use by no request",
    ),
    LOST_BROADCAST: Fault(
        "disaggregated", "of a broadcast the engine loads all but the weights of its norms", HELD
    ),
    STALE_RANK: Fault(
        "disaggregated",
        "of two workers one takes its new weights and does not load them",
        "the output is not that of the weights",
    ),
    RESET: Fault(
        "fp8-kv",
        "a wake sets the scales of keys and values to 1.0, and keeps them there",
        "are reset to 1.0",
    ),
    FACTOR: Fault(
        "fp8-kv",
        "keys and values go by a sixteenth of the scales that the engine says it has",
        "answers diverge from the oracle that rounds them alike",
    ),
    LOST_SCALE: Fault(
        "fp8-kv",
        "the new scales of one layer are lost in a refit",
        "in a refit, scales that were sent",
    ),
    OLD: Fault(
        "fp8-kv",
        "blocks of the prefix cache stay when the scales that they are read by are replaced",
        "answers are of the old ones still",
    ),
    "expert-not-refitted": Fault("moe", "of a refit one expert keeps its old weights", HELD),
    "swapped-experts": Fault("moe", "two experts arrive under each other's number", HELD),
    "router-not-refitted": Fault("moe", "of a refit a router keeps its old weights", HELD),
    "top-k-not-normalised": Fault(
        "moe", "the weights of the chosen experts do not add up to one", "the digests agree, yet"
    ),
    "lost-tensor-in-training": Fault(
        "training",
        "from the second refit on the framework's own sender leaves one tensor out",
        "give a token probabilities that differ",
    ),
    "stale-weights-in-training": Fault(
        "training",
        "from the second refit on the framework's own sender sends the weights of the first again",
        "give a token probabilities that differ",
    ),
}
# Made in the stream of a refit.
SPOILED = ("dropped-tensor", "flipped-byte", "swapped-tensors", "wrong-dtype", "partial-bucket")
# Made by rollout.moe_faults, in a mixture of experts; of them the first three in the stream.
OF_EXPERTS = (
    "expert-not-refitted",
    "swapped-experts",
    "router-not-refitted",
    "top-k-not-normalised",
)
AIMED = (*SPOILED, *OF_EXPERTS[:3])  # that one transport may have alone
# Made inside the engine; the others are made at its protocol, whatever the engine is.
_INSIDE = ("leak-per-cycle", "lost-buffer")


class Faulty:
    """An engine with one fault (see :class:`rollout.backends.Engine` for the methods)."""

    def __init__(self, engine: Engine, fault: str, *, served: bool = False) -> None:
        self._engine = engine
        self._fault, self._transport = aimed(fault)
        self._served = served
        self._resets = 0
        self._shortest = 0
        self.device = engine.device
        self.transports = engine.transports
        self.kv_bytes = engine.kv_bytes
        self.mlp_bias = engine.mlp_bias
        self._learn()

    def _learn(self) -> None:
        """What an engine says of itself, some of it when it has started."""
        # An engine that kept no copy of its weights, and says that it did.
        claims = (1,) if self._keeps_nothing else ()
        self.levels = (*claims, *self._engine.levels)
        self.cache_block = self._engine.cache_block
        self.witness, self.insisting = self._engine.witness, self._engine.insisting

    @property
    def _keeps_nothing(self) -> bool:
        return self._fault == "wake-restores-nothing"

    @property
    def within(self) -> Engine:
        """The engine without its fault."""
        return self._engine

    @property
    def pauses(self) -> bool:
        """As the server within says, once it has started; asked of a server alone."""
        return self._server.pauses

    @property
    def _server(self) -> Served:
        return cast("Served", self._engine)

    def about(self) -> dict[str, Any]:
        return self._server.about()

    def halt(self, prompts: Sequence[Sequence[int]], tokens: int, after: int) -> list[Completion]:
        return self._server.halt(prompts, tokens, after)

    def resume(self) -> None:
        self._server.resume()

    def endpoints(self) -> list[str]:
        return self._server.endpoints()

    def adapting(self) -> Adapting:
        """The engine of the check that has one with adapters; this fault is made inside of it."""
        engine = adapting(self._engine)
        if self._fault in OF_ADAPTERS:
            engine.inject(self._fault)
        return engine

    def start(
        self, model: Path, *, dummy: bool, fp8: bool = False, level: int = 1, gpus: int = 1
    ) -> None:
        level = 2 if self._keeps_nothing else level
        self._engine.start(model, dummy=dummy, fp8=fp8, level=level, gpus=gpus)
        self._learn()
        if self._fault in _INSIDE:
            self._engine.inject(self._fault)

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Completion]:
        shortest = min(map(len, prompts))
        self._shortest = self._shortest or shortest
        if self._fault == "cold-turns" and shortest > self._shortest:  # a later turn
            self._engine.reset_prefix_cache()
        return self._engine.generate(prompts, tokens)

    def interrupt(
        self, prompts: Sequence[Sequence[int]], tokens: int, after: int
    ) -> list[Completion]:
        kept = self._engine.interrupt(prompts, tokens, after + 1)
        if self._fault != "lost-token":
            return kept
        middle = after // 2
        return [
            Completion(
                answer.tokens[:middle] + answer.tokens[middle + 1 :],
                answer.logprobs[:middle] + answer.logprobs[middle + 1 :],
            )
            for answer in kept
        ]

    def sleep(self, level: int) -> None:
        if self._fault == "sleep-frees-nothing":
            return
        # A level-2 sleep where level 1 was asked for is just that: memory returns, weights do not.
        self._engine.sleep(2 if self._keeps_nothing else level)

    def wake(self, tags: Sequence[str]) -> None:
        if self._fault != "sleep-frees-nothing":
            self._engine.wake(tags)

    def refit(self, tensors: Iterable[tuple[str, torch.Tensor]], transport: str = "") -> int:
        if self._fault == "refit-skipped" or (self._fault == "deaf-server" and self._served):
            return sum(t.numel() * t.element_size() for _, t in tensors)
        if self._transport not in ("", transport or next(iter(self.transports), "")):
            return self._engine.refit(tensors, transport)
        return self._engine.refit(spoil(tensors, self._fault), transport)

    def reset_prefix_cache(self) -> None:
        # The first reset clears what the engine cached before any refit; without it the fault would
        # be found by that, and nothing would show that a refit's stale cache is found.
        if self._fault != "stale-cache" or not self._resets:
            self._engine.reset_prefix_cache()
        self._resets += 1

    def digests(self) -> dict[str, str]:
        return self._engine.digests()

    def remember(self) -> None:
        self._engine.remember()

    def unchanged(self) -> bool:
        return self._engine.unchanged()

    def held(self) -> int:
        return self._engine.held()

    def memory(self) -> int:
        return self._engine.memory()

    def inject(self, fault: str) -> None:
        self._engine.inject(fault)

    def stop(self) -> None:
        self._engine.stop()


def spoil(
    tensors: Iterable[tuple[str, torch.Tensor]], fault: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """The stream of a refit with one fault in it; unchanged for faults of another kind."""
    if fault not in SPOILED:
        yield from tensors
        return
    stream = list(tensors)
    # One that has a twin of its shape, as every tensor of a layer has in the next. A model without
    # any has no two tensors that could be taken for each other.
    shapes = [tensor.shape for _, tensor in stream]
    later = range(len(stream) // 2, len(stream))
    twins = [i for i in (*later, *range(len(stream))) if shapes.count(shapes[i]) > 1]
    if not twins and fault == "swapped-tensors":
        raise Problem("--inject swapped-tensors: no two tensors of this model have one shape", 2)
    victim = (twins or [*later])[0]
    name, tensor = stream[victim]
    if fault == "dropped-tensor":
        del stream[victim]
    elif fault == "flipped-byte":
        import torch

        bits = tensor.clone()
        bits.view(torch.uint8).view(-1)[bits.numel()] ^= 1
        stream[victim] = (name, bits)
    elif fault == "swapped-tensors":
        twin = next(i for i, (n, t) in enumerate(stream) if t.shape == tensor.shape and i != victim)
        stream[victim], stream[twin] = (name, stream[twin][1]), (stream[twin][0], tensor)
    elif fault == "wrong-dtype":
        import torch

        stream[victim] = (name, tensor.to(torch.float16).view(torch.bfloat16))
    elif fault == "partial-bucket":
        name, tensor = stream[-1]
        half = tensor.clone()
        half.view(-1)[half.numel() // 2 :] = 0
        stream[-1] = (name, half)
    yield from stream
