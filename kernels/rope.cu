// Rotary position embedding (RoPE): of a fused qkv row together with the append to the KV cache (launched from
// src/ops/attention/cuda.rs), or alone, forward and backward (launched from src/ops/rope/cuda.rs). Rotates dimension i with i + dim / 2.
//
// table: f32 [positions][dim / 2 cosines, dim / 2 sines]. _8 / _1: pairs of dimensions that a thread takes; _8 needs dim % 16 == 0 and
// 16-byte alignment.
//
//   rope_append_8 / _1 (qkv bf16 [T][heads + 2 kv_heads][dim], cache bf16 [blocks][2][kv_heads][16 tokens][dim], positions u32 [T],
//                       slots u32 [T], table, heads, kv_heads, dim)
//     Rotates queries and keys in place, and writes keys and values to the cache at slot = 16 block + token; not where slot is ~0.
//     Grid: (T, (heads + 2 kv_heads) dim / 2 / pairs / 128 rounded up), 128 threads.
//   apply_rope_8 / _1 (x bf16 [T][width], positions u32 [T], table, heads, width, dim, side)
//     Rotates the first `heads` heads of each row in place, forward (side 1) or back (-1).
//     Grid: (T, heads dim / 2 / pairs / 128 rounded up), 128 threads.
#include "common.cuh"

// PAIRS dimensions of the first half of a head (a), and those that they are rotated with (b).
template <int PAIRS> struct HeadPairs {
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

// The cosines and sines of their angles.
template <int PAIRS> struct Rotation {
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

    __device__ __forceinline__ void apply(HeadPairs<PAIRS> &x, float direction) const {
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const float u = __bfloat162float(x.a[i]), v = __bfloat162float(x.b[i]), s = direction * sin[i];
            x.a[i] = __float2bfloat16_rn(u * cos[i] - v * s);
            x.b[i] = __float2bfloat16_rn(v * cos[i] + u * s);
        }
    }
};

// PAIRS: pairs of dimensions of a thread, 8 or 1.
template <int PAIRS>
__device__ __forceinline__ void rope_append(bf16 *qkv, bf16 *cache, const uint32_t *positions, const uint32_t *slots,
                                            const float *table, int heads, int kv_heads, int dim) {
    const int half = dim / 2, per_head = half / PAIRS;
    const int i = blockIdx.y * blockDim.x + threadIdx.x;
    const int head = i / per_head, d = i % per_head * PAIRS;
    // With few rows, attention may start early and prefetch keys. With many rows that would take bandwidth from kernels that still run
    // (measured in benches/results/2026-11-27-h100).
    const bool few = gridDim.x <= 16;
    if (few) pdl_release();
    if (head >= heads + 2 * kv_heads) return;
    // Load the position and its angles, which need no wait for the previous kernel.
    const uint32_t slot = load_word(slots + blockIdx.x), position = load_word(positions + blockIdx.x);
    const bool rotates = head < heads + kv_heads;
    Rotation<PAIRS> rotation;
    if (rotates) rotation.load(table + (size_t)position * dim + d, half);
    pdl_wait();
    if (!few) pdl_release();
    // Rotate.
    bf16 *at = qkv + ((size_t)blockIdx.x * (heads + 2 * kv_heads) + head) * dim + d;
    HeadPairs<PAIRS> x;
    x.load(at, half);
    if (rotates) {
        rotation.apply(x, 1.f);
        x.store(at, half);
    }
    // Append to the cache.
    if (head >= heads && slot != ~0u) {
        // In a KV block, value heads follow key heads, as they do in qkv.
        x.store(cache + ((size_t)(slot / KV_BLOCK) * 2 * kv_heads + head - heads) * KV_BLOCK * dim + slot % KV_BLOCK * dim + d, half);
    }
}

// PAIRS: pairs of dimensions of a thread, 8 or 1.
template <int PAIRS>
__device__ __forceinline__ void apply_rope(bf16 *x, const uint32_t *positions, const float *table, int heads, int width, int dim,
                                          float side) {
    const int half = dim / 2, per_head = half / PAIRS;
    const int i = blockIdx.y * blockDim.x + threadIdx.x;
    const int head = i / per_head, d = i % per_head * PAIRS;
    pdl_wait();
    pdl_release();
    if (head >= heads) return;
    Rotation<PAIRS> rotation;
    rotation.load(table + (size_t)positions[blockIdx.x] * dim + d, half);
    bf16 *at = x + (size_t)blockIdx.x * width + head * dim + d;
    HeadPairs<PAIRS> values;
    values.load(at, half);
    rotation.apply(values, side);
    values.store(at, half);
}

#define ROPE(PAIRS)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(ROPE_THREADS)                                                             \
        rope_append_##PAIRS(bf16 *qkv, bf16 *cache, const uint32_t *positions, const uint32_t *slots, const float *table, \
                            int heads, int kv_heads, int dim) {                                                            \
        rope_append<PAIRS>(qkv, cache, positions, slots, table, heads, kv_heads, dim);                                     \
    }                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(ROPE_THREADS)                                                             \
        apply_rope_##PAIRS(bf16 *x, const uint32_t *positions, const float *table, int heads, int width, int dim, float side) { \
        apply_rope<PAIRS>(x, positions, table, heads, width, dim, side);                                                    \
    }
ROPE(8)
ROPE(1)
