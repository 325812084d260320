"""The Triton kernels: one program merges one strip of tiles of one job, whole models go in one launch.

Every job is a row of an int64 table (`triton_tiles.FIELDS` names its columns); ``strip_jobs`` says which job
a program serves. A tile is W (read, or dequantized in registers), plus s·B·A by tensor cores with fp32
accumulation, rounded once.

Three things keep the result at the fp64 one rounded once.

1. The sum W + s·acc is rounded to odd in fp32 before the cast, so that nothing is rounded twice (Boldo and
   Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008).
2. fp32 factors are split into three bf16 values each, and the six larger of the nine products are summed,
   small ones first (Henry, Tang and Heinecke, "Leveraging the bfloat16 artificial intelligence datatype for
   higher-precision computations", 2019).
3. Where W and s·B·A, or the terms of B·A, cancel almost wholly, the tile's row is computed again in fp64.
"""

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from lorasync.kernels.triton_tiles import (
    COLS,
    FACTOR,
    FIRST_STRIP,
    MAGNITUDE,
    OUT,
    OUT_STRIDE0,
    OUT_STRIDE1,
    PARTIAL,
    ROWS,
    SCALING,
    WIDTH,
    base_source,
    base_tile,
    extent,
    factor_source,
    job_pointer,
    left_tile,
    right_tile,
    tile_mask,
)


@triton.jit
def _leading(x):
    """Split an fp32 value into its leading 8 bits and the rest; both are exact."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), x - (bits & -65536).to(
        tl.float32, bitcast=True
    )


@triton.jit
def _thirds(x):
    """Split an fp32 value into three bf16 values that sum up to it: 8 bits each, 24 together."""
    high, rest = _leading(x)
    middle, rest = _leading(rest)
    low, rest = _leading(rest)
    return high, middle, low


@triton.jit
def _parts(x, SPLIT: tl.constexpr):
    """Return what is multiplied: the value itself, or its thirds."""
    if SPLIT:
        parts = _thirds(x)
    else:
        parts = (x,)
    return parts


@triton.jit
def _small_products(left, right, acc):
    """Add the five smaller products of thirds to ``acc``, the smallest first."""
    acc = tl.dot(left[2], right[0], acc)
    acc = tl.dot(left[0], right[2], acc)
    acc = tl.dot(left[1], right[1], acc)
    acc = tl.dot(left[1], right[0], acc)
    return tl.dot(left[0], right[1], acc)


@triton.jit
def _round_to_odd(x, rest):
    """X + rest in fp32 rounded to odd: a later cast to a shorter type then rounds x + rest itself."""
    xi = x.to(tl.int32, bitcast=True)
    toward_zero = xi + ((xi ^ rest.to(tl.int32, bitcast=True)) >> 31)
    return tl.where(rest != 0, toward_zero | 1, xi).to(tl.float32, bitcast=True)


@triton.jit
def _fma_to_odd(a, b, c):
    """A · b + c in fp32 rounded to odd: of its roundings down and up the one whose last bit is set."""
    return tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .b32 down, up, bit;
        fma.rm.f32 down, $1, $2, $3;
        fma.rp.f32 up, $1, $2, $3;
        and.b32 bit, down, 1;
        setp.ne.b32 p, bit, 0;
        selp.b32 $0, down, up, p;
        }""",
        "=r,r,r,r", [a, b, c], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _dora_factors(factor, rm, rn, rows, cols, TRANS: tl.constexpr):
    """Load each output feature's factor as fp32 value and rest, along rows; along columns for fan_in_fan_out."""
    if TRANS:
        high = tl.load(factor + 2 * rn, mask=rn < cols, other=0.0)[None, :]
        low = tl.load(factor + 2 * rn + 1, mask=rn < cols, other=0.0)[None, :]
    else:
        high = tl.load(factor + 2 * rm, mask=rm < rows, other=0.0)[:, None]
        low = tl.load(factor + 2 * rm + 1, mask=rm < rows, other=0.0)[:, None]
    return high, low


