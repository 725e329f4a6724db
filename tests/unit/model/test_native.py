"""The kernels against torch, and life without them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, silu
from transformers.pytorch_utils import Conv1D

from common.model import linear as linear_layers
from common.model.linear import PackedLinear, make_linear, pack_linears
from common.model.native import Kernels, load_kernels

DTYPES = (torch.float32, torch.bfloat16)
ROWS = (1, 5, 300)
EPSILON = 1e-6


def kernels_for(dtype: torch.dtype) -> Kernels:
    kernels = load_kernels(dtype)
    if kernels is None:
        pytest.skip("no C compiler")
    return kernels


def assert_near(actual: Tensor, wanted: Tensor) -> None:
    tolerance = 1e-5 if actual.dtype == torch.float32 else 2e-2
    assert torch.allclose(actual.float(), wanted.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", ROWS)
def test_norms(dtype: torch.dtype, num_rows: int) -> None:
    kernels = kernels_for(dtype)
    hidden, added = (torch.randn(num_rows, 240).to(dtype) for _ in range(2))
    weight = torch.randn(240).to(dtype)
    before = hidden.clone()
    assert_near(kernels.norm(hidden, weight, EPSILON), rms_norm(hidden.float(), (240,), weight.float(), EPSILON))
    total, normed = kernels.add_norm(hidden, added, weight, EPSILON)
    assert torch.equal(hidden, before)
    assert torch.equal(total, hidden + added)
    assert_near(normed, rms_norm(total.float(), (240,), weight.float(), EPSILON))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", ROWS)
def test_gate(dtype: torch.dtype, num_rows: int) -> None:
    gate = torch.linspace(-120, 120, num_rows * 480).view(num_rows, 480).to(dtype)
    up = torch.randn(num_rows, 480).to(dtype)
    wanted = silu(gate.float()) * up.float()
    assert_near(kernels_for(dtype).gated_silu_(gate, up), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("has_norms", [False, True])
def test_rotation(dtype: torch.dtype, num_rows: int, has_norms: bool) -> None:
    fused = torch.randn(num_rows, 6 + 2 + 2, 64).to(dtype)
    cosine, sine = (torch.randn(num_rows, 64).to(dtype) for _ in range(2))
    norms = (torch.randn(64).to(dtype), torch.randn(64).to(dtype)) if has_norms else None
    pool = (torch.zeros(40, 8, 2, 64, dtype=dtype), torch.zeros(40, 8, 2, 64, dtype=dtype))
    slots = torch.randperm(320)[:num_rows]
    query, key, value = (part.float() for part in torch.split(fused.clone(), [6, 2, 2], 1))
    if norms is not None:
        query, key = (rms_norm(x, (64,), norm.float(), EPSILON) for x, norm in zip((query, key), norms, strict=True))
    kernels_for(dtype).rotate_and_store_(fused, cosine, sine, norms, EPSILON, pool, slots)

    def rotated(x: Tensor) -> Tensor:
        turned = torch.cat((-x[..., 32:], x[..., :32]), -1)
        return x * cosine.float()[:, None] + turned * sine.float()[:, None]

    assert_near(fused[:, :6], rotated(query))
    assert_near(pool[0].flatten(0, 1)[slots], rotated(key))
    assert torch.equal(pool[1].flatten(0, 1)[slots].float(), value)


def test_without_a_compiler_there_are_no_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    assert load_kernels.__wrapped__(torch.float32) is None
    assert "no C compiler" in caplog.text


def test_other_dtypes_have_no_kernels() -> None:
    assert load_kernels(torch.float16) is None


@pytest.mark.parametrize(
    ("dtype", "is_by_itself"), [*((dtype, True) for dtype in DTYPES), (torch.bfloat16, False), (torch.float16, False)]
)
@pytest.mark.parametrize("has_bias", [False, True])
@torch.inference_mode()
def test_packed_layers_compute_the_same(
    dtype: torch.dtype, has_bias: bool, is_by_itself: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in float32 where the processor knows no other type."""
    monkeypatch.setattr(linear_layers, "computes_in", lambda dtype: is_by_itself or dtype == torch.float32)
    layers = [nn.Linear(512, size, bias=has_bias).to(dtype) for size in (384, 128, 128)]
    fused = make_linear(*layers)
    for num_rows in ROWS:
        inputs = torch.randn(num_rows, 512).to(dtype)
        assert_near(fused(inputs), torch.cat([linear(inputs, x.weight, x.bias) for x in layers], -1))


@torch.inference_mode()
def test_packing_reaches_every_linear_layer() -> None:
    plain, transposed = nn.Linear(768, 768), Conv1D(768, 768)
    inner = nn.ModuleDict({"transposed": transposed, "tiny": nn.Linear(8, 8)})
    model = nn.ModuleDict({"plain": plain, "inner": inner})
    inputs = torch.randn(2, 3, 768)
    pack_linears(model)
    assert isinstance(model["plain"], PackedLinear) and isinstance(inner["transposed"], PackedLinear)
    assert isinstance(inner["tiny"], nn.Linear)
    assert_near(model["plain"](inputs), plain(inputs))
    assert_near(inner["transposed"](inputs), transposed(inputs))
