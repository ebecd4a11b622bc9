"""What is known of the job's variables before an engine starts."""

from __future__ import annotations

import pytest

from rollout.preflight import variables
from tests.unit.hosts import sentences


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
@pytest.mark.parametrize("value", ["expandable_segments:True", "a:1, Expandable_Segments: true"])
def test_an_allocator_that_excludes_sleep_is_named(name: str, value: str) -> None:
    (found,) = sentences(variables.allocator({name: value}))
    assert found == f"{name} has expandable_segments:True, which excludes sleep mode; unset it"
    assert (
        sentences(variables.allocator({name: "expandable_segments:False,max_split_size_mb:64"}))
        == []
    )
