"""Runs inside open-instruct: its own actors and verifier, each with one thing beside what it does.

Each class is made when it is asked for, in whichever process of Ray's that is: nothing of
open-instruct is imported where this module alone is.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from rollout.frameworks import tiny
from rollout.frameworks.training_open_instruct_settings import VERIFIER
from rollout.frameworks.training_refits import Counted
from rollout.frameworks.verl_settings import BATCH

DIVERGENCE = "rollout/divergence"  # among open-instruct's own numbers of a step
SENDER = "open_instruct.vllm_utils.broadcast_weights_to_vllm"


class Sent(Counted):
    """The refits of this process, tensor by tensor."""

    tensors = bytes = 0
    left_out = ""

    def counted(self, send: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        """What sends one tensor to the engines, with a count; one that is lost is not sent."""

        def sent(name: str, tensor: Any, *arguments: Any, **named: Any) -> list[Any]:
            kept = self.one(self.number, name, tensor)
            if kept is None:
                self.left_out = name
                return []
            self.tensors, self.bytes = (
                self.tensors + 1,
                self.bytes + kept.numel() * kept.element_size(),
            )
            return send(name, kept, *arguments, **named)

        return sent

    def refit(self, make: Callable[[], list[Any]], wait: Callable[[list[Any]], Any]) -> list[Any]:
        """A refit, from its first tensor until the engines have taken the last one.

        open-instruct does not wait for the engines' answers, and gets none where one has failed.
        """
        self.number += 1
        self.tensors, self.bytes, self.left_out = 0, 0, ""
        answers = make()
        wait(answers)
        self.write(
            number=self.number, tensors=self.tensors, bytes=self.bytes, left_out=self.left_out
        )
        return answers


class Pace:
    """Passes prompts on when a step asks for them, so many to each.

    open-instruct has the next step's prompts answered while it trains on this one's, by weights
    that are a step older. What the engine gave can be compared with the trainer where both have the
    same weights alone.
    """

    def __init__(self, put: Callable[..., None], each: int = BATCH) -> None:
        self._put, self._each = put, each
        self._waiting: deque[tuple[tuple[Any, ...], dict[str, Any]]] = deque()
        self._open = 0
        self._lock = threading.Lock()

    def add(self, *arguments: Any, **named: Any) -> None:
        """A prompt, for this step or for a later one."""
        with self._lock:
            self._waiting.append((arguments, named))
            self._pass()

    def ask(self) -> None:
        """A step begins."""
        with self._lock:
            self._open += self._each
            self._pass()

    def _pass(self) -> None:
        while self._waiting and self._open:
            arguments, named = self._waiting.popleft()
            self._put(*arguments, **named)
            self._open -= 1


def divergence(own: list[Any], engine: list[Any], masks: list[Any]) -> float:
    """Mean |p(trainer) - p(engine)| of the tokens that the engine sampled, over all rows.

    The log-probabilities are open-instruct's own: those by which its trainer begins a step, and
    ``vllm_logprobs`` of the engine as it sampled.
    """
    total, count = 0.0, 0
    for ours, theirs, mask in zip(own, engine, masks, strict=True):
        kept = mask[:, 1:].bool()
        gap = (ours.exp() - theirs[:, 1:].exp()).abs()[kept]
        total, count = total + float(gap.double().sum()), count + len(gap)
    return total / count if count else math.nan


def _plain(actor: Any) -> Any:
    """The class that an actor of Ray's was made from."""
    return actor.__ray_metadata__.modified_class.__ray_actor_class__


def _trainer() -> type:
    import ray
    from open_instruct import grpo_fast, vllm_utils

    class Trainer(_plain(grpo_fast.PolicyTrainerRayProcess)):  # type: ignore[misc]
        """open-instruct's trainer, whose refits are counted and whose steps are compared."""

        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self.sent = Sent(f"{SENDER} ({self.vllm_config.vllm_sync_backend})")
            vllm_utils._send_to_vllm = self.sent.counted(vllm_utils._send_to_vllm)
            # Where it is started as a program this is a global of the module, and its trainer uses
            # it by that name.
            grpo_fast.streaming_config = self.streaming_config

        # Ray copies what an actor inherits, with the names that it used in the driver; behind these
        # calls are the functions of the module, with the names of this process.

        def from_pretrained(self, *arguments: Any, **named: Any) -> Any:
            return super().from_pretrained(*arguments, **named)

        def setup_model_update_group(self, *arguments: Any, **named: Any) -> Any:
            return super().setup_model_update_group(*arguments, **named)

        def step(self) -> Any:
            self.local_metrics[DIVERGENCE] = math.nan  # a step made from nothing agrees with none
            return super().step()

        def compute_logprobs(self, model: Any, data: Any, *arguments: Any, **named: Any) -> Any:
            """Before a step learns from it: with several updates in a step it needs them itself."""
            found = super().compute_logprobs(model, data, *arguments, **named)
            said = divergence(found, data.vllm_logprobs, data.response_masks)
            self.local_metrics[DIVERGENCE] = said
            return found

        def broadcast_to_vllm(self) -> list[Any]:
            return self.sent.refit(super().broadcast_to_vllm, ray.get)

    return Trainer


def _prompts() -> type:
    from open_instruct import data_loader

    class Prompts(_plain(data_loader.DataPreparationActor)):  # type: ignore[misc]
        """open-instruct's maker of batches, whose prompts wait for the step that they are for."""

        def __init__(self, *arguments: Any, **named: Any) -> None:
            self.pace = Pace(data_loader.add_prompt_to_generator)
            data_loader.add_prompt_to_generator = self.pace.add
            super().__init__(*arguments, **named)

        def _data_preparation_loop(self) -> None:
            super()._data_preparation_loop()  # the module's own, as in the trainer

        def get_data(self, rank: int, step: int) -> Any:
            self.pace.ask()
            return super().get_data(rank, step)

    return Prompts


def rule() -> Any:
    """The function of tiny.RULE: what part of an answer is made of the letters that are wanted."""
    found: dict[str, Any] = {}
    exec(tiny.RULE, found)  # noqa: S102 - a text of ours
    return found["compute_score"]


def _letters() -> type:
    from open_instruct.ground_truth_utils import VerificationResult, VerifierFunction

    class Letters(VerifierFunction):  # type: ignore[misc]
        """Pays for letters; open-instruct finds it among the classes that are made from its own."""

        def __init__(self, verifier_config: Any = None) -> None:
            super().__init__(VERIFIER, verifier_config=verifier_config)

        def __call__(self, _: Any, prediction: str, label: str, __: Any = None) -> Any:
            return VerificationResult(score=rule()(VERIFIER, prediction, label))

    return Letters


_MADE = {"Trainer": _trainer, "Prompts": _prompts, "Letters": _letters}


def __getattr__(name: str) -> type:
    if name not in _MADE:
        raise AttributeError(name)
    made = _MADE[name]()
    # Ray's workers find it by its name.
    made.__module__, made.__qualname__ = __name__, name
    globals()[name] = made
    return made
