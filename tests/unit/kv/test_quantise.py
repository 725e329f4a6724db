from __future__ import annotations

import pytest
import torch

from common.kv.quantise import WIRE_DTYPES, max_error, quantise, restore


@pytest.mark.parametrize("wire", list(WIRE_DTYPES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_errors_stay_within_the_bound_for_heads_of_any_size(wire: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    sizes = torch.tensor([1e-3, 1.0, 100.0, 0.0]).view(1, 4, 1)
    values = (torch.randn(500, 4, 64, generator=generator) * sizes).to(dtype)
    codes, scales = quantise(values, wire)
    assert codes.itemsize == 1 and scales.shape == (500, 4, 1)
    error = (restore(codes, scales, torch.float32) - values.float()).abs()
    assert bool((error <= max_error(values, wire)).all())
    assert bool((error[:, :3].amax(dim=(0, 2)) > 0).all()), "one byte cannot hold these values exactly"
    assert not error[:, 3].any()


def test_what_cannot_be_quantised_is_refused() -> None:
    with pytest.raises(ValueError, match="int4"):
        quantise(torch.ones(1, 4), "int4")
    with pytest.raises(ValueError, match="finite"):
        quantise(torch.tensor([[1.0, float("nan")]]), "int8")