@triton.jit
def _out(job, OUT_TYPE: tl.constexpr):
    return job_pointer(job, OUT, OUT_TYPE), tl.load(job + OUT_STRIDE0), tl.load(job + OUT_STRIDE1)


@triton.jit
def _store(out, rm, rn, rows, cols, x, ALIGNED: tl.constexpr, EVEN: tl.constexpr):
    if ALIGNED:
        ptrs = tl.multiple_of(out[0] + rm[:, None] * out[1] + rn[None, :], (1, 16))
    else:
        ptrs = out[0] + rm[:, None] * out[1] + rn[None, :] * out[2]
    tl.store(ptrs, x.to(out[0].dtype.element_ty), mask=tile_mask(rm, rn, rows, cols, EVEN))


@triton.jit
def _cancelled_rows(x, acc, s, inside, LIMIT: tl.constexpr, EVEN: tl.constexpr):
    """Whether a row of the tile has an element that is less than LIMIT of the row's largest delta."""
    size = tl.abs(x)
    if not EVEN:
        size = tl.where(inside, size, float("inf"))
    return tl.min(size, axis=1) < tl.max(tl.abs(acc), axis=1) * (LIMIT * tl.abs(s))


@triton.jit
def _note(cancelled, capacity, strip, marks, BM: tl.constexpr):
    """Append each row that has marks: strip and row in the high 32 bits, a bit for each tile in the low."""
    found = marks != 0
    place = tl.atomic_add(cancelled + tl.zeros((BM,), tl.int32), 1, mask=found, sem="relaxed")
    entry = ((strip.to(tl.int64) * BM + tl.arange(0, BM)) << 32) | marks.to(tl.int64)
    tl.store(cancelled + 1 + place, entry, mask=found & (place < capacity))


