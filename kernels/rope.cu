// Rotary embedding of a fused qkv row together with the append to the cache (src/ops/attention/cuda.rs launches it).
//
// rope_append_8 / _1 (qkv bf16 [T][heads + 2 kv_heads][dim], cache bf16 [blocks][2][kv_heads][16 tokens][dim], positions u32 [T],
//     slots u32 [T], table f32 [positions][dim / 2 cos, dim / 2 sin], heads, kv_heads, dim)
//   Turns queries and keys in place, dimension i with i + dim / 2, and writes keys and values at slot = block 16 + token; none
//   where slot is ~0. grid [T, pieces / 128 up], 128 threads; a piece is 8 (1) pairs of a head. _8: dim % 16 == 0, addresses
//   16-byte aligned.
#include "common.cuh"

constexpr int PAGE = 16;  // tokens of a cache block

template <int PAIRS>
__device__ __forceinline__ void rope_append(bf16 *qkv, bf16 *cache, const uint32_t *positions, const uint32_t *slots,
                                            const float *table, int heads, int kv_heads, int dim) {
    const int half = dim / 2, pieces = half / PAIRS;
    const int piece = blockIdx.y * blockDim.x + threadIdx.x;
    const int head = piece / pieces, d = piece % pieces * PAIRS;
    if (head >= heads + 2 * kv_heads) return;
    const uint32_t slot = load_word(slots + blockIdx.x), position = load_word(positions + blockIdx.x);
    const bool turns = head < heads + kv_heads;
    __align__(16) float cos[PAIRS], sin[PAIRS];
    if (turns) {
        const float *turn = table + (size_t)position * dim + d;
        if constexpr (PAIRS == 8) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                ((float4 *)cos)[i] = ((const float4 *)turn)[i];
                ((float4 *)sin)[i] = ((const float4 *)(turn + half))[i];
            }
        } else {
            cos[0] = turn[0], sin[0] = turn[half];
        }
    }
    pdl_wait();
    pdl_release();
    bf16 *x = qkv + ((size_t)blockIdx.x * (heads + 2 * kv_heads) + head) * dim + d;
    __align__(16) bf16 a[PAIRS], b[PAIRS];
    if constexpr (PAIRS == 8) {
        *(uint4 *)a = *(const uint4 *)x, *(uint4 *)b = *(const uint4 *)(x + half);
    } else {
        a[0] = x[0], b[0] = x[half];
    }
    if (turns) {
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const float u = __bfloat162float(a[i]), v = __bfloat162float(b[i]);
            a[i] = __float2bfloat16_rn(u * cos[i] - v * sin[i]);
            b[i] = __float2bfloat16_rn(v * cos[i] + u * sin[i]);
        }
    }
    auto store = [&](bf16 *to) {
        if constexpr (PAIRS == 8) {
            *(uint4 *)to = *(const uint4 *)a, *(uint4 *)(to + half) = *(const uint4 *)b;
        } else {
            to[0] = a[0], to[half] = b[0];
        }
    };
    if (turns) store(x);
    if (head >= heads && slot != ~0u) {
        // Heads of a block are numbered through keys and values.
        store(cache + ((size_t)(slot / PAGE) * 2 * kv_heads + head - heads) * PAGE * dim + slot % PAGE * dim + d);
    }
}

#define ROPE_APPEND(PAIRS)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(128)                                                                      \
        rope_append_##PAIRS(bf16 *qkv, bf16 *cache, const uint32_t *positions, const uint32_t *slots, const float *table, \
                            int heads, int kv_heads, int dim) {                                                            \
        rope_append<PAIRS>(qkv, cache, positions, slots, table, heads, kv_heads, dim);                                     \
    }
ROPE_APPEND(8)
ROPE_APPEND(1)
