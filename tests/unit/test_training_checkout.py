"""What every adapter of a framework that comes as a checkout has to say for itself."""

from __future__ import annotations

import importlib

import pytest

from images.catalog import load
from rollout import frameworks
from rollout.frameworks.training_checkout import Trained

BROUGHT = sorted(
    {image.framework.name for image in load() if image.framework and not image.framework.packaged}
)
LEFT = [
    name
    for name, made in vars(Trained).items()
    if "NotImplementedError" in getattr(getattr(made, "__code__", None), "co_names", ())
]


@pytest.mark.parametrize("name", BROUGHT)
def test_an_adapter_says_all_that_is_left_to_it(name: str) -> None:
    """A run would be minutes old before it found that one does not."""
    module = frameworks.trainer(name).replace("-", "_")
    adapter = importlib.import_module(f"rollout.frameworks.{module}").Framework
    assert issubclass(adapter, Trained)
    assert LEFT == ["driver", "environment", "configuration", "made"], "control"
    for method in LEFT:
        assert getattr(adapter, method) is not getattr(Trained, method), method
