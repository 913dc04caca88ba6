from __future__ import annotations

import hashlib
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gose_kernels as gk
from gose_kernels.ops.quantize import FORMATS, Format
from tests import cases
from tests.checks import backends_of
from tests.kernels.test_philox import lane_oracle

OPTIONS = [(name, rounding) for name in FORMATS for rounding in ("nearest", "stochastic")]
BACKENDS = backends_of("quantize")
CHECKING = backends_of("quantize", "cpu", "torch")  # backends that look at values first
ON_GPU = backends_of("quantize", "cuda", "triton")  # backends that do not: they would wait


def scale_oracle(absmax: Fraction, form: Format) -> np.floating:
    """Smallest scale with qmax * scale >= absmax, found by stepping through the dtype."""
    kind = np.float32 if form.scale_dtype == torch.float32 else np.float16
    with np.errstate(over="ignore"):
        scale = kind(float(absmax / form.qmax))
        scale = min(scale, np.finfo(kind).max)
        while scale < np.finfo(kind).max and Fraction(float(scale)) * form.qmax < absmax:
            scale = np.nextafter(scale, kind(np.inf))
        while scale > 0:
            below = np.nextafter(scale, kind(0))
            too_big = not np.isfinite(np.float32(form.qmax) * np.float32(scale))
            if not too_big and Fraction(float(below)) * form.qmax < absmax:
                break
            scale = below
    return scale


def quantize_oracle(
    x: Tensor,
    residual: Tensor | None,
    frozen: Tensor | None,
    form: Format,
    rounding: str,
    seed: int,
    step: int,
) -> tuple[list[int], list[float], list[float]]:
    """Codes, scales and residuals, one element at a time in numpy scalars."""
    flat = x.float().reshape(-1).numpy()
    y = flat if residual is None else flat + residual.reshape(-1).numpy()
    is_frozen = (
        np.zeros(y.size, bool) if frozen is None else frozen.expand(x.shape).reshape(-1).numpy()
    )
    live = [i for i in range(y.size) if not is_frozen[i]]
    codes, scales, left = [], [], np.zeros(y.size, np.float32)
    for start in range(0, len(live), form.block):
        block = live[start : start + form.block]
        absmax = max(abs(Fraction(float(y[i]))) for i in block)
        scale = np.float32(scale_oracle(absmax, form))
        scales.append(float(scale))
        for i in block:
            code = 0
            if scale > 0:
                ratio = y[i] / scale
                if rounding == "nearest":
                    code = round(float(ratio))
                else:
                    u = np.float32((lane_oracle(i, seed, step) + 0.5) / 65536)
                    code = math.floor(ratio + u)
                code = max(-form.qmax, min(form.qmax, code))
            codes.append(code)
            left[i] = y[i] - np.float32(code) * scale
    return codes, scales, left.tolist()


def pack_oracle(codes: list[int], form: Format) -> bytes:
    if form.bits == 8:
        return bytes(c & 255 for c in codes)
    nibbles = [c & 15 for c in codes] + [0] * (len(codes) % 2)
    return bytes(low | high << 4 for low, high in zip(nibbles[::2], nibbles[1::2], strict=True))


