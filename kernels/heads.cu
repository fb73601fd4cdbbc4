// Biases of projected heads, and RMS norms of query and key heads, in place. A warp a head; a head's sum has an order fixed by dim.
//
// finish_heads(qkv bf16 [T, (heads + 2 kv_heads) dim], bias f32 [(heads + 2 kv_heads) dim] or null, q_norm and k_norm f32 [dim],
//              both null or neither, eps, heads, kv_heads, touched, dim)
//   x += bias; then for each query (key) head: x /= sqrt(mean(x^2) + eps), x *= q_norm (k_norm). Sums in f32, rounded once.
//   Only the first `touched` heads are read and written. dim is even, at most 256. Grid (T, touched / 8 up), 256 threads.
// finish_heads_backward(dqkv, x both as qkv, q_norm, k_norm, eps, heads, kv_heads, dim)
//   dqkv of query and key heads, the gradient of the norms' results, becomes that of the x they were taken of. The same grid.

#include "common.cuh"

// Pairs of values a lane keeps.
constexpr int PAIRS = 4;

extern "C" __global__ void __launch_bounds__(256)
finish_heads(bf16 *qkv, const float *bias, const float *q_norm, const float *k_norm,
             float eps, int heads, int kv_heads, int touched, int dim) {
    const int head = blockIdx.y * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    pdl_wait();
    if (head < touched) {
        bf162 *to = (bf162 *)(qkv + (size_t)blockIdx.x * (heads + 2 * kv_heads) * dim + (size_t)head * dim);
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
finish_heads_backward(bf16 *dqkv, const bf16 *qkv, const float *q_norm, const float *k_norm,
                      float eps, int heads, int kv_heads, int dim) {
    const int head = blockIdx.y * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    pdl_wait();
    if (head < heads + kv_heads) {
        const size_t at = (size_t)blockIdx.x * (heads + 2 * kv_heads) * dim + (size_t)head * dim;
        bf162 *to = (bf162 *)(dqkv + at);
        const bf162 *from = (const bf162 *)(qkv + at);
        const float *weight = head < heads ? q_norm : k_norm;
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
        const float scale = rsqrtf(warp_sum(squares) / dim + eps);
        const float share = warp_sum(product) / dim * scale * scale;
#pragma unroll
        for (int p = 0; p < PAIRS; p++) {
            const int i = lane + 32 * p;
            if (2 * i < dim) to[i] = __floats2bfloat162_rn(scale * (g[p].x - share * x[p].x), scale * (g[p].y - share * x[p].y));
        }
    }
    pdl_release();
}
