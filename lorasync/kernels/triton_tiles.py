"""What the kernels read: the job table, tiles of W (dequantized in registers) and of the factors."""

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

TRITON_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
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
def job_pointer(job, field, dtype):
    return tl.load(job + field).to(tl.pointer_type(dtype))


@triton.jit
def extent(job, ALIGNED: tl.constexpr, R_ALIGNED: tl.constexpr):
    """Load rows, columns and rank, and tell the compiler what is known of their divisors."""
    rows, cols, r = tl.load(job + ROWS), tl.load(job + COLS), tl.load(job + RANK)
    if ALIGNED:
        cols = tl.multiple_of(cols, 16)
    if R_ALIGNED:
        r = tl.multiple_of(r, 8)
    return rows, cols, r


@triton.jit
def base_source(job, KIND: tl.constexpr, W_TYPE: tl.constexpr, NESTED: tl.constexpr, ASM: tl.constexpr):
    """Load all that dequantizing needs: pointers, strides, code table, nested scales."""
    scales, code, offset, nested = 0, 0, 0, (0, 0, 0)
    if KIND == 0:
        data = job_pointer(job, BASE, W_TYPE)
    elif KIND == 2:
        data = job_pointer(job, BASE, tl.int8)
        scales = job_pointer(job, SCALES, tl.float32)
    else:
        data = job_pointer(job, BASE, tl.uint8)
        if ASM:
            code = code_of_lane(tl.load(job + CODE))
        else:
            code = tl.load(job_pointer(job, CODE, tl.float32) + tl.arange(0, 16))
        offset = tl.load(job + BASE_OFFSET)
        if NESTED:
            scales = job_pointer(job, SCALES, tl.uint8)
            shift = tl.load(job + NESTED_OFFSET).to(tl.float64, bitcast=True).to(tl.float32)
            nested = (
                job_pointer(job, NESTED_ABSMAX, tl.float32),
                job_pointer(job, NESTED_CODE, tl.float32),
                shift,
            )
        else:
            scales = job_pointer(job, SCALES, tl.float32)
    return data, tl.load(job + BASE_STRIDE0), tl.load(job + BASE_STRIDE1), scales, code, offset, nested


@triton.jit
def tile_mask(rm, rn, rows, cols, EVEN: tl.constexpr):
    """Return the mask of a tile; where every tile is whole it is a constant, which the compiler drops."""
    if EVEN:
        mask = tl.full((rm.shape[0], rn.shape[0]), 1, tl.int1)
    else:
        mask = (rm < rows)[:, None] & (rn < cols)[None, :]
    return mask


@triton.jit
def plain_tile(base, rm, rn, rows, cols, ALIGNED: tl.constexpr, EVEN: tl.constexpr):
    """Load a tile of a plain base, as stored."""
    if ALIGNED:
        ptrs = tl.multiple_of(base[0] + rm[:, None] * base[1] + rn[None, :], (1, 16))
    else:
        ptrs = base[0] + rm[:, None] * base[1] + rn[None, :] * base[2]
    return tl.load(ptrs, mask=tile_mask(rm, rn, rows, cols, EVEN), other=0, eviction_policy="evict_first")


@triton.jit
def int8_tile(base, rm, rn, rows, cols, ALIGNED: tl.constexpr, EVEN: tl.constexpr):
    """Load a tile of a Linear8bitLt weight, dequantized in fp32 in bitsandbytes' order: (q · SCB) · (1/127)."""
    q = plain_tile(base, rm, rn, rows, cols, ALIGNED, EVEN)
    scb = tl.load(base[3] + rm, mask=rm < rows, other=0.0)
    return q.to(tl.int32).to(tl.float32) * scb[:, None] * INV_127


