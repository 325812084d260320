"""The Triton kernels: one program merges one tile of one job, whole models go in one launch.

Every job is a row of an int64 table (`FIELDS` names its columns); ``tile_jobs`` says which job a program serves.
A tile is W (read, or dequantized in registers), plus s·B·A by tensor cores with fp32 accumulation, rounded once.

Three things keep the result at the fp64 one rounded once. The sum W + s·acc is kept as fp32 value and fp32 rest, and
rounded to odd before the cast, so that there is no double rounding (Boldo and Melquiond, "Emulation of FMA and
correctly rounded sums: proved algorithms using rounding to odd", 2008). fp32 factors are scaled by a power of two and
split into two halves of fp16, 22 bits together; three products of halves are summed, small ones first (Ootomo and
Yokota, "Recovering single precision accuracy from Tensor Cores", 2022). Where W and s·B·A cancel almost wholly, the
few elements are computed again in fp64.
"""

from __future__ import annotations

import triton
import triton.language as tl

FIELDS = (
    "out", "base", "lora_a", "lora_b", "rows", "cols", "r", "out_stride0", "out_stride1", "base_stride0",
    "base_stride1", "lora_a_stride", "lora_b_stride", "scaling", "first_tile", "tiles_n", "scales", "code",
    "nested_absmax", "nested_code", "nested_offset", "base_offset", "amax", "partial", "factor", "magnitude",
)  # fmt: skip
"""Columns of the job table; ``scaling`` and ``nested_offset`` are the bits of a float64."""

WIDTH = tl.constexpr(len(FIELDS))
OUT = tl.constexpr(FIELDS.index("out"))
BASE = tl.constexpr(FIELDS.index("base"))
LORA_A = tl.constexpr(FIELDS.index("lora_a"))
LORA_B = tl.constexpr(FIELDS.index("lora_b"))
ROWS = tl.constexpr(FIELDS.index("rows"))
COLS = tl.constexpr(FIELDS.index("cols"))
RANK = tl.constexpr(FIELDS.index("r"))
OUT_STRIDE0 = tl.constexpr(FIELDS.index("out_stride0"))
OUT_STRIDE1 = tl.constexpr(FIELDS.index("out_stride1"))
BASE_STRIDE0 = tl.constexpr(FIELDS.index("base_stride0"))
BASE_STRIDE1 = tl.constexpr(FIELDS.index("base_stride1"))
LORA_A_STRIDE = tl.constexpr(FIELDS.index("lora_a_stride"))
LORA_B_STRIDE = tl.constexpr(FIELDS.index("lora_b_stride"))
SCALING = tl.constexpr(FIELDS.index("scaling"))
FIRST_TILE = tl.constexpr(FIELDS.index("first_tile"))
TILES_N = tl.constexpr(FIELDS.index("tiles_n"))
SCALES = tl.constexpr(FIELDS.index("scales"))
CODE = tl.constexpr(FIELDS.index("code"))
NESTED_ABSMAX = tl.constexpr(FIELDS.index("nested_absmax"))
NESTED_CODE = tl.constexpr(FIELDS.index("nested_code"))
NESTED_OFFSET = tl.constexpr(FIELDS.index("nested_offset"))
BASE_OFFSET = tl.constexpr(FIELDS.index("base_offset"))
AMAX = tl.constexpr(FIELDS.index("amax"))
PARTIAL = tl.constexpr(FIELDS.index("partial"))
FACTOR = tl.constexpr(FIELDS.index("factor"))
MAGNITUDE = tl.constexpr(FIELDS.index("magnitude"))

NESTED_BLOCK = tl.constexpr(256)
INV_127 = tl.constexpr(7.874015718698502e-3)


@triton.jit
def _pointer(job, field, dtype):
    return tl.load(job + field).to(tl.pointer_type(dtype))