@triton.jit
def merge_tiles(
    jobs, strip_jobs, cancelled, capacity, KIND: tl.constexpr, W_TYPE: tl.constexpr, OUT_TYPE: tl.constexpr,
    AB_TYPE: tl.constexpr, SPLIT: tl.constexpr, TRANS: tl.constexpr, ALIGNED: tl.constexpr,
    R_ALIGNED: tl.constexpr, R_PAD: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr,
    DORA: tl.constexpr,
    NORM: tl.constexpr, EXACT: tl.constexpr, LIMIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    RK: tl.constexpr, STRIP: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Merge a strip of up to STRIP tiles side by side; with NORM write only its parts of the DoRA norm.

    A strip of job -1 is nothing.
    KIND is 0 for a plain base, 1 for 4-bit, 2 for int8. Rows of a tile in which W and the delta cancel to
    less than LIMIT of the row's largest delta are appended to ``cancelled``, a counter and up to ``capacity``
    entries, for `mend_rows`.
    """
    strip = tl.program_id(0)
    number = tl.load(strip_jobs + strip)
    if number < 0:
        return
    job = jobs + number.to(tl.int64) * WIDTH
    local = (strip - tl.load(job + FIRST_STRIP)).to(tl.int32)
    rows, cols, r = extent(job, ALIGNED, R_ALIGNED)
    base, factors, out = (
        base_source(job, KIND, W_TYPE, NESTED, ASM),
        factor_source(job, AB_TYPE),
        _out(job, OUT_TYPE),
    )
    tiles_n = ((cols + BN - 1) // BN).to(tl.int32)
    strips_n = (tiles_n + STRIP - 1) // STRIP
    tile_m, first = local // strips_n, (local % strips_n) * STRIP
    rm = tile_m * BM + tl.arange(0, BM)
    s = tl.load(job + SCALING).to(tl.float64, bitcast=True).to(tl.float32)
    if R_PAD == RK:
        left = _parts(
            left_tile(factors, rm, tl.arange(0, RK), rows, r, TRANS, ALIGNED, R_ALIGNED, EVEN), SPLIT
        )
    marks = tl.zeros((BM,), tl.int32)
    for tile_n in tl.range(first, tl.minimum(first + STRIP, tiles_n), num_stages=STAGES):
        rn = tile_n * BN + tl.arange(0, BN)
        w = base_tile(
            job, base, tile_n, rm, rn, rows, cols, KIND, W_TYPE, ALIGNED, EVEN, ASM, BLOCK, NESTED, BM, BN
        )
        acc = tl.zeros((BM, BN), tl.float32)
        if SPLIT:
            for k in tl.static_range(0, R_PAD, RK):
                rk = k + tl.arange(0, RK)
                if R_PAD != RK:
                    left = _parts(left_tile(factors, rm, rk, rows, r, TRANS, ALIGNED, R_ALIGNED, EVEN), SPLIT)
                right = _parts(right_tile(factors, rk, rn, r, cols, TRANS, ALIGNED, R_ALIGNED, EVEN), SPLIT)
                acc = _small_products(left, right, acc)
        for k in tl.static_range(0, R_PAD, RK):
            rk = k + tl.arange(0, RK)
            if R_PAD != RK:
                left = _parts(left_tile(factors, rm, rk, rows, r, TRANS, ALIGNED, R_ALIGNED, EVEN), SPLIT)
            if R_PAD != RK or not SPLIT:
                right = _parts(right_tile(factors, rk, rn, r, cols, TRANS, ALIGNED, R_ALIGNED, EVEN), SPLIT)
            acc = tl.dot(left[0], right[0], acc, input_precision="ieee")
        w = w.to(tl.float32)
        scale = tl.broadcast_to(s, acc.shape)
        if NORM:
            square = tl.fma(acc, scale, w)
            square = tl.where(tile_mask(rm, rn, rows, cols, EVEN), square * square, 0.0)
            partial = job_pointer(job, PARTIAL, tl.float32)
            if TRANS:
                tiles_m = (rows + BM - 1) // BM
                tl.store(partial + rn * tiles_m + tile_m, tl.sum(square, axis=0), mask=rn < cols)
            else:
                tl.store(partial + rm * tiles_n + tile_n, tl.sum(square, axis=1), mask=rm < rows)
        else:
            if EXACT and ASM and not DORA:
                x = _fma_to_odd(acc, scale, w)
            else:
                x = tl.fma(acc, scale, w)
            if LIMIT > 0:
                found = _cancelled_rows(x, acc, s, tile_mask(rm, rn, rows, cols, EVEN), LIMIT, EVEN)
                marks |= found.to(tl.int32) << (tile_n - first)
            if DORA:
                rest = tl.fma(acc, scale, w - x)
                f_high, f_low = _dora_factors(job_pointer(job, FACTOR, tl.float32), rm, rn, rows, cols, TRANS)
                f_high = tl.broadcast_to(f_high, x.shape)
                y = x * f_high
                rest = tl.fma(x, f_high, -y) + rest * f_high + x * f_low
                if EXACT:
                    x = _round_to_odd(y, rest)
                else:
                    x = y + rest
            elif EXACT and not ASM:
                x = _round_to_odd(x, tl.fma(acc, scale, w - x))
            _store(out, rm, rn, rows, cols, x, ALIGNED, EVEN)
    if LIMIT > 0 and not NORM:
        _note(cancelled, capacity, strip, marks, BM)


@triton.jit
def mend_rows(
    jobs, strip_jobs, cancelled, capacity, KIND: tl.constexpr, W_TYPE: tl.constexpr, OUT_TYPE: tl.constexpr,
    AB_TYPE: tl.constexpr, TRANS: tl.constexpr, ALIGNED: tl.constexpr, R_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr, DORA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STRIP: tl.constexpr,
    PROGRAMS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Compute again, in fp64, the rows of tiles that `merge_tiles` found cancelled."""
    count = tl.minimum(tl.load(cancelled), capacity)
    for i in range(tl.program_id(0), count, PROGRAMS):
        entry = tl.load(cancelled + 1 + i)
        marks = entry & 0x7FFFFFFF
        strip, row = (entry >> 32) // BM, (entry >> 32) % BM
        job = jobs + tl.load(strip_jobs + strip).to(tl.int64) * WIDTH
        local = strip - tl.load(job + FIRST_STRIP)
        rows, cols, r = extent(job, ALIGNED, False)
        base, factors, out = (
            base_source(job, KIND, W_TYPE, NESTED, ASM),
            factor_source(job, AB_TYPE),
            _out(job, OUT_TYPE),
        )
        s = tl.load(job + SCALING).to(tl.float64, bitcast=True)
        strips_n = (cols + BN * STRIP - 1) // (BN * STRIP)
        rm = local // strips_n * BM + row + tl.arange(0, 1)
        for t in range(STRIP):
            if (marks >> t) & 1 != 0:
                tile_n = (local % strips_n) * STRIP + t
                rn = tile_n * BN + tl.arange(0, BN)
                w = base_tile(
                    job,
                    base,
                    tile_n,
                    rm,
                    rn,
                    rows,
                    cols,
                    KIND,
                    W_TYPE,
                    ALIGNED,
                    False,
                    ASM,
                    BLOCK,
                    NESTED,
                    1,
                    BN,
                )
                exact = w.to(tl.float64) + s * _exact_delta(factors, rm, rn, rows, cols, r, TRANS, R_PAD, BN)
                if DORA:
                    f_high, f_low = _dora_factors(
                        job_pointer(job, FACTOR, tl.float32), rm, rn, rows, cols, TRANS
                    )
                    exact = exact * (f_high.to(tl.float64) + f_low.to(tl.float64))
                high = exact.to(tl.float32)
                x = _round_to_odd(high, (exact - high.to(tl.float64)).to(tl.float32))
                _store(out, rm, rn, rows, cols, x, ALIGNED, False)


@triton.jit
def _exact_delta(factors, rm, rn, rows, cols, r, TRANS: tl.constexpr, R_PAD: tl.constexpr, BN: tl.constexpr):
    """Compute B·A in one row of a tile in fp64."""
    total = tl.zeros((1, BN), tl.float64)
    for k in range(0, R_PAD, 16):
        rk = k + tl.arange(0, 16)
        left = left_tile(factors, rm, rk, rows, r, TRANS, False, False, False).to(tl.float64)
        right = right_tile(factors, rk, rn, r, cols, TRANS, False, False, False).to(tl.float64)
        total += tl.sum(tl.trans(left) * right, axis=0)[None, :]
    return total


@triton.jit
def dora_factor(jobs, M_TYPE: tl.constexpr, TRANS: tl.constexpr, TILE: tl.constexpr, BF: tl.constexpr):
    """Magnitude / ‖W + s·B·A‖ of BF output features, in fp64, stored as an fp32 value and its fp32 rest."""
    job = jobs + tl.program_id(0).to(tl.int64) * WIDTH
    if TRANS:
        features, parts = tl.load(job + COLS), (tl.load(job + ROWS) + TILE - 1) // TILE
    else:
        features, parts = tl.load(job + ROWS), (tl.load(job + COLS) + TILE - 1) // TILE
    rf = tl.program_id(1) * BF + tl.arange(0, BF)
    mask = rf < features
    partial = job_pointer(job, PARTIAL, tl.float32)
    total = tl.zeros((BF,), tl.float64)
    for i in range(parts):
        total += tl.load(partial + rf * parts + i, mask=mask, other=0.0).to(tl.float64)
    magnitude = tl.load(job_pointer(job, MAGNITUDE, M_TYPE) + rf, mask=mask, other=0.0).to(tl.float64)
    value = magnitude / tl.sqrt(tl.where(mask, total, 1.0))
    high = value.to(tl.float32)
    factor = job_pointer(job, FACTOR, tl.float32)
    tl.store(factor + 2 * rf, high, mask=mask)
    tl.store(factor + 2 * rf + 1, (value - high.to(tl.float64)).to(tl.float32), mask=mask)