@pytest.mark.matrix(keep=150)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "rounding"), OPTIONS)
@pytest.mark.parametrize("case", cases.quantize, ids=str)
def test_quantize_equals_the_element_loop_byte_for_byte(case, name, rounding, backend):
    x, residual, frozen = case.build()
    form = FORMATS[name]
    code, scale, left = gk.quantize(
        x, residual, frozen, format=name, rounding=rounding, seed=9, step=4, backend=backend
    )
    codes, scales, lefts = quantize_oracle(x, residual, frozen, form, rounding, 9, 4)
    assert bytes(code.tolist()) == pack_oracle(codes, form)
    assert scale.dtype == form.scale_dtype
    assert scale.tolist() == scales
    if residual is None:
        assert left.numel() == 0
    else:
        assert left.shape == x.shape
        assert left.reshape(-1).tolist() == lefts


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_coded_as_their_float32_values(dtype, backend):
    x, residual, frozen = cases.QuantizeCase("normal", (37, 11), True, "element").build(dtype)
    narrow = gk.quantize(x, residual, frozen, backend=backend)
    wide = gk.quantize(x.float(), residual, frozen, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


def decode_oracle(codes: list[int], scales: list[float], form: Format) -> list[float]:
    return [float(np.float32(c) * np.float32(scales[n // form.block])) for n, c in enumerate(codes)]


@pytest.mark.parametrize("backend", backends_of("dequantize"))
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", cases.quantize, ids=str)
def test_dequantize_equals_the_element_loop(case, name, backend):
    x, residual, frozen = case.build()
    form = FORMATS[name]
    code, scale, _ = gk.quantize(x, residual, frozen, format=name)
    codes, scales, _ = quantize_oracle(x, residual, frozen, form, "nearest", 0, 0)
    mask = None if frozen is None else frozen.expand(x.shape)
    out = gk.dequantize(code, scale, x.numel(), mask, format=name, backend=backend)
    live = torch.ones(x.numel(), dtype=torch.bool) if mask is None else ~mask.reshape(-1)
    assert out.dtype == torch.float32
    assert out[live].tolist() == decode_oracle(codes, scales, form)
    assert not out[~live].any()


@pytest.mark.parametrize("backend", backends_of("dequantize_add_"))
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", cases.quantize, ids=str)
def test_dequantize_add_equals_scaled_addition_and_keeps_frozen_bits(case, name, backend):
    x, residual, frozen = case.build()
    code, scale, _ = gk.quantize(x, residual, frozen, format=name)
    mask = None if frozen is None else frozen.expand(x.shape)
    value = gk.dequantize(code, scale, x.numel(), mask, format=name).view(x.shape)
    acc = torch.linspace(-1, 1, x.numel()).view(x.shape)
    if mask is not None:
        acc[mask] = -0.0  # adding 0 would change these bits
    expected = acc + torch.tensor(0.3) * value
    if mask is not None:
        expected[mask] = -0.0
    gk.dequantize_add_(acc, code, scale, frozen, format=name, weight=0.3, backend=backend)
    assert torch.equal(acc.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("backend", backends_of("dequantize"))
def test_every_code_byte_has_a_value(backend):
    code = torch.arange(256, dtype=torch.uint8)
    out8 = gk.dequantize(code, torch.tensor([2.0]), 256, backend=backend)
    assert out8.tolist() == [2.0 * (c - 256 if c > 127 else c) for c in range(256)]
    scale = torch.full((8,), 0.5, dtype=torch.float16)
    out4 = gk.dequantize(code, scale, 512, format="int4_b64_f16", backend=backend)
    signed = [n - 16 if n > 7 else n for n in range(16)]
    assert out4[::2].tolist() == [0.5 * signed[c & 15] for c in range(256)]
    assert out4[1::2].tolist() == [0.5 * signed[c >> 4] for c in range(256)]


# sha256 of code + scale + residual bytes (little endian) of golden_input(): pinned, because packets
# written by one version are read by another.
GOLDEN = {
    (
        "int8_b256_f32",
        "nearest",
    ): "596f5d390ebc1e8bad2c80abcdbeef260d9709b81712f6dd9baeb9181aa9c611",
    (
        "int8_b256_f32",
        "stochastic",
    ): "d00878e65f6410fc1d1ef75b2a3057bea73cc114e61ab3c31c2d448c6e0ead4e",
    ("int8_b64_f16", "nearest"): "6430d8814e616820f1ffa5cb4e8e73ddf4743d2adf1d1d9ea470d56007ac828f",
    (
        "int8_b64_f16",
        "stochastic",
    ): "bf26137a46c0d02dc058f515de3fa310f4052e9a75c4c88c30c876d499a7bd58",
    ("int4_b64_f16", "nearest"): "7be20c450ec335ed6f692f8d26e1a4fae7298481e8df27c6c5128c4c0794ac3c",
    (
        "int4_b64_f16",
        "stochastic",
    ): "e793fceba88477cebc1ef5dedfa28d4c72f4720eec1899a1eace01acbd8cf98c",
}


def golden_input() -> tuple[Tensor, Tensor, Tensor]:
    """1001 elements made of exact integer arithmetic: the same on every machine and version."""
    i = torch.arange(1001)
    x = ((i * 2654435761 % 65536) - 32768).float() * 2.0 ** -(i // 100).float()
    residual = ((i * 40503 % 4096) - 2048).float() / 1024
    return x, residual, i % 7 == 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "rounding"), OPTIONS)
def test_golden_bytes(name, rounding, backend):
    outputs = gk.quantize(
        *golden_input(), format=name, rounding=rounding, seed=7, step=3, backend=backend
    )
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in outputs)).hexdigest()
    assert digest == GOLDEN[name, rounding]


def test_golden_bytes_of_a_short_vector_can_be_checked_by_hand():
    # absmax 127: scale 1 in int8; qmax 7 * 18.140625 = 126.98 < 127 <= 7 * 18.15625 in float16.
    x = torch.tensor([127.0, -127.0, 0.5, 1.5, -0.5, -63.2, 64.0])
    code, scale, left = gk.quantize(x, torch.zeros(7))
    assert bytes(code.tolist()).hex() == "7f81000200c140"
    assert scale.tolist() == [1.0]
    torch.testing.assert_close(
        left, torch.tensor([0, 0, 0.5, -0.5, -0.5, -0.2, 0]), atol=1e-5, rtol=0
    )
    code, scale, _ = gk.quantize(x, format="int4_b64_f16")
    assert scale.tolist() == [18.15625]
    assert bytes(code.tolist()).hex() == "9700d004"


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
vectors = st.lists(finite, min_size=1, max_size=150).map(torch.tensor)


def _within_range(x: Tensor, name: str) -> Tensor:
    """x without the values that saturate."""
    highest = FORMATS[name].qmax * FORMATS[name].max_scale
    return x.clamp(-highest, highest)


@settings(deadline=None)
@given(vectors, st.sampled_from(sorted(FORMATS)))
def test_nearest_codes_are_within_half_a_scale(x, name):
    x = _within_range(x, name)
    code, scale, _ = gk.quantize(x, format=name)
    error = (x.double() - gk.dequantize(code, scale, x.numel(), format=name).double()).abs()
    scale = scale.double().repeat_interleave(FORMATS[name].block)[: x.numel()]
    # the quotient x / scale is rounded to 24 bits before it is rounded to a code
    assert bool((error <= scale / 2 + x.double().abs() * 2.0**-23).all())


@settings(deadline=None)
@given(vectors, st.sampled_from(sorted(FORMATS)), st.integers(0, 2**63 - 1), st.integers(0, 99))
def test_stochastic_codes_are_the_two_neighbours(x, name, seed, step):
    x = _within_range(x, name)
    options = {"format": name, "rounding": "stochastic", "seed": seed, "step": step}
    code, scale, _ = gk.quantize(x, **options)
    form = FORMATS[name]
    q = gk.dequantize(code, torch.ones_like(scale), x.numel(), format=name)
    scale = scale.float().repeat_interleave(form.block)[: x.numel()]
    ratio = torch.where(scale > 0, x / scale, 0)
    assert bool(((q == ratio.floor()) | (q == ratio.ceil())).all())
    assert float(q.abs().max()) <= form.qmax


@pytest.mark.parametrize("name", FORMATS)
def test_stochastic_rounding_is_unbiased(name):
    P, rounds = 512, 400
    x = torch.randn(P, generator=torch.Generator().manual_seed(2))
    total = torch.zeros(P, dtype=torch.float64)
    for step in range(rounds):
        code, scale, _ = gk.quantize(x, format=name, rounding="stochastic", seed=1, step=step)
        total += gk.dequantize(code, scale, P, format=name)
    scale = scale.double().repeat_interleave(FORMATS[name].block)[:P]
    fraction = (x.double() / scale) % 1
    deviation = scale * (fraction * (1 - fraction) / rounds).sqrt()
    z = (total / rounds - x) / deviation.clamp_min(1e-6)
    live = deviation > 1e-4 * scale
    assert abs(float(z[live].sum() / live.sum().sqrt())) < 4  # the mean over elements
    assert float(z[live].abs().max()) < 5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "rounding"), OPTIONS)
def test_error_feedback_telescopes(name, rounding, backend):
    """All that was sent plus the last residual is all that there was to send."""
    random = torch.Generator().manual_seed(3)
    residual, given_total, sent_total = torch.zeros(300), torch.zeros(300), torch.zeros(300)
    given_total, sent_total = given_total.double(), sent_total.double()
    for step in range(30):
        x = torch.randn(300, generator=random) * 10 ** (step % 5 - 2)
        given_total += x
        code, scale, residual = gk.quantize(
            x, residual, format=name, rounding=rounding, seed=5, step=step, backend=backend
        )
        sent_total += gk.dequantize(code, scale, 300, format=name)
    # each step rounds x + residual and y - q * scale once
    torch.testing.assert_close(sent_total + residual, given_total, atol=1e-3, rtol=0)
    assert float((sent_total - given_total).abs().max()) <= float(residual.abs().max()) + 1e-3


@settings(deadline=None)
@given(
    st.lists(st.booleans(), min_size=1, max_size=200),
    st.sampled_from(OPTIONS),
    st.randoms(use_true_random=False),
)
def test_frozen_elements_change_nothing_but_their_own_room(mask, option, random):
    name, rounding = option
    frozen = torch.tensor(mask)
    x = torch.tensor([random.uniform(-1, 1) for _ in mask])
    other = x.clone()
    other[frozen] = torch.tensor([math.nan, math.inf, 1e30, 0.0]).repeat(50)[: int(frozen.sum())]
    residual = torch.full_like(x, 0.25)
    options = {"format": name, "rounding": rounding, "seed": 1, "step": 2}
    first = gk.quantize(x, residual, frozen, **options)
    second = gk.quantize(other, residual, frozen, **options)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[0].numel() == FORMATS[name].code_bytes(int((~frozen).sum()))
    assert not first[2][frozen].any()


def test_a_mask_does_not_shift_the_draws_of_others():
    # Equal scales (an element of 1 in every block) leave only the draws to differ.
    x = torch.rand(64, generator=torch.Generator().manual_seed(0))
    x[0] = 1.0
    frozen = torch.zeros(64, dtype=torch.bool)
    frozen[10:40:3] = True
    options = {"rounding": "stochastic", "seed": 3, "step": 8}
    whole, _, _ = gk.quantize(x, **options)
    masked, _, _ = gk.quantize(x, None, frozen, **options)
    assert torch.equal(whole[~frozen], masked)


@pytest.mark.parametrize("backend", CHECKING)
def test_the_same_bits_for_any_number_of_threads(backend):
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    residual, before = torch.zeros_like(x), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gk.quantize(x, residual, rounding="stochastic", backend=backend))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