@triton.jit
def _plain_tile(job, rm, rn, mask, W_TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A tile of a plain base, as stored."""
    base = _pointer(job, BASE, W_TYPE)
    stride0 = tl.load(job + BASE_STRIDE0)
    if ALIGNED:
        ptrs = tl.multiple_of(base + rm[:, None] * stride0 + rn[None, :], (1, 16))
    else:
        ptrs = base + rm[:, None] * stride0 + rn[None, :] * tl.load(job + BASE_STRIDE1)
    return tl.load(ptrs, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _int8_tile(job, rm, rn, mask, ALIGNED: tl.constexpr):
    """A tile of a Linear8bitLt weight, dequantized in fp32 in bitsandbytes' order: (q · SCB) · (1/127)."""
    q = _plain_tile(job, rm, rn, mask, tl.int8, ALIGNED)
    scales = _pointer(job, SCALES, tl.float32)
    scb = tl.load(scales + rm, mask=rm < tl.load(job + ROWS), other=0.0)
    return q.to(tl.float32) * scb[:, None] * INV_127


@triton.jit
def _absmax(job, index, mask, NESTED: tl.constexpr):
    """The scale of 4-bit block ``index``; nested: itself 8-bit, code[q] · absmax2 + offset."""
    if NESTED:
        q = tl.load(_pointer(job, SCALES, tl.uint8) + index, mask=mask, other=0).to(tl.int32)
        outer = tl.load(_pointer(job, NESTED_ABSMAX, tl.float32) + index // NESTED_BLOCK, mask=mask, other=0.0)
        offset = tl.load(job + NESTED_OFFSET).to(tl.float64, bitcast=True).to(tl.float32)
        return tl.load(_pointer(job, NESTED_CODE, tl.float32) + q) * outer + offset
    return tl.load(_pointer(job, SCALES, tl.float32) + index, mask=mask, other=0.0)


@triton.jit
def _packed_tile_flat(job, tile_m, tile_n, rm, BLOCK: tl.constexpr, NESTED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """A tile of a 4-bit base whose quantization blocks lie inside rows: bytes by vectors, one scale a block."""
    rows = tl.load(job + ROWS)
    cols = tl.multiple_of(tl.load(job + COLS), 32)
    start = rm * tl.load(job + BASE_STRIDE0) + tl.load(job + BASE_OFFSET) + tile_n * BN
    rb = tl.arange(0, BN // 2)
    mask = (rm < rows)[:, None] & ((tile_n * (BN // 2) + rb) * 2 < cols)[None, :]
    ptrs = tl.multiple_of(_pointer(job, BASE, tl.uint8) + (start // 2)[:, None] + rb[None, :], (1, 16))
    packed = tl.load(ptrs, mask=mask, other=0, eviction_policy="evict_first").to(tl.int32)
    code = _pointer(job, CODE, tl.float32)
    high = tl.load(code + (packed >> 4))
    low = tl.load(code + (packed & 15))
    if BLOCK < BN:
        blocks = tl.arange(0, BN // BLOCK)
        bmask = (rm < rows)[:, None] & ((tile_n * BN + blocks * BLOCK) < cols)[None, :]
        absmax = _absmax(job, (start // BLOCK)[:, None] + blocks[None, :], bmask, NESTED)
        scale = tl.broadcast_to(absmax[:, :, None], (BM, BN // BLOCK, BLOCK // 2)).reshape((BM, BN // 2))
    else:
        scale = _absmax(job, start // BLOCK, rm < rows, NESTED)[:, None]
    return high * scale, low * scale


@triton.jit
def _packed_tile(job, rm, rn, mask, BLOCK: tl.constexpr, NESTED: tl.constexpr):
    """A tile of any 4-bit base, element by element."""
    flat = rm[:, None] * tl.load(job + BASE_STRIDE0) + tl.load(job + BASE_OFFSET) + rn[None, :]
    packed = tl.load(_pointer(job, BASE, tl.uint8) + flat // 2, mask=mask, other=0).to(tl.int32)
    nibble = tl.where(flat % 2 == 0, packed >> 4, packed & 15)
    return tl.load(_pointer(job, CODE, tl.float32) + nibble) * _absmax(job, flat // BLOCK, mask, NESTED)


@triton.jit
def _factor_tiles(job, rm, rn, rk, AB_TYPE: tl.constexpr, TRANS: tl.constexpr, ALIGNED: tl.constexpr, R_ALIGNED: tl.constexpr):
    """The tiles whose product is the delta: B and A; for fan_in_fan_out Aᵀ and Bᵀ."""
    a = _pointer(job, LORA_A, AB_TYPE)
    b = _pointer(job, LORA_B, AB_TYPE)
    a_stride = tl.load(job + LORA_A_STRIDE)
    b_stride = tl.load(job + LORA_B_STRIDE)
    r = tl.load(job + RANK)
    if R_ALIGNED:
        r = tl.multiple_of(r, 8)
    rows = tl.load(job + ROWS)
    cols = tl.load(job + COLS)
    if ALIGNED:
        cols = tl.multiple_of(cols, 16)
    if TRANS:
        if ALIGNED:
            rows = tl.multiple_of(rows, 16)
        ra, na, rb, nb = rm, rows, rn, cols
    else:
        ra, na, rb, nb = rn, cols, rm, rows
    a_ptrs = a + rk[:, None] * a_stride + ra[None, :]
    b_ptrs = b + rb[:, None] * b_stride + rk[None, :]
    if ALIGNED:
        a_ptrs = tl.multiple_of(a_ptrs, (1, 16))
    if R_ALIGNED:
        b_ptrs = tl.multiple_of(b_ptrs, (1, 16))
    a_tile = tl.load(a_ptrs, mask=(rk < r)[:, None] & (ra < na)[None, :], other=0.0)
    b_tile = tl.load(b_ptrs, mask=(rb < nb)[:, None] & (rk < r)[None, :], other=0.0)
    if TRANS:
        return tl.trans(a_tile), tl.trans(b_tile)
    return b_tile, a_tile


@triton.jit
def _amax_field(bits):
    """The exponent field of a power of two that brings a tensor with this largest |x| to [2^13, 2^14)."""
    field = tl.minimum(tl.maximum(267 - (bits >> 23), 14), 250)
    return tl.where((bits >> 23) == 255, 127, field)


@triton.jit
def _power(field):
    return (field << 23).to(tl.float32, bitcast=True)


@triton.jit
def _halves(x, scale):
    scaled = x * scale
    high = scaled.to(tl.float16)
    return high, (scaled - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _delta(
    job, rm, rn, AB_TYPE: tl.constexpr, SPLIT: tl.constexpr, TRANS: tl.constexpr, ALIGNED: tl.constexpr,
    R_ALIGNED: tl.constexpr, R_PAD: tl.constexpr, RK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """B·A for this tile in fp32, and the factor that it still has to be multiplied by."""
    s = tl.load(job + SCALING).to(tl.float64, bitcast=True).to(tl.float32)
    acc = tl.zeros((BM, BN), tl.float32)
    if SPLIT:
        amax = _pointer(job, AMAX, tl.int32)
        field_a, field_b = _amax_field(tl.load(amax)), _amax_field(tl.load(amax + 1))
        s = s * _power(254 - field_a) * _power(254 - field_b)
        if TRANS:
            scale_p, scale_q = _power(field_a), _power(field_b)
        else:
            scale_p, scale_q = _power(field_b), _power(field_a)
    for k in tl.static_range(0, R_PAD, RK):
        p, q = _factor_tiles(job, rm, rn, k + tl.arange(0, RK), AB_TYPE, TRANS, ALIGNED, R_ALIGNED)
        if SPLIT:
            p_high, p_low = _halves(p, scale_p)
            q_high, q_low = _halves(q, scale_q)
            acc = tl.dot(p_low, q_high, acc)
            acc = tl.dot(p_high, q_low, acc)
            acc = tl.dot(p_high, q_high, acc)
        else:
            acc = tl.dot(p, q, acc)
    return acc, s


@triton.jit
def _exact_element(job, m, n, w, AB_TYPE: tl.constexpr, TRANS: tl.constexpr, R_PAD: tl.constexpr):
    """One element of W + s·B·A in fp64."""
    rk = tl.arange(0, R_PAD)
    mask = rk < tl.load(job + RANK)
    if TRANS:
        i, j = m, n
    else:
        i, j = n, m
    a = tl.load(_pointer(job, LORA_A, AB_TYPE) + rk * tl.load(job + LORA_A_STRIDE) + i, mask=mask, other=0.0)
    b = tl.load(_pointer(job, LORA_B, AB_TYPE) + j * tl.load(job + LORA_B_STRIDE) + rk, mask=mask, other=0.0)
    s = tl.load(job + SCALING).to(tl.float64, bitcast=True)
    return w.to(tl.float64) + s * tl.sum(a.to(tl.float64) * b.to(tl.float64))


@triton.jit
def _mend_cancelled(
    job, x, rest, w, mask, m0, n0, LIMIT: tl.constexpr, AB_TYPE: tl.constexpr, TRANS: tl.constexpr,
    R_PAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Compute again in fp64 the elements in which W and the delta cancel to less than LIMIT of W."""
    open_ = (tl.abs(x) < tl.abs(w) * LIMIT) & mask
    count = tl.sum(open_.to(tl.int32))
    if count > 0:
        index = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        while count > 0:
            first = tl.min(tl.where(open_, index, BM * BN))
            hit = index == first
            w_hit = tl.sum(tl.where(hit, w, 0.0))
            exact = _exact_element(job, m0 + first // BN, n0 + first % BN, w_hit, AB_TYPE, TRANS, R_PAD)
            high = exact.to(tl.float32)
            x = tl.where(hit, high, x)
            rest = tl.where(hit, (exact - high.to(tl.float64)).to(tl.float32), rest)
            open_ = open_ & (index != first)
            count -= 1
    return x, rest


@triton.jit
def _round_to_odd(x, rest):
    """x + rest in fp32 rounded to odd: a later cast to a shorter type then rounds x + rest itself."""
    xi = x.to(tl.int32, bitcast=True)
    toward_zero = xi + ((xi ^ rest.to(tl.int32, bitcast=True)) >> 31)
    return tl.where(rest != 0, toward_zero | 1, xi).to(tl.float32, bitcast=True)


@triton.jit
def merge_tiles(
    jobs, tile_jobs, KIND: tl.constexpr, W_TYPE: tl.constexpr, OUT_TYPE: tl.constexpr, AB_TYPE: tl.constexpr,
    SPLIT: tl.constexpr, TRANS: tl.constexpr, ALIGNED: tl.constexpr, R_ALIGNED: tl.constexpr, R_PAD: tl.constexpr,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, DORA: tl.constexpr, NORM: tl.constexpr, EXACT: tl.constexpr,
    LIMIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, RK: tl.constexpr,
):  # fmt: skip
    """Merge one tile; with NORM write only its part of the DoRA norm.

    KIND is 0 for a plain base, 1 for 4-bit, 2 for int8; W_TYPE is the dtype that the base is stored in or
    dequantized to.
    """
    tile = tl.program_id(0)
    job = jobs + tl.load(tile_jobs + tile).to(tl.int64) * WIDTH
    local = tile - tl.load(job + FIRST_TILE)
    tiles_n = tl.load(job + TILES_N)
    tile_m = local // tiles_n
    tile_n = local % tiles_n
    rows = tl.load(job + ROWS)
    cols = tl.load(job + COLS)
    if ALIGNED:
        cols = tl.multiple_of(cols, 16)
    rm = tile_m * BM + tl.arange(0, BM)
    rn = tile_n * BN + tl.arange(0, BN)
    mask = (rm < rows)[:, None] & (rn < cols)[None, :]
    if KIND == 0:
        w = _plain_tile(job, rm, rn, mask, W_TYPE, ALIGNED)
    elif KIND == 2:
        w = _int8_tile(job, rm, rn, mask, ALIGNED).to(W_TYPE)
    elif ALIGNED:
        high, low = _packed_tile_flat(job, tile_m, tile_n, rm, BLOCK, NESTED, BM, BN)
        w = tl.interleave(high.to(W_TYPE), low.to(W_TYPE))
    else:
        w = _packed_tile(job, rm, rn, mask, BLOCK, NESTED).to(W_TYPE)
    acc, s = _delta(job, rm, rn, AB_TYPE, SPLIT, TRANS, ALIGNED, R_ALIGNED, R_PAD, RK, BM, BN)
    w = w.to(tl.float32)
    x = tl.fma(acc, tl.broadcast_to(s, acc.shape), w)
    if NORM:
        square = tl.where(mask, x * x, 0.0)
        partial = _pointer(job, PARTIAL, tl.float32)
        if TRANS:
            tiles_m = (rows + BM - 1) // BM
            tl.store(partial + rn * tiles_m + tile_m, tl.sum(square, axis=0), mask=rn < cols)
        else:
            tl.store(partial + rm * tiles_n + tile_n, tl.sum(square, axis=1), mask=rm < rows)
    else:
        if EXACT:
            rest = tl.fma(acc, tl.broadcast_to(s, acc.shape), w - x)
            if LIMIT > 0:
                x, rest = _mend_cancelled(
                    job, x, rest, w, mask, tile_m * BM, tile_n * BN, LIMIT, AB_TYPE, TRANS, R_PAD, BM, BN
                )
        else:
            rest = tl.zeros_like(x)
        if DORA:
            factor = _pointer(job, FACTOR, tl.float32)
            if TRANS:
                f_high = tl.load(factor + 2 * rn, mask=rn < cols, other=0.0)[None, :]
                f_low = tl.load(factor + 2 * rn + 1, mask=rn < cols, other=0.0)[None, :]
            else:
                f_high = tl.load(factor + 2 * rm, mask=rm < rows, other=0.0)[:, None]
                f_low = tl.load(factor + 2 * rm + 1, mask=rm < rows, other=0.0)[:, None]
            f_high = tl.broadcast_to(f_high, x.shape)
            y = x * f_high
            rest = tl.fma(x, f_high, -y) + rest * f_high + x * f_low
            x = y
        if EXACT:
            x = _round_to_odd(x, rest)
        out = _pointer(job, OUT, OUT_TYPE)
        if ALIGNED:
            ptrs = tl.multiple_of(out + rm[:, None] * tl.load(job + OUT_STRIDE0) + rn[None, :], (1, 16))
        else:
            ptrs = out + rm[:, None] * tl.load(job + OUT_STRIDE0) + rn[None, :] * tl.load(job + OUT_STRIDE1)
        tl.store(ptrs, x.to(OUT_TYPE), mask=mask)


@triton.jit
def adapter_amax(jobs, AB_TYPE: tl.constexpr, TRANS: tl.constexpr, CHUNKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """The bits of the largest |x| of every job's A (even programs) and B (odd), gathered by an integer max."""
    job = jobs + (tl.program_id(0) // 2).to(tl.int64) * WIDTH
    which = tl.program_id(0) % 2
    r = tl.load(job + RANK)
    if TRANS:
        n_in, n_out = tl.load(job + ROWS), tl.load(job + COLS)
    else:
        n_in, n_out = tl.load(job + COLS), tl.load(job + ROWS)
    rows = tl.where(which == 0, r, n_out)
    cols = tl.where(which == 0, n_in, r)
    stride = tl.where(which == 0, tl.load(job + LORA_A_STRIDE), tl.load(job + LORA_B_STRIDE))
    pointer = tl.where(which == 0, tl.load(job + LORA_A), tl.load(job + LORA_B)).to(tl.pointer_type(AB_TYPE))
    tiles_n = (cols + BN - 1) // BN
    n_tiles = tiles_n * ((rows + BM - 1) // BM)
    best = tl.zeros((BM, BN), tl.int32)
    for i in range(tl.program_id(1), n_tiles, CHUNKS):
        rm = (i // tiles_n) * BM + tl.arange(0, BM)
        rn = (i % tiles_n) * BN + tl.arange(0, BN)
        mask = (rm < rows)[:, None] & (rn < cols)[None, :]
        x = tl.load(pointer + rm[:, None] * stride + rn[None, :], mask=mask, other=0.0).to(tl.float32)
        best = tl.maximum(best, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.atomic_max(_pointer(job, AMAX, tl.int32) + which, tl.max(best), sem="relaxed")


@triton.jit
def dora_factor(jobs, M_TYPE: tl.constexpr, TRANS: tl.constexpr, TILE: tl.constexpr, BF: tl.constexpr):
    """magnitude / ‖W + s·B·A‖ of BF output features, in fp64, stored as an fp32 value and its fp32 rest."""
    job = jobs + tl.program_id(0).to(tl.int64) * WIDTH
    if TRANS:
        features, parts = tl.load(job + COLS), (tl.load(job + ROWS) + TILE - 1) // TILE
    else:
        features, parts = tl.load(job + ROWS), tl.load(job + TILES_N)
    rf = tl.program_id(1) * BF + tl.arange(0, BF)
    mask = rf < features
    partial = _pointer(job, PARTIAL, tl.float32)
    total = tl.zeros((BF,), tl.float64)
    for i in range(parts):
        total += tl.load(partial + rf * parts + i, mask=mask, other=0.0).to(tl.float64)
    magnitude = tl.load(_pointer(job, MAGNITUDE, M_TYPE) + rf, mask=mask, other=0.0).to(tl.float64)
    value = magnitude / tl.sqrt(tl.where(mask, total, 1.0))
    high = value.to(tl.float32)
    factor = _pointer(job, FACTOR, tl.float32)
    tl.store(factor + 2 * rf, high, mask=mask)
    tl.store(factor + 2 * rf + 1, (value - high.to(tl.float64)).to(tl.float32), mask=mask)
