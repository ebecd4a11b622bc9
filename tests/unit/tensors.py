"""What every way of moving weights has to bring over to the bit."""

from __future__ import annotations

from typing import Any

from rollout.transport import as_bytes


def of_any_kind(torch: Any) -> dict[str, Any]:
    """Tensors of every kind that a trainer may have, by what is odd about them."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator)

    return {
        "larger than a bucket": noise(40, 30),
        "bfloat16": noise(7, 5).to(torch.bfloat16),
        "float8": noise(13).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.5),
        "bool": noise(9) > 0,
        "transposed": noise(6, 4).t(),
        "transposed and larger": noise(30, 50).t(),
        "every other": noise(50)[::2],
        "int64": torch.arange(-3, 3),
        "empty": torch.ones(0, 4),
        "parameter": torch.nn.Parameter(noise(3, 3)),
        "not a number": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


def same(torch: Any, one: Any, two: Any) -> bool:
    """Alike in shape, type and every bit."""
    alike = one.shape == two.shape and one.dtype == two.dtype
    return alike and torch.equal(as_bytes(one), as_bytes(two))