MASK_SHAPES = [None, (30, 7, 101), (30, 1, 1), (30, 7, 1), (7, 1), (101,), (1, 7, 101), ()]


@pytest.mark.matrix(keep=60)
@pytest.mark.parametrize("backend", backends_of("quantize", interpreted=8))
@pytest.mark.parametrize("mask_shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize(("name", "rounding"), OPTIONS)
def test_large_tensors_equal_the_reference_for_any_threads_and_mask(
    name, rounding, mask_shape, backend
):
    """Bytes of code, scale, residual and both decoders, over several units of work."""
    random = torch.Generator().manual_seed(6)
    x = torch.randn(30, 7, 101, generator=random)
    x *= 10.0 ** torch.randint(-44, 30, (30, 1, 1), generator=random)  # subnormal to saturating
    x[0, 0, :5] = torch.tensor([-0.0, 0.0, -1e-45, 1e-45, -0.0])
    residual = torch.randn(30, 7, 101, generator=random) * 1e-3
    residual[0, 0, :5] = -0.0
    x[5:7] = 0
    residual[5:7] = -0.0  # blocks of scale 0
    frozen = None if mask_shape is None else torch.rand(mask_shape, generator=random) < 0.4
    acc = torch.randn(30, 7, 101, generator=random)
    flat = None if frozen is None else frozen.expand(x.shape).contiguous()
    options = {"format": name, "rounding": rounding, "seed": 11, "step": 2}
    before = torch.get_num_threads()

    def outputs(backend: str) -> list[Tensor]:
        small: list[Tensor] = []
        for dtype in (torch.bfloat16, torch.float16):
            narrow = x.clamp(-6e4, 6e4).to(dtype)
            small += gk.quantize(narrow, None, frozen, **options, backend=backend)
        plain = gk.quantize(x, None, frozen, **options, backend=backend)
        code, scale, left = gk.quantize(x, residual, frozen, **options, backend=backend)
        total = acc.clone()
        gk.dequantize_add_(total, code, scale, frozen, format=name, weight=0.3, backend=backend)
        out = gk.dequantize(code, scale, x.numel(), flat, format=name, backend=backend)
        floats = [t.view(torch.int32) for t in (left, total, out)]  # bits: -0 is not 0
        return [*small, *plain, code, scale, *floats]

    try:
        expected = outputs("torch")
        for threads in (1, 2, 3) if backend == "cpu" else (1,):
            torch.set_num_threads(threads)
            got = outputs(backend)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    finally:
        torch.set_num_threads(before)


def test_wire_sizes_of_a_million_elements():
    sizes = {
        name: form.code_bytes(10**6) + form.num_scales(10**6) * form.scale_dtype.itemsize
        for name, form in FORMATS.items()
    }
    expected = {"int8_b256_f32": 1_015_628, "int8_b64_f16": 1_031_250, "int4_b64_f16": 531_250}
    assert sizes == expected


def test_packets_of_a_merge_change_the_weights():
    """The mean of decoded updates moves the weights to within a scale of the mean update."""
    random = torch.Generator().manual_seed(4)
    weights = torch.randn(1000, generator=random)
    updates = [0.01 * torch.randn(1000, generator=random) for _ in range(3)]
    merged = weights.clone()
    for update in updates:
        code, scale, _ = gk.quantize(update)
        gk.dequantize_add_(merged, code, scale, weight=1 / 3)
    exact = weights + sum(updates) / 3
    assert not torch.equal(merged, weights)
    assert float((merged - exact).abs().max()) <= 0.01 * 4 / 127 / 2 + 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases.quantize[::3], ids=str)