@triton.jit
def block_scale(base, index, mask, NESTED: tl.constexpr):
    """Load the scale of 4-bit block ``index``; a nested one is itself 8-bit: code[q] · absmax2 + offset."""
    if NESTED:
        q = tl.load(base[3] + index, mask=mask, other=0).to(tl.int32)
        outer = tl.load(base[6][0] + index // NESTED_BLOCK, mask=mask, other=0.0)
        scale = tl.load(base[6][1] + q, mask=mask, other=0.0) * outer + base[6][2]
    else:
        scale = tl.load(base[3] + index, mask=mask, other=0.0)
    return scale


@triton.jit
def packed_tile_flat(
    base, rm, rows, cols, tile_n, W_TYPE: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr,
    EVEN: tl.constexpr, ASM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Load a tile of a 4-bit base whose quantization blocks lie inside rows: by words of 8 codes, one scale a block."""
    words_in_row = tl.multiple_of(cols // 8, 4)
    start = rm * base[1] + base[5] + tile_n * BN
    column = tl.arange(0, BN // 8)
    mask = tile_mask(rm, tile_n * (BN // 8) + column, rows, words_in_row, EVEN)
    ptrs = base[0].to(tl.pointer_type(tl.int32)) + (start // 8)[:, None] + column[None, :]
    words = tl.load(tl.multiple_of(ptrs, (1, 16)), mask=mask, other=0, eviction_policy="evict_first")
    if BLOCK < BN:
        blocks = tl.arange(0, BN // BLOCK)
        inside = tile_mask(rm, tile_n * (BN // 8) + blocks * (BLOCK // 8), rows, words_in_row, EVEN)
        absmax = block_scale(base, (start // BLOCK)[:, None] + blocks[None, :], inside, NESTED)
        scale = tl.broadcast_to(absmax[:, :, None], (BM, BN // BLOCK, BLOCK // 8)).reshape((BM, BN // 8))
    else:
        absmax = block_scale(base, start // BLOCK, rm < rows, NESTED)
        scale = tl.broadcast_to(absmax[:, None], (BM, BN // 8))
    if ASM:
        v0, v1, v2, v3, v4, v5, v6, v7 = shuffled(words, tl.broadcast_to(base[4], words.shape))
    else:
        v0, v1 = looked_up(base[4], words >> 4, BM, BN), looked_up(base[4], words, BM, BN)
        v2, v3 = looked_up(base[4], words >> 12, BM, BN), looked_up(base[4], words >> 8, BM, BN)
        v4, v5 = looked_up(base[4], words >> 20, BM, BN), looked_up(base[4], words >> 16, BM, BN)
        v6, v7 = looked_up(base[4], words >> 28, BM, BN), looked_up(base[4], words >> 24, BM, BN)
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
def looked_up(code, index, BM: tl.constexpr, BN: tl.constexpr):
    return tl.gather(code, (index & 15).reshape((BM * (BN // 8),)), 0).reshape((BM, BN // 8))


@triton.jit
def code_of_lane(address):
    """Return, in each thread, the value of the 4-bit code that the thread's lane number ends in."""
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
def shuffled(words, code_of_lane):
    """Return the values of the eight codes in each word, in order: bytes upward, the high four bits of each byte first.

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
        dtype=(tl.float32,) * 8,
        is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def packed_tile(job, base, rm, rn, rows, cols, BLOCK: tl.constexpr, NESTED: tl.constexpr):
    """Load a tile of any 4-bit base, element by element."""
    mask = tile_mask(rm, rn, rows, cols, False)
    flat = rm[:, None] * base[1] + base[5] + rn[None, :]
    packed = tl.load(base[0] + flat // 2, mask=mask, other=0).to(tl.int32)
    nibble = tl.where(flat % 2 == 0, packed >> 4, packed & 15)
    return tl.load(job_pointer(job, CODE, tl.float32) + nibble) * block_scale(
        base, flat // BLOCK, mask, NESTED
    )


@triton.jit
def base_tile(
    job, base, tile_n, rm, rn, rows, cols, KIND: tl.constexpr, W_TYPE: tl.constexpr, ALIGNED: tl.constexpr,
    EVEN: tl.constexpr, ASM: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Load a tile of W in the dtype that it is stored in or dequantized to."""
    if KIND == 0:
        w = plain_tile(base, rm, rn, rows, cols, ALIGNED, EVEN)
    elif KIND == 2:
        w = int8_tile(base, rm, rn, rows, cols, ALIGNED, EVEN).to(W_TYPE)
    elif ALIGNED:
        w = packed_tile_flat(base, rm, rows, cols, tile_n, W_TYPE, BLOCK, NESTED, EVEN, ASM, BM, BN)
    else:
        w = packed_tile(job, base, rm, rn, rows, cols, BLOCK, NESTED).to(W_TYPE)
    return w


@triton.jit
def factor_source(job, AB_TYPE: tl.constexpr):
    """Load pointer and stride of A, then of B."""
    a, b = job_pointer(job, LORA_A, AB_TYPE), job_pointer(job, LORA_B, AB_TYPE)
    return a, tl.load(job + LORA_A_STRIDE), b, tl.load(job + LORA_B_STRIDE)


@triton.jit
def left_tile(
    factors,
    rm,
    rk,
    rows,
    r,
    TRANS: tl.constexpr,
    ALIGNED: tl.constexpr,
    R_ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Load rows of the left factor of the delta: of B, or of Aᵀ for fan_in_fan_out."""
    if TRANS:
        tile = tl.trans(a_tile(factors, rk, rm, r, rows, ALIGNED, EVEN))
    else:
        tile = b_tile(factors, rm, rk, rows, r, R_ALIGNED, EVEN)
    return tile


@triton.jit
def right_tile(
    factors,
    rk,
    rn,
    r,
    cols,
    TRANS: tl.constexpr,
    ALIGNED: tl.constexpr,
    R_ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Load columns of the right factor of the delta: of A, or of Bᵀ for fan_in_fan_out."""
    if TRANS:
        tile = tl.trans(b_tile(factors, rn, rk, cols, r, R_ALIGNED, EVEN))
    else:
        tile = a_tile(factors, rk, rn, r, cols, ALIGNED, EVEN)
    return tile


@triton.jit
def a_tile(factors, rk, rn, r, n_in, ALIGNED: tl.constexpr, EVEN: tl.constexpr):
    ptrs = factors[0] + rk[:, None] * factors[1] + rn[None, :]
    if ALIGNED:
        ptrs = tl.multiple_of(ptrs, (1, 16))
    return tl.load(ptrs, mask=tile_mask(rk, rn, r, n_in, EVEN), other=0.0)


@triton.jit
def b_tile(factors, rn, rk, n_out, r, R_ALIGNED: tl.constexpr, EVEN: tl.constexpr):
    ptrs = factors[2] + rn[:, None] * factors[3] + rk[None, :]
    if R_ALIGNED:
        ptrs = tl.multiple_of(ptrs, (1, 16))
    return tl.load(ptrs, mask=tile_mask(rn, rk, n_out, r, EVEN), other=0.0)
