// Rotary embedding: of a fused qkv row together with the append to the cache (src/ops/attention/cuda.rs launches it), or alone.
//
// rope_append_8 / _1 (qkv bf16 [T][heads + 2 kv_heads][dim], cache bf16 [blocks][2][kv_heads][16 tokens][dim], positions u32 [T],
//     slots u32 [T], table f32 [positions][dim / 2 cos, dim / 2 sin], heads, kv_heads, dim)
//   Turns queries and keys in place, dimension i with i + dim / 2, and writes keys and values at slot = block 16 + token; none
//   where slot is ~0. grid [T, pieces / 128 up], 128 threads; a piece is 8 (1) pairs of a head. _8: dim % 16 == 0, addresses
//   16-byte aligned.
// rope_turn_8 / _1 (x bf16 [T][width], positions u32 [T], table, heads, width, dim, side)
//   Turns the first `heads` heads of each row in place, forward (side 1) or back (-1). grid [T, pieces / 128 up], 128 threads.
#include "common.cuh"

constexpr int PAGE = 16;  // tokens of a cache block

// PAIRS dimensions i of a head, and as many i + dim / 2.
template <int PAIRS> struct Piece {
    __align__(16) bf16 a[PAIRS], b[PAIRS];

    __device__ __forceinline__ void load(const bf16 *from, int half) {
        if constexpr (PAIRS == 8) {
            *(uint4 *)a = *(const uint4 *)from, *(uint4 *)b = *(const uint4 *)(from + half);
        } else {
            a[0] = from[0], b[0] = from[half];
        }
    }

    __device__ __forceinline__ void store(bf16 *to, int half) const {
        if constexpr (PAIRS == 8) {
            *(uint4 *)to = *(const uint4 *)a, *(uint4 *)(to + half) = *(const uint4 *)b;
        } else {
            to[0] = a[0], to[half] = b[0];
        }
    }
};

// Their angles.
template <int PAIRS> struct Turn {
    __align__(16) float cos[PAIRS], sin[PAIRS];

    __device__ __forceinline__ void load(const float *from, int half) {
        if constexpr (PAIRS == 8) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                ((float4 *)cos)[i] = ((const float4 *)from)[i];
                ((float4 *)sin)[i] = ((const float4 *)(from + half))[i];
            }
        } else {
            cos[0] = from[0], sin[0] = from[half];
        }
    }

    __device__ __forceinline__ void apply(Piece<PAIRS> &x, float side) const {
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const float u = __bfloat162float(x.a[i]), v = __bfloat162float(x.b[i]), s = side * sin[i];
            x.a[i] = __float2bfloat16_rn(u * cos[i] - v * s);
            x.b[i] = __float2bfloat16_rn(v * cos[i] + u * s);
        }
    }
};

template <int PAIRS>
__device__ __forceinline__ void rope_append(bf16 *qkv, bf16 *cache, const uint32_t *positions, const uint32_t *slots,
                                            const float *table, int heads, int kv_heads, int dim) {
    const int half = dim / 2, pieces = half / PAIRS;
    const int piece = blockIdx.y * blockDim.x + threadIdx.x;
    const int head = piece / pieces, d = piece % pieces * PAIRS;
    // Attention may ask for keys early where they are few; for many rows it would take bandwidth from kernels that still run
    // (benches/results/2026-11-27-h100).
    const bool few = gridDim.x <= 16;
    if (few) pdl_release();
    if (head >= heads + 2 * kv_heads) return;
    const uint32_t slot = load_word(slots + blockIdx.x), position = load_word(positions + blockIdx.x);
    const bool turns = head < heads + kv_heads;
    Turn<PAIRS> turn;
    if (turns) turn.load(table + (size_t)position * dim + d, half);
    pdl_wait();
    if (!few) pdl_release();
    bf16 *at = qkv + ((size_t)blockIdx.x * (heads + 2 * kv_heads) + head) * dim + d;
    Piece<PAIRS> x;
    x.load(at, half);
    if (turns) {
        turn.apply(x, 1.f);
        x.store(at, half);
    }
    if (head >= heads && slot != ~0u) {
        // Heads of a block are numbered through keys and values.
        x.store(cache + ((size_t)(slot / PAGE) * 2 * kv_heads + head - heads) * PAGE * dim + slot % PAGE * dim + d, half);
    }
}

template <int PAIRS>
__device__ __forceinline__ void rope_turn(bf16 *x, const uint32_t *positions, const float *table, int heads, int width, int dim,
                                          float side) {
    const int half = dim / 2, pieces = half / PAIRS;
    const int piece = blockIdx.y * blockDim.x + threadIdx.x;
    const int head = piece / pieces, d = piece % pieces * PAIRS;
    pdl_wait();
    pdl_release();
    if (head >= heads) return;
    Turn<PAIRS> turn;
    turn.load(table + (size_t)positions[blockIdx.x] * dim + d, half);
    bf16 *at = x + (size_t)blockIdx.x * width + head * dim + d;
    Piece<PAIRS> values;
    values.load(at, half);
    turn.apply(values, side);
    values.store(at, half);
}

#define ROPE(PAIRS)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(128)                                                                      \
        rope_append_##PAIRS(bf16 *qkv, bf16 *cache, const uint32_t *positions, const uint32_t *slots, const float *table, \
                            int heads, int kv_heads, int dim) {                                                            \
        rope_append<PAIRS>(qkv, cache, positions, slots, table, heads, kv_heads, dim);                                     \
    }                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(128)                                                                      \
        rope_turn_##PAIRS(bf16 *x, const uint32_t *positions, const float *table, int heads, int width, int dim, float side) { \
        rope_turn<PAIRS>(x, positions, table, heads, width, dim, side);                                                    \
    }
ROPE(8)
ROPE(1)
