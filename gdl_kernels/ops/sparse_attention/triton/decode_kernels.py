"""The forward pass of few queries: the keys of a row are split among programs, and merged by lse."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...._triton import ceil_div, launch
from .dropout import Dropout, load_seed, survives
from .launch import Call, decode_splits, padded
from .walk import SCALARS, Keys, first_position, kept_keys_of_row, key_tile, list_bounds, load_rows, n_seen_keys

#: Up to how many queries a call is decoding.
DECODED_QUERIES = 16

#: The most heads that a program has; 16 of them go through an instruction.
MEMBERS = 64

#: The most programs that share a row.
MAX_SPLITS = 32

#: How parts are merged. Not tuned yet.
MERGE = {"num_warps": 4}


@triton.jit(do_not_specialize=SCALARS)
def _decode(
    query, key, value, out, lse, lists, table, order, padding, start, seed, places,
    q_strides, k_strides, v_strides, out_strides,
    n_batch, n_heads, group, n_q, n_k, query_start, n_layout_q, n_lines, n_tiles, whole, causal, ragged,
    list_step, order_step, threshold, keep_scale, scale, sharing, n_splits,
    D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, MEMBERS: tl.constexpr, STEP: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    # A program owns one query position of MEMBERS heads, among the ``sharing`` heads that share keys and list, and
    # every ``n_splits``-th tile of that list.
    split = tl.program_id(0) % n_splits
    row = tl.program_id(0) // n_splits % n_q
    team = tl.program_id(0) // n_splits // n_q
    chunks = tl.cdiv(sharing, MEMBERS)
    first_member = team % chunks * MEMBERS
    first_head = team // chunks % (n_heads // sharing) * sharing + first_member
    batch = (team // chunks // (n_heads // sharing)).to(tl.int64)
    member = tl.arange(0, MEMBERS)
    there = first_member + member < sharing  # [MEMBERS]
    heads = (first_head + member).to(tl.int64)

    position = first_position(start, query_start, n_layout_q) + row
    known = position < n_layout_q
    place = position
    head_order = order
    if order is not None:
        head_order = order + first_head.to(tl.int64) * order_step
        place = tl.load(places + first_head.to(tl.int64) * order_step + position, mask=known, other=0)
    batch_padding = padding
    if padding is not None:
        batch_padding = padding + batch * n_k
    keys = Keys(lists, table, head_order, n_layout_q, batch_padding, n_seen_keys(position, 1, n_k, causal))
    lines = (batch * n_heads + heads).to(tl.int32)
    dropout = Dropout(load_seed(seed), threshold, keep_scale, lines[:, None])

    kv_head = (first_head // group).to(tl.int64)
    k_base = key + batch * k_strides[0] + kv_head * k_strides[1]
    v_base = value + batch * v_strides[0] + kv_head * v_strides[1]
    features = tl.arange(0, BLOCK_D)
    q_pointers = query + batch * q_strides[0] + heads[:, None] * q_strides[1] + row.to(tl.int64) * q_strides[2]
    q_mask = there[:, None] & (features < D)[None, :]
    q = tl.load(q_pointers + features[None, :] * q_strides[3], mask=q_mask, other=0.0).to(DOT)

    line = first_head * list_step * n_lines + tl.where(known, place // BLOCK, 0)
    _begin, _none, begin, list_tiles, end = list_bounds(lists, line, 1, BLOCK, STEP)
    acc = tl.zeros([MEMBERS, BLOCK_DV], tl.float32)
    total = tl.zeros([MEMBERS], tl.float32)
    peak = tl.full([MEMBERS], float("-inf"), tl.float32)
    for tile in range(split, tl.where(known, list_tiles, 0), n_splits):
        key_positions, inner, inside = key_tile(keys, begin, end, tile, BLOCK, STEP)
        inside &= kept_keys_of_row(lists, table, begin, end, tile, place % BLOCK, inner, BLOCK, STEP)
        k = load_rows(k_base, key_positions, inside, k_strides, D, BLOCK_D, True)
        scores = tl.dot(q, tl.trans(k.to(DOT)), input_precision="ieee") * (scale * 1.4426950408889634)  # log2(e)
        scores = tl.where(inside[None, :], scores, float("-inf"))  # [MEMBERS, STEP]
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # as in _forward_tiles
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(peak - shift)
        total = total * decay + tl.sum(weights, 1)
        if seed is not None:
            weights = tl.where(survives(dropout, position + member * 0, key_positions, False), weights, 0.0)
        v = load_rows(v_base, key_positions, inside, v_strides, DV, BLOCK_DV, True)
        acc = tl.dot(weights.to(DOT), v.to(DOT), acc * decay[:, None], input_precision="ieee")
        peak = new_peak
    empty = total == 0.0
    norm = 1.0 / tl.where(empty, 1.0, total)
    if seed is not None:
        norm *= keep_scale
    value_features = tl.arange(0, BLOCK_DV)
    out_pointers = out + batch * out_strides[0] + heads[:, None] * out_strides[1] + row.to(tl.int64) * out_strides[2]
    out_pointers += split * out_strides[3] + value_features[None, :] * out_strides[4]
    out_mask = there[:, None] & (value_features < DV)[None, :]
    tl.store(out_pointers, (acc * norm[:, None]).to(out.dtype.element_ty), mask=out_mask)
    natural = (peak + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453  # log(2); peak is -inf where empty
    tl.store(lse + ((batch * n_heads + heads) * n_q + row) * n_splits + split, natural, mask=there)


@triton.jit(do_not_specialize=SCALARS)
def _merge(
    parts, part_lse, out, lse, out_strides, n_heads, n_q, n_splits,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    # out = sum_s exp(lse_s - lse) out_s with lse = log sum_s exp(lse_s): exact, and summed in one order.
    line = tl.program_id(0).to(tl.int64)  # (batch * heads + head) * n_q + row
    splits = tl.arange(0, MAX_SPLITS)
    features = tl.arange(0, BLOCK_DV)
    mask = splits < n_splits
    split_lse = tl.load(part_lse + line * n_splits + splits, mask=mask, other=float("-inf"))
    peak = tl.max(split_lse, 0)
    weights = tl.exp(split_lse - tl.where(peak == float("-inf"), 0.0, peak))  # [MAX_SPLITS]
    total = tl.sum(weights, 0)
    pointers = parts + (line * n_splits + splits)[:, None] * BLOCK_DV + features[None, :]
    part = tl.load(pointers, mask=mask[:, None] & (features < DV)[None, :], other=0.0)
    merged = tl.sum(part * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)  # [BLOCK_DV]
    row, head, batch = line % n_q, line // n_q % n_heads, line // n_q // n_heads
    out += batch * out_strides[0] + head * out_strides[1] + row * out_strides[2]
    tl.store(out + features * out_strides[3], merged.to(out.dtype.element_ty), mask=features < DV)
    tl.store(lse + line, peak + tl.log(tl.where(total == 0.0, 1.0, total)))


def decode(call: Call, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Fill ``out`` and ``lse`` of a call of few queries. Two launches, or one where no row is split."""
    config, constants = call.tiles("decode")
    sharing = call.group if call.list_step == call.order_step == 0 else 1
    members = min(MEMBERS, padded(sharing))
    chunks = ceil_div(sharing, members)
    programs = call.batch * call.heads // sharing * chunks * call.n_q
    n_splits = decode_splits(call.device, programs, config["programs"], MAX_SPLITS)
    parts, part_lse = out[:, :, :, None], lse
    if n_splits > 1:
        shape = (call.batch, call.heads, call.n_q, n_splits)
        # Rows as wide as a tile: their strides, multiples of 16 whatever the lengths, compile one variant.
        parts = torch.empty(*shape, constants["BLOCK_DV"], dtype=torch.float32, device=call.device)
        part_lse = torch.empty(shape, dtype=torch.float32, device=call.device)
    launch(
        _decode, programs * n_splits, call.device,
        query, key, value, parts, part_lse, *call.tensors(call.rows), call.places,
        query.stride(), key.stride(), value.stride(), parts.stride(),
        *call.scalars(call.rows, 0, False), sharing, n_splits, MEMBERS=members, **constants,
    )  # fmt: skip
    if n_splits > 1:
        block_dv = constants["BLOCK_DV"]
        launch(
            _merge, call.batch * call.heads * call.n_q, call.device,
            parts, part_lse, out, lse, out.stride(), call.heads, call.n_q, n_splits,
            DV=call.value_dim, BLOCK_DV=block_dv, MAX_SPLITS=MAX_SPLITS,
            **call.config("merge", (block_dv,), MERGE),
        )  # fmt: skip
