// RMSNorm, alone or after adding the residual, and its gradient (launched from src/ops/norm/cuda.rs). One thread block per row, 4 values
// per thread and round. The sums over a row have an order fixed by n.
//
//   rms_norm(x f32 [T, n], weight f32 [n], eps, n, y bf16 [T, n])
//   add_rms_norm(x f32 [T, n], delta bf16 [T, n], weight f32 [n], eps, n, sum f32 [T, n], y bf16 [T, n])
//     sum = x + delta, y = norm(sum).
//   rms_norm_backward(x f32 [T, n], weight f32 [n], dy bf16 [T, n], residual f32 [T, n] or null, eps, n, dx f32 [T, n])
//     dx = residual + (weight dy - x sum(x weight dy) / (n (mean(x^2) + eps))) / sqrt(mean(x^2) + eps).
//   n is a multiple of 4, at most 16384. Grid: T; the number of threads is a multiple of 32, at least n / 16.

#include "common.cuh"

// Sum over the thread block, the same in every thread. Each call in a kernel needs an array of its own.
__device__ __forceinline__ float block_sum(float v, float *parts) {
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
    __syncthreads();
    return warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? parts[threadIdx.x % 32] : 0.f);
}

// Loads four values.
__device__ __forceinline__ float4 load_bf16(const bf16 *from) {
    const uint2 v = *(const uint2 *)from;
    const float2 lo = __bfloat1622float2(*(const bf162 *)&v.x), hi = __bfloat1622float2(*(const bf162 *)&v.y);
    return make_float4(lo.x, lo.y, hi.x, hi.y);
}

constexpr int ROUNDS = NORM_VALUES_PER_THREAD / 4;  // rounds of 4 values that a thread keeps in registers: rows up to 4 * 1024 * ROUNDS

// ADD: whether to add delta first, and store the sum.
template <bool ADD>
__device__ __forceinline__ void norm(const float *x, const bf16 *delta, const float *weight,
                                     float eps, int n, float *sum, bf16 *y) {
    const size_t row = (size_t)blockIdx.x * n;
    pdl_release();
    pdl_wait();
    // Load, and add the residual.
    float4 v[ROUNDS];
    float squares = 0.f;
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
        const int i = 4 * (threadIdx.x + r * blockDim.x);
        if (i < n) {
            v[r] = *(const float4 *)(x + row + i);
            if constexpr (ADD) {
                const float4 d = load_bf16(delta + row + i);
                v[r].x += d.x, v[r].y += d.y, v[r].z += d.z, v[r].w += d.w;
                *(float4 *)(sum + row + i) = v[r];
            }
            squares += v[r].x * v[r].x + v[r].y * v[r].y + v[r].z * v[r].z + v[r].w * v[r].w;
        }
    }
    // Reduce, normalise and store.
    __shared__ float parts[32];
    const float scale = rsqrtf(block_sum(squares, parts) / n + eps);
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
        const int i = 4 * (threadIdx.x + r * blockDim.x);
        if (i < n) {
            const float4 w = *(const float4 *)(weight + i);
            const bf162 lo = __floats2bfloat162_rn(v[r].x * scale * w.x, v[r].y * scale * w.y);
            const bf162 hi = __floats2bfloat162_rn(v[r].z * scale * w.z, v[r].w * scale * w.w);
            *(uint2 *)(y + row + i) = make_uint2(*(const uint32_t *)&lo, *(const uint32_t *)&hi);
        }
    }
}

extern "C" __global__ void __launch_bounds__(1024)
    rms_norm_backward(const float *x, const float *weight, const bf16 *dy, const float *residual, float eps, int n, float *dx) {
    const size_t row = (size_t)blockIdx.x * n;
    pdl_wait();
    // Load.
    float4 v[ROUNDS], g[ROUNDS];
    float squares = 0.f, product = 0.f;
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
        const int i = 4 * (threadIdx.x + r * blockDim.x);
        if (i < n) {
            v[r] = *(const float4 *)(x + row + i), g[r] = load_bf16(dy + row + i);
            const float4 w = *(const float4 *)(weight + i);
            g[r].x *= w.x, g[r].y *= w.y, g[r].z *= w.z, g[r].w *= w.w;
            squares += v[r].x * v[r].x + v[r].y * v[r].y + v[r].z * v[r].z + v[r].w * v[r].w;
            product += v[r].x * g[r].x + v[r].y * g[r].y + v[r].z * g[r].z + v[r].w * g[r].w;
        }
    }
    // Reduce and store.
    __shared__ float parts[2][32];
    const float scale = rsqrtf(block_sum(squares, parts[0]) / n + eps);
    const float proj = block_sum(product, parts[1]) / n * scale * scale;
    pdl_release();
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
        const int i = 4 * (threadIdx.x + r * blockDim.x);
        if (i < n) {
            const float4 b = residual ? *(const float4 *)(residual + row + i) : make_float4(0.f, 0.f, 0.f, 0.f);
            *(float4 *)(dx + row + i) = make_float4(b.x + scale * (g[r].x - proj * v[r].x), b.y + scale * (g[r].y - proj * v[r].y),
                                                    b.z + scale * (g[r].z - proj * v[r].z), b.w + scale * (g[r].w - proj * v[r].w));
        }
    }
}

extern "C" __global__ void __launch_bounds__(1024) rms_norm(const float *x, const float *weight, float eps, int n, bf16 *y) {
    norm<false>(x, nullptr, weight, eps, n, nullptr, y);
}

extern "C" __global__ void __launch_bounds__(1024)
    add_rms_norm(const float *x, const bf16 *delta, const float *weight, float eps, int n, float *sum, bf16 *y) {
    norm<true>(x, delta, weight, eps, n, sum, y);
}