def test_opcheck(case, backend):
    x, residual, frozen = case.build()
    x = x.nan_to_num()  # opcheck compares with itself, and NaN differs from NaN
    options = {"rounding": "stochastic", "backend": backend}
    torch.library.opcheck(torch.ops.gose.quantize.default, (x, residual, frozen), options)
    code, scale, _ = gk.quantize(x, residual, frozen)
    mask = None if frozen is None else frozen.expand(x.shape).contiguous()
    args = (code, scale, x.numel(), mask)
    torch.library.opcheck(torch.ops.gose.dequantize.default, args, {"backend": backend})
    args = (torch.ones(x.shape), code, scale, frozen)
    options = {"weight": 0.5, "backend": backend}
    torch.library.opcheck(torch.ops.gose.dequantize_add_.default, args, options)


@pytest.mark.parametrize("backend", ON_GPU)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_make_their_scale_nan(bad, backend):
    """Other blocks are coded as without them; what is decoded of this one is NaN."""
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    clean, _, _ = gk.quantize(x, backend=backend)
    x[1, 7] = bad
    code, scale, left = gk.quantize(x, torch.zeros(3, 256), backend=backend)
    assert scale.isnan().tolist() == [False, True, False]
    assert torch.equal(code.view(3, 256)[::2], clean.view(3, 256)[::2])
    assert left.isnan().any(dim=1).tolist() == [False, True, False]
    out = gk.dequantize(code, scale, 768, backend=backend)
    assert bool(out[256:512].isnan().all()) and bool(out[:256].isfinite().all())


