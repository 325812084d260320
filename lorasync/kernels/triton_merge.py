"""The Triton kernels: one program merges one tile of one job, whole models go in one launch.

Every job is a row of an int64 table (`FIELDS` names its columns); ``tile_jobs`` says which job a program serves.
A tile is W (read, or dequantized in registers), plus s·B·A by tensor cores with fp32 accumulation, rounded once.

Three things keep the result at the fp64 one rounded once. The sum W + s·acc is kept as fp32 value and fp32 rest, and
rounded to odd before the cast, so that there is no double rounding (Boldo and Melquiond, "Emulation of FMA and
correctly rounded sums: proved algorithms using rounding to odd", 2008). fp32 factors are split into three bf16
values each, and the six larger of the nine products are summed, small ones first (Henry, Tang and Heinecke,
"Leveraging the bfloat16 artificial intelligence datatype for higher-precision computations", 2019). Where W and s·B·A cancel almost wholly, the
few elements are computed again in fp64.
"""

from __future__ import annotations

import triton
import triton.language as tl

FIELDS = (
    "out", "base", "lora_a", "lora_b", "rows", "cols", "r", "out_stride0", "out_stride1", "base_stride0",
    "base_stride1", "lora_a_stride", "lora_b_stride", "scaling", "first_strip", "scales", "code",
    "nested_absmax", "nested_code", "nested_offset", "base_offset", "partial", "factor", "magnitude",
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
FIRST_STRIP = tl.constexpr(FIELDS.index("first_strip"))
SCALES = tl.constexpr(FIELDS.index("scales"))
CODE = tl.constexpr(FIELDS.index("code"))
NESTED_ABSMAX = tl.constexpr(FIELDS.index("nested_absmax"))
NESTED_CODE = tl.constexpr(FIELDS.index("nested_code"))
NESTED_OFFSET = tl.constexpr(FIELDS.index("nested_offset"))
BASE_OFFSET = tl.constexpr(FIELDS.index("base_offset"))
PARTIAL = tl.constexpr(FIELDS.index("partial"))
FACTOR = tl.constexpr(FIELDS.index("factor"))
MAGNITUDE = tl.constexpr(FIELDS.index("magnitude"))

NESTED_BLOCK = tl.constexpr(256)
INV_127 = tl.constexpr(7.874015718698502e-3)


@triton.jit
def _pointer(job, field, dtype):
    return tl.load(job + field).to(tl.pointer_type(dtype))


@triton.jit
def _extent(job, ALIGNED: tl.constexpr, R_ALIGNED: tl.constexpr):
    """Rows, columns and rank, with what is known of their divisors."""
    rows, cols, r = tl.load(job + ROWS), tl.load(job + COLS), tl.load(job + RANK)
    if ALIGNED:
        cols = tl.multiple_of(cols, 16)
    if R_ALIGNED:
        r = tl.multiple_of(r, 8)
    return rows, cols, r


@triton.jit
def _base(job, KIND: tl.constexpr, W_TYPE: tl.constexpr, NESTED: tl.constexpr, ASM: tl.constexpr):
    """Everything that dequantizing needs: pointers, strides, code table, nested scales."""
    scales, code, offset, nested = 0, 0, 0, (0, 0, 0)
    if KIND == 0:
        data = _pointer(job, BASE, W_TYPE)
    elif KIND == 2:
        data = _pointer(job, BASE, tl.int8)
        scales = _pointer(job, SCALES, tl.float32)
    else:
        data = _pointer(job, BASE, tl.uint8)
        if ASM:
            code = _code_of_lane(tl.load(job + CODE))
        else:
            code = tl.load(_pointer(job, CODE, tl.float32) + tl.arange(0, 16))
        offset = tl.load(job + BASE_OFFSET)
        if NESTED:
            scales = _pointer(job, SCALES, tl.uint8)
            shift = tl.load(job + NESTED_OFFSET).to(tl.float64, bitcast=True).to(tl.float32)
            nested = (_pointer(job, NESTED_ABSMAX, tl.float32), _pointer(job, NESTED_CODE, tl.float32), shift)
        else:
            scales = _pointer(job, SCALES, tl.float32)
    return data, tl.load(job + BASE_STRIDE0), tl.load(job + BASE_STRIDE1), scales, code, offset, nested


@triton.jit
def _inside(rm, rn, rows, cols, EVEN: tl.constexpr):
    """The mask of a tile; where every tile is whole a constant, which the compiler drops."""
    if EVEN:
        mask = tl.full((rm.shape[0], rn.shape[0]), 1, tl.int1)
    else:
        mask = (rm < rows)[:, None] & (rn < cols)[None, :]
    return mask


@triton.jit
def _plain_tile(base, rm, rn, rows, cols, ALIGNED: tl.constexpr, EVEN: tl.constexpr):
    """A tile of a plain base, as stored."""
    if ALIGNED:
        ptrs = tl.multiple_of(base[0] + rm[:, None] * base[1] + rn[None, :], (1, 16))
    else:
        ptrs = base[0] + rm[:, None] * base[1] + rn[None, :] * base[2]
    return tl.load(ptrs, mask=_inside(rm, rn, rows, cols, EVEN), other=0, eviction_policy="evict_first")


@triton.jit
def _int8_tile(base, rm, rn, rows, cols, ALIGNED: tl.constexpr, EVEN: tl.constexpr):
    """A tile of a Linear8bitLt weight, dequantized in fp32 in bitsandbytes' order: (q · SCB) · (1/127)."""
    q = _plain_tile(base, rm, rn, rows, cols, ALIGNED, EVEN)
    scb = tl.load(base[3] + rm, mask=rm < rows, other=0.0)
    return q.to(tl.int32).to(tl.float32) * scb[:, None] * INV_127


@triton.jit
def _absmax(base, index, mask, NESTED: tl.constexpr):
    """The scale of 4-bit block ``index``; nested: itself 8-bit, code[q] · absmax2 + offset."""
    if NESTED:
        q = tl.load(base[3] + index, mask=mask, other=0).to(tl.int32)
        outer = tl.load(base[6][0] + index // NESTED_BLOCK, mask=mask, other=0.0)
        scale = tl.load(base[6][1] + q, mask=mask, other=0.0) * outer + base[6][2]
    else:
        scale = tl.load(base[3] + index, mask=mask, other=0.0)
    return scale


@triton.jit
def _packed_tile_flat(
    base, rm, rows, cols, tile_n, W_TYPE: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr,
    EVEN: tl.constexpr, ASM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile of a 4-bit base whose quantization blocks lie inside rows: by words of 8, one scale a block."""
    words_in_row = tl.multiple_of(cols // 8, 4)
    start = rm * base[1] + base[5] + tile_n * BN
    column = tl.arange(0, BN // 8)
    mask = _inside(rm, tile_n * (BN // 8) + column, rows, words_in_row, EVEN)
    ptrs = base[0].to(tl.pointer_type(tl.int32)) + (start // 8)[:, None] + column[None, :]
    words = tl.load(tl.multiple_of(ptrs, (1, 16)), mask=mask, other=0, eviction_policy="evict_first")
    if BLOCK < BN:
        blocks = tl.arange(0, BN // BLOCK)
        inside = _inside(rm, tile_n * (BN // 8) + blocks * (BLOCK // 8), rows, words_in_row, EVEN)
        absmax = _absmax(base, (start // BLOCK)[:, None] + blocks[None, :], inside, NESTED)
        scale = tl.broadcast_to(absmax[:, :, None], (BM, BN // BLOCK, BLOCK // 8)).reshape((BM, BN // 8))
    else:
        absmax = _absmax(base, start // BLOCK, rm < rows, NESTED)
        scale = tl.broadcast_to(absmax[:, None], (BM, BN // 8))
    if ASM:
        v0, v1, v2, v3, v4, v5, v6, v7 = _shuffled(words, tl.broadcast_to(base[4], words.shape))
    else:
        v0, v1 = _looked_up(base[4], words >> 4, BM, BN), _looked_up(base[4], words, BM, BN)
        v2, v3 = _looked_up(base[4], words >> 12, BM, BN), _looked_up(base[4], words >> 8, BM, BN)
        v4, v5 = _looked_up(base[4], words >> 20, BM, BN), _looked_up(base[4], words >> 16, BM, BN)
        v6, v7 = _looked_up(base[4], words >> 28, BM, BN), _looked_up(base[4], words >> 24, BM, BN)
    even = tl.interleave(
        tl.interleave((v0 * scale).to(W_TYPE), (v4 * scale).to(W_TYPE)),
        tl.interleave((v2 * scale).to(W_TYPE), (v6 * scale).to(W_TYPE)),
    )
    odd = tl.interleave(
        tl.interleave((v1 * scale).to(W_TYPE), (v5 * scale).to(W_TYPE)),
        tl.interleave((v3 * scale).to(W_TYPE), (v7 * scale).to(W_TYPE)),
    )
    return tl.interleave(even, odd)


@triton.jit
def _looked_up(code, index, BM: tl.constexpr, BN: tl.constexpr):
    return tl.gather(code, (index & 15).reshape((BM * (BN // 8),)), 0).reshape((BM, BN // 8))


@triton.jit
def _code_of_lane(address):
    """In each thread the value of the 4-bit code that its lane number ends in."""
    return tl.inline_asm_elementwise(
        """{
        .reg .u32 lane;
        .reg .u64 place;
        mov.u32 lane, %laneid;
        and.b32 lane, lane, 15;
        mul.wide.u32 place, lane, 4;
        add.u64 place, place, $1;
        ld.global.nc.b32 $0, [place];
        }""",
        "=r,l", [address], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _shuffled(words, code_of_lane):
    """The values of the eight codes in each word, in order: bytes upward, in each the high four bits first.

    A shuffle among 16 lanes reads only the last four bits of the lane number: no mask is needed.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 code;
        shr.u32 code, $8, 4;
        shfl.sync.idx.b32 $0, $9, code, 0x101f, 0xffffffff;
        shfl.sync.idx.b32 $1, $9, $8, 0x101f, 0xffffffff;
        shr.u32 code, $8, 12;
        shfl.sync.idx.b32 $2, $9, code, 0x101f, 0xffffffff;
        shr.u32 code, $8, 8;
        shfl.sync.idx.b32 $3, $9, code, 0x101f, 0xffffffff;
        shr.u32 code, $8, 20;
        shfl.sync.idx.b32 $4, $9, code, 0x101f, 0xffffffff;
        shr.u32 code, $8, 16;
        shfl.sync.idx.b32 $5, $9, code, 0x101f, 0xffffffff;
        shr.u32 code, $8, 28;
        shfl.sync.idx.b32 $6, $9, code, 0x101f, 0xffffffff;
        shr.u32 code, $8, 24;
        shfl.sync.idx.b32 $7, $9, code, 0x101f, 0xffffffff;
        }""",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r", [words, code_of_lane],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _packed_tile(job, base, rm, rn, rows, cols, BLOCK: tl.constexpr, NESTED: tl.constexpr):
    """A tile of any 4-bit base, element by element."""
    mask = _inside(rm, rn, rows, cols, False)
    flat = rm[:, None] * base[1] + base[5] + rn[None, :]
    packed = tl.load(base[0] + flat // 2, mask=mask, other=0).to(tl.int32)
    nibble = tl.where(flat % 2 == 0, packed >> 4, packed & 15)
    return tl.load(_pointer(job, CODE, tl.float32) + nibble) * _absmax(base, flat // BLOCK, mask, NESTED)


@triton.jit
def _base_tile(
    job, base, tile_n, rm, rn, rows, cols, KIND: tl.constexpr, W_TYPE: tl.constexpr, ALIGNED: tl.constexpr,
    EVEN: tl.constexpr, ASM: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """A tile of W in the dtype that it is stored in or dequantized to."""
    if KIND == 0:
        w = _plain_tile(base, rm, rn, rows, cols, ALIGNED, EVEN)
    elif KIND == 2:
        w = _int8_tile(base, rm, rn, rows, cols, ALIGNED, EVEN).to(W_TYPE)
    elif ALIGNED:
        w = _packed_tile_flat(base, rm, rows, cols, tile_n, W_TYPE, BLOCK, NESTED, EVEN, ASM, BM, BN)
    else:
        w = _packed_tile(job, base, rm, rn, rows, cols, BLOCK, NESTED).to(W_TYPE)
    return w


@triton.jit
def _factors(job, AB_TYPE: tl.constexpr):
    """Pointer and stride of A, then of B."""
    a, b = _pointer(job, LORA_A, AB_TYPE), _pointer(job, LORA_B, AB_TYPE)
    return a, tl.load(job + LORA_A_STRIDE), b, tl.load(job + LORA_B_STRIDE)


@triton.jit
def _left_tile(
    factors, rm, rk, rows, r, TRANS: tl.constexpr, ALIGNED: tl.constexpr, R_ALIGNED: tl.constexpr, EVEN: tl.constexpr
):
    """Rows of the left factor of the delta: of B, or of Aᵀ for fan_in_fan_out."""
    if TRANS:
        tile = tl.trans(_a_tile(factors, rk, rm, r, rows, ALIGNED, EVEN))
    else:
        tile = _b_tile(factors, rm, rk, rows, r, R_ALIGNED, EVEN)
    return tile


@triton.jit
def _right_tile(
    factors, rk, rn, r, cols, TRANS: tl.constexpr, ALIGNED: tl.constexpr, R_ALIGNED: tl.constexpr, EVEN: tl.constexpr
):
    """Columns of the right factor of the delta: of A, or of Bᵀ for fan_in_fan_out."""
    if TRANS:
        tile = tl.trans(_b_tile(factors, rn, rk, cols, r, R_ALIGNED, EVEN))
    else:
        tile = _a_tile(factors, rk, rn, r, cols, ALIGNED, EVEN)
    return tile


@triton.jit
def _a_tile(factors, rk, rn, r, n_in, ALIGNED: tl.constexpr, EVEN: tl.constexpr):
    ptrs = factors[0] + rk[:, None] * factors[1] + rn[None, :]
    if ALIGNED:
        ptrs = tl.multiple_of(ptrs, (1, 16))
    return tl.load(ptrs, mask=_inside(rk, rn, r, n_in, EVEN), other=0.0)


@triton.jit
def _b_tile(factors, rn, rk, n_out, r, R_ALIGNED: tl.constexpr, EVEN: tl.constexpr):
    ptrs = factors[2] + rn[:, None] * factors[3] + rk[None, :]
    if R_ALIGNED:
        ptrs = tl.multiple_of(ptrs, (1, 16))
    return tl.load(ptrs, mask=_inside(rn, rk, n_out, r, EVEN), other=0.0)


@triton.jit
def _leading(x):
    """The leading 8 bits of an fp32 value, cut off, and the rest; both exact."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), x - (bits & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _thirds(x):
    """An fp32 value as the sum of three bf16 values: 8 bits each, 24 together."""
    high, rest = _leading(x)
    middle, rest = _leading(rest)
    low, rest = _leading(rest)
    return high, middle, low


@triton.jit
def _parts(x, SPLIT: tl.constexpr):
    """What takes part in the products: the value itself, or its thirds."""
    if SPLIT:
        parts = _thirds(x)
    else:
        parts = (x,)
    return parts


@triton.jit
def _product(left, right, acc, SPLIT: tl.constexpr):
    """Add left · right to ``acc`` in fp32; fp32 factors in the six larger products of thirds, small ones first."""
    if SPLIT:
        acc = tl.dot(left[2], right[0], acc)
        acc = tl.dot(left[0], right[2], acc)
        acc = tl.dot(left[1], right[1], acc)
        acc = tl.dot(left[1], right[0], acc)
        acc = tl.dot(left[0], right[1], acc)
        acc = tl.dot(left[0], right[0], acc)
    else:
        acc = tl.dot(left[0], right[0], acc, input_precision="ieee")
    return acc


@triton.jit
def _round_to_odd(x, rest):
    """x + rest in fp32 rounded to odd: a later cast to a shorter type then rounds x + rest itself."""
    xi = x.to(tl.int32, bitcast=True)
    toward_zero = xi + ((xi ^ rest.to(tl.int32, bitcast=True)) >> 31)
    return tl.where(rest != 0, toward_zero | 1, xi).to(tl.float32, bitcast=True)


@triton.jit
def _fma_to_odd(a, b, c):
    """a · b + c in fp32 rounded to odd: of its roundings down and up the one whose last bit is set."""
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
    """The factor of each output feature as fp32 value and rest, along rows or, for fan_in_fan_out, columns."""
    if TRANS:
        high = tl.load(factor + 2 * rn, mask=rn < cols, other=0.0)[None, :]
        low = tl.load(factor + 2 * rn + 1, mask=rn < cols, other=0.0)[None, :]
    else:
        high = tl.load(factor + 2 * rm, mask=rm < rows, other=0.0)[:, None]
        low = tl.load(factor + 2 * rm + 1, mask=rm < rows, other=0.0)[:, None]
    return high, low


@triton.jit
def _out(job, OUT_TYPE: tl.constexpr):
    return _pointer(job, OUT, OUT_TYPE), tl.load(job + OUT_STRIDE0), tl.load(job + OUT_STRIDE1)


@triton.jit
def _store(out, rm, rn, rows, cols, x, ALIGNED: tl.constexpr, EVEN: tl.constexpr):
    if ALIGNED:
        ptrs = tl.multiple_of(out[0] + rm[:, None] * out[1] + rn[None, :], (1, 16))
    else:
        ptrs = out[0] + rm[:, None] * out[1] + rn[None, :] * out[2]
    tl.store(ptrs, x.to(out[0].dtype.element_ty), mask=_inside(rm, rn, rows, cols, EVEN))


@triton.jit
def _cancelled_rows(x, acc, s, inside, LIMIT: tl.constexpr, EVEN: tl.constexpr):
    """Whether a row of the tile has an element that is less than LIMIT of the row's largest delta."""
    size = tl.abs(x)
    if not EVEN:
        size = tl.where(inside, size, float("inf"))
    return tl.min(size, axis=1) < tl.max(tl.abs(acc), axis=1) * (LIMIT * tl.abs(s))


@triton.jit
def _note(cancelled, capacity, strip, marks, BM: tl.constexpr):
    """Append each row that has marks: strip and row in the high 32 bits, one bit for each tile in the low ones."""
    found = marks != 0
    place = tl.atomic_add(cancelled + tl.zeros((BM,), tl.int32), 1, mask=found, sem="relaxed")
    entry = ((strip.to(tl.int64) * BM + tl.arange(0, BM)) << 32) | marks.to(tl.int64)
    tl.store(cancelled + 1 + place, entry, mask=found & (place < capacity))


@triton.jit
def merge_tiles(
    jobs, strip_jobs, cancelled, capacity, KIND: tl.constexpr, W_TYPE: tl.constexpr, OUT_TYPE: tl.constexpr,
    AB_TYPE: tl.constexpr, SPLIT: tl.constexpr, TRANS: tl.constexpr, ALIGNED: tl.constexpr,
    R_ALIGNED: tl.constexpr, R_PAD: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, DORA: tl.constexpr,
    NORM: tl.constexpr, EXACT: tl.constexpr, LIMIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    RK: tl.constexpr, STRIP: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Merge a strip of up to STRIP tiles side by side; with NORM write only its parts of the DoRA norm.

    A strip of job -1 is nothing.
    KIND is 0 for a plain base, 1 for 4-bit, 2 for int8. Rows of a tile in which W and the delta cancel to less than
    LIMIT of the row's largest delta are appended to ``cancelled``, a counter and up to ``capacity`` entries, for `mend_rows`.
    """
    strip = tl.program_id(0)
    number = tl.load(strip_jobs + strip)
    if number < 0:
        return
    job = jobs + number.to(tl.int64) * WIDTH
    local = (strip - tl.load(job + FIRST_STRIP)).to(tl.int32)
    rows, cols, r = _extent(job, ALIGNED, R_ALIGNED)
    base, factors, out = _base(job, KIND, W_TYPE, NESTED, ASM), _factors(job, AB_TYPE), _out(job, OUT_TYPE)
    tiles_n = ((cols + BN - 1) // BN).to(tl.int32)
    strips_n = (tiles_n + STRIP - 1) // STRIP
    tile_m, first = local // strips_n, (local % strips_n) * STRIP
    rm = tile_m * BM + tl.arange(0, BM)
    s = tl.load(job + SCALING).to(tl.float64, bitcast=True).to(tl.float32)
    if R_PAD == RK:
        left = _parts(_left_tile(factors, rm, tl.arange(0, RK), rows, r, TRANS, ALIGNED, R_ALIGNED, EVEN), SPLIT)
    marks = tl.zeros((BM,), tl.int32)
    for tile_n in tl.range(first, tl.minimum(first + STRIP, tiles_n), num_stages=STAGES):
        rn = tile_n * BN + tl.arange(0, BN)
        w = _base_tile(job, base, tile_n, rm, rn, rows, cols, KIND, W_TYPE, ALIGNED, EVEN, ASM, BLOCK, NESTED, BM, BN)
        acc = tl.zeros((BM, BN), tl.float32)
        for k in tl.static_range(0, R_PAD, RK):
            rk = k + tl.arange(0, RK)
            if R_PAD != RK:
                left = _parts(_left_tile(factors, rm, rk, rows, r, TRANS, ALIGNED, R_ALIGNED, EVEN), SPLIT)
            right = _parts(_right_tile(factors, rk, rn, r, cols, TRANS, ALIGNED, R_ALIGNED, EVEN), SPLIT)
            acc = _product(left, right, acc, SPLIT)
        w = w.to(tl.float32)
        scale = tl.broadcast_to(s, acc.shape)
        if NORM:
            square = tl.fma(acc, scale, w)
            square = tl.where(_inside(rm, rn, rows, cols, EVEN), square * square, 0.0)
            partial = _pointer(job, PARTIAL, tl.float32)
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
                found = _cancelled_rows(x, acc, s, _inside(rm, rn, rows, cols, EVEN), LIMIT, EVEN)
                marks |= found.to(tl.int32) << (tile_n - first)
            if DORA:
                rest = tl.fma(acc, scale, w - x)
                f_high, f_low = _dora_factors(_pointer(job, FACTOR, tl.float32), rm, rn, rows, cols, TRANS)
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
    AB_TYPE: tl.constexpr, TRANS: tl.constexpr, ALIGNED: tl.constexpr, R_PAD: tl.constexpr, BLOCK: tl.constexpr,
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
        rows, cols, r = _extent(job, ALIGNED, False)
        base, factors, out = _base(job, KIND, W_TYPE, NESTED, ASM), _factors(job, AB_TYPE), _out(job, OUT_TYPE)
        s = tl.load(job + SCALING).to(tl.float64, bitcast=True)
        strips_n = (cols + BN * STRIP - 1) // (BN * STRIP)
        rm = local // strips_n * BM + row + tl.arange(0, 1)
        for t in range(STRIP):
            if (marks >> t) & 1 != 0:
                tile_n = (local % strips_n) * STRIP + t
                rn = tile_n * BN + tl.arange(0, BN)
                w = _base_tile(
                    job, base, tile_n, rm, rn, rows, cols, KIND, W_TYPE, ALIGNED, False, ASM, BLOCK, NESTED, 1, BN
                )
                exact = w.to(tl.float64) + s * _exact_delta(factors, rm, rn, rows, cols, r, TRANS, R_PAD, BN)
                if DORA:
                    f_high, f_low = _dora_factors(_pointer(job, FACTOR, tl.float32), rm, rn, rows, cols, TRANS)
                    exact = exact * (f_high.to(tl.float64) + f_low.to(tl.float64))
                high = exact.to(tl.float32)
                x = _round_to_odd(high, (exact - high.to(tl.float64)).to(tl.float32))
                _store(out, rm, rn, rows, cols, x, ALIGNED, False)


@triton.jit
def _exact_delta(factors, rm, rn, rows, cols, r, TRANS: tl.constexpr, R_PAD: tl.constexpr, BN: tl.constexpr):
    """B·A in one row of a tile in fp64."""
    total = tl.zeros((1, BN), tl.float64)
    for k in range(0, R_PAD, 16):
        rk = k + tl.arange(0, 16)
        left = _left_tile(factors, rm, rk, rows, r, TRANS, False, False, False).to(tl.float64)
        right = _right_tile(factors, rk, rn, r, cols, TRANS, False, False, False).to(tl.float64)
        total += tl.sum(tl.trans(left) * right, axis=0)[None, :]
    return total


@triton.jit
def dora_factor(jobs, M_TYPE: tl.constexpr, TRANS: tl.constexpr, TILE: tl.constexpr, BF: tl.constexpr):
    """magnitude / ‖W + s·B·A‖ of BF output features, in fp64, stored as an fp32 value and its fp32 rest."""
    job = jobs + tl.program_id(0).to(tl.int64) * WIDTH
    if TRANS:
        features, parts = tl.load(job + COLS), (tl.load(job + ROWS) + TILE - 1) // TILE
    else:
        features, parts = tl.load(job + ROWS), (tl.load(job + COLS) + TILE - 1) // TILE
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
