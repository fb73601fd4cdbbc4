// RMSNorm, alone or after a residual sum. One block a row, 4 values a thread and round; a row's sum has an order fixed by n.
//
// rms_norm(x f32 [T, n], weight f32 [n], eps, n, y bf16 [T, n])
// add_rms_norm(x f32 [T, n], delta bf16 [T, n], weight f32 [n], eps, n, sum f32 [T, n], y bf16 [T, n])
//   sum = x + delta, y = norm(sum). n is a multiple of 4; grid T, threads a multiple of 32.

#include "common.cuh"

// Sum over the block, the same in every thread.
__device__ __forceinline__ float block_sum(float v) {
    __shared__ float parts[32];
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
    __syncthreads();
    return warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? parts[threadIdx.x % 32] : 0.f);
}

// Rounds of values that stay in registers: rows up to 4 * 1024 * ROUNDS.
constexpr int ROUNDS = 4;

template <bool ADD>
__device__ __forceinline__ void norm(const float *x, const bf16 *delta, const float *weight,
                                     float eps, int n, float *sum, bf16 *y) {
    const size_t row = (size_t)blockIdx.x * n;
    pdl_wait();
    float4 v[ROUNDS];
    float squares = 0.f;
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
        const int i = 4 * (threadIdx.x + r * blockDim.x);
        if (i < n) {
            v[r] = *(const float4 *)(x + row + i);
            if constexpr (ADD) {
                const uint2 d = *(const uint2 *)(delta + row + i);
                const float2 lo = __bfloat1622float2(*(const bf162 *)&d.x), hi = __bfloat1622float2(*(const bf162 *)&d.y);
                v[r].x += lo.x, v[r].y += lo.y, v[r].z += hi.x, v[r].w += hi.y;
                *(float4 *)(sum + row + i) = v[r];
            }
            squares += v[r].x * v[r].x + v[r].y * v[r].y + v[r].z * v[r].z + v[r].w * v[r].w;
        }
    }
    const float scale = rsqrtf(block_sum(squares) / n + eps);
    pdl_release();
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

extern "C" __global__ void __launch_bounds__(1024) rms_norm(const float *x, const float *weight, float eps, int n, bf16 *y) {
    norm<false>(x, nullptr, weight, eps, n, nullptr, y);
}

extern "C" __global__ void __launch_bounds__(1024)
    add_rms_norm(const float *x, const bf16 *delta, const float *weight, float eps, int n, float *sum, bf16 *y) {
    norm<true>(x, delta, weight, eps, n, sum, y);
}