@pytest.mark.parametrize("backend", CHECKING)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_named(bad, backend):
    x = torch.zeros(10, 60)
    x[3, 7] = bad
    with pytest.raises(ValueError, match=rf"must be finite, element 187 is {bad}"):
        gk.quantize(x, backend=backend)
    with pytest.raises(ValueError, match=r"must be finite, element 187"):
        gk.quantize(torch.zeros(10, 60), x, backend=backend)
    frozen = torch.zeros(10, 60, dtype=torch.bool)
    frozen[3, 6] = True
    with pytest.raises(ValueError, match=r"must be finite, element 187"):
        gk.quantize(x, None, frozen, backend=backend)
    overflowing = torch.full((4,), torch.finfo(torch.float32).max)
    with pytest.raises(ValueError, match=r"must be finite, element 0 is inf"):
        gk.quantize(overflowing, overflowing, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_refusals_of_quantize(backend):
    x = torch.zeros(4, 5)
    for options, message in [
        ({"format": "int3"}, r"format must be one of int8_b256_f32, .*got 'int3'"),
        ({"rounding": "up"}, r"rounding must be nearest or stochastic, got 'up'"),
    ]:
        with pytest.raises(ValueError, match=message):
            gk.quantize(x, backend=backend, **options)
    for args, message in [
        ((x.double(),), r"x_P must be float32, bfloat16 or float16, got torch.float64"),
        ((x, torch.zeros(5, 4)), r"residual_P must have the shape of x_P \(4, 5\), got \(5, 4\)"),
        ((x, x.double()), r"residual_P must be float32, got torch.float64"),
        ((x, None, x), r"frozen_P must be bool, got torch.float32"),
        ((x, None, torch.zeros(4, dtype=torch.bool)), r"frozen_P must broadcast .*\(4, 5\), got"),
        ((x, None, torch.zeros(2, 4, 5, dtype=torch.bool)), r"frozen_P must broadcast"),
    ]:
        with pytest.raises(ValueError, match=message):
            gk.quantize(*args, backend=backend)


@pytest.mark.parametrize("backend", backends_of("dequantize"))
def test_refusals_of_the_decoders(backend):
    code, scale, acc = torch.zeros(300, dtype=torch.uint8), torch.ones(2), torch.zeros(300)
    mask = torch.zeros(300, dtype=torch.bool)
    for args, message in [
        ((code.int(), scale), r"code must be torch.uint8, got torch.int32"),
        ((code, scale.half()), r"scale must be torch.float32, got torch.float16"),
        ((code.view(3, 100), scale), r"code must have 1 dimension, got shape \(3, 100\)"),
        ((code[1:], scale), r"300 live elements need 300 code bytes and 2 scales, got 299 and 2"),
        ((code, scale[1:]), r"300 live elements need 300 code bytes and 2 scales, got 300 and 1"),
        *(
            ((code, scale * factor), r"scale must be finite and not negative")
            for factor in (-1.0, math.nan, math.inf)
            if backend in ("cpu", "torch")
        ),
    ]:
        with pytest.raises(ValueError, match="dequantize: " + message):
            gk.dequantize(*args, 300, backend=backend)
        with pytest.raises(ValueError, match="dequantize_add_: " + message):
            gk.dequantize_add_(acc, *args, backend=backend)
    assert not acc.any()
    with pytest.raises(ValueError, match=r"format must be one of"):
        gk.dequantize(code, scale, 300, format="raw", backend=backend)
    with pytest.raises(ValueError, match=r"numel must not be negative, got -1"):
        gk.dequantize(code, scale, -1, backend=backend)
    with pytest.raises(ValueError, match=r"frozen_P must have numel=300 elements, got 299"):
        gk.dequantize(code, scale, 300, mask[1:], backend=backend)
    with pytest.raises(ValueError, match=r"frozen_P must be bool, got torch.uint8"):
        gk.dequantize(code, scale, 300, code, backend=backend)
    mask[:5] = True
    if backend in ("cpu", "torch"):
        with pytest.raises(ValueError, match=r"295 live elements need 295 code bytes"):
            gk.dequantize(code, scale, 300, mask, backend=backend)
    else:
        wrong = r"300 elements and their mask cannot have 300 code bytes and 1 scales"
        with pytest.raises(ValueError, match=wrong):
            gk.dequantize(code, scale[:1], 300, mask, backend=backend)
        with pytest.raises(ValueError, match=r"mask cannot have 301 code bytes"):
            gk.dequantize(torch.zeros(301, dtype=torch.uint8), scale, 300, mask, backend=backend)
    for bad, message in [
        (acc.double(), r"acc_P must be float32, got torch.float64"),
        (torch.zeros(20, 15).t(), r"acc_P must be contiguous, got strides \(1, 15\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            gk.dequantize_add_(bad, code, scale, backend=backend)
    with pytest.raises(ValueError, match=r"frozen_P must broadcast to the shape of acc_P"):
        gk.dequantize_add_(acc, code, scale, mask[1:], backend=backend)
