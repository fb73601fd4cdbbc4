// Biases and QK norm: adds the projections' biases, and takes RMS norms of query and key heads, in place (launched from
// src/ops/heads/cuda.rs). One warp per head; the sums over a head have an order fixed by dim.
//
//   bias_and_qk_norm(qkv bf16 [T, (heads + 2 kv_heads) dim], bias f32 [(heads + 2 kv_heads) dim] or null, q_norm and k_norm f32 [dim], both
//                null or neither, eps, heads, kv_heads, touched, dim)
//     x += bias; then for each query (key) head: x /= sqrt(mean(x^2) + eps), x *= q_norm (k_norm). Computed in f32, rounded once. Only the
//     first `touched` heads of each row are read and written. dim is even, at most 256. Grid: (T, touched / 8 rounded up), 256 threads.
//   qk_norm_backward(dqkv, x, q_norm, k_norm, eps, heads, kv_heads, dim)
//     dqkv and x have the shape of qkv; x is the input of the norms. Replaces the gradient of the norms' outputs in dqkv by that of their
//     inputs, for query and key heads. Grid: (T, (heads + kv_heads) / 8 rounded up), 256 threads.

#include "common.cuh"

constexpr int PAIRS = MAX_HEAD_DIM / 64;  // pairs of values that a lane keeps

extern "C" __global__ void __launch_bounds__(256)
bias_and_qk_norm(bf16 *qkv, const float *bias, const float *q_norm, const float *k_norm,
             float eps, int heads, int kv_heads, int touched, int dim) {
    const int head = blockIdx.y * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    pdl_wait();
    if (head < touched) {
        bf162 *to = (bf162 *)(qkv + (size_t)blockIdx.x * (heads + 2 * kv_heads) * dim + (size_t)head * dim);
        // Load, and add the bias.
        float2 x[PAIRS];
        float squares = 0.f;
#pragma unroll
        for (int p = 0; p < PAIRS; p++) {
            const int i = lane + 32 * p;
            if (2 * i < dim) {
                x[p] = __bfloat1622float2(to[i]);
                if (bias) {
                    x[p].x += bias[head * dim + 2 * i];
                    x[p].y += bias[head * dim + 2 * i + 1];
                }
                squares += x[p].x * x[p].x + x[p].y * x[p].y;
            }
        }
        // Reduce, normalise and store.
        const float *weight = head < heads ? q_norm : head < heads + kv_heads ? k_norm : nullptr;
        const float scale = rsqrtf(warp_sum(squares) / dim + eps);
#pragma unroll
        for (int p = 0; p < PAIRS; p++) {
            const int i = lane + 32 * p;
            if (2 * i < dim) {
                if (weight) {
                    x[p].x *= scale * weight[2 * i];
                    x[p].y *= scale * weight[2 * i + 1];
                }
                to[i] = __float22bfloat162_rn(x[p]);
            }
        }
    }
    pdl_release();
}

extern "C" __global__ void __launch_bounds__(256)
qk_norm_backward(bf16 *dqkv, const bf16 *qkv, const float *q_norm, const float *k_norm,
                      float eps, int heads, int kv_heads, int dim) {
    const int head = blockIdx.y * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    pdl_wait();
    if (head < heads + kv_heads) {
        const size_t at = (size_t)blockIdx.x * (heads + 2 * kv_heads) * dim + (size_t)head * dim;
        bf162 *to = (bf162 *)(dqkv + at);
        const bf162 *from = (const bf162 *)(qkv + at);
        const float *weight = head < heads ? q_norm : k_norm;
        // Load.
        float2 x[PAIRS], g[PAIRS];
        float squares = 0.f, product = 0.f;
#pragma unroll
        for (int p = 0; p < PAIRS; p++) {
            const int i = lane + 32 * p;
            if (2 * i < dim) {
                x[p] = __bfloat1622float2(from[i]), g[p] = __bfloat1622float2(to[i]);
                g[p].x *= weight[2 * i];
                g[p].y *= weight[2 * i + 1];
                squares += x[p].x * x[p].x + x[p].y * x[p].y;
                product += x[p].x * g[p].x + x[p].y * g[p].y;
            }
        }
        // Reduce and store.
        const float scale = rsqrtf(warp_sum(squares) / dim + eps);
        const float proj = warp_sum(product) / dim * scale * scale;
#pragma unroll
        for (int p = 0; p < PAIRS; p++) {
            const int i = lane + 32 * p;
            if (2 * i < dim) to[i] = __floats2bfloat162_rn(scale * (g[p].x - proj * x[p].x), scale * (g[p].y - proj * x[p].y));
        }
    }
    pdl_release();
}
