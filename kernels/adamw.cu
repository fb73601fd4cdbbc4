// Optimiser steps over flat buffers (src/ops/adamw/cuda.rs launches it; formulas and settings: src/ops/adamw.rs).
//
// p and g: f32 [n], 16-byte aligned. FACTORS: grad scale, beta1, 1 - beta1, beta2, 1 - beta2, 1 - lr decay, lr / (1 - beta1^t),
// 1 / sqrt(1 - beta2^t), eps.
//
// adamw(p, g, m f32 [n], v f32 [n], n, FACTORS)
//   Grid n / 1024 up, 256 threads.
// adamw8bit(p, g, m, v u8 [n / 256 up][260]: codes and their f32, maps, n, FACTORS)
//   maps: f32 [2][512], of each moment the 256 values of codes, ascending, 255 midpoints, and one that is not read. A warp a block
//   of 256 values; grid n / 2048 up, 256 threads.
// squares(x f32 [n], n, sums f32 [blocks])
//   sums[b]: of the squares that block b of 256 threads takes, four a thread and round.

#include "common.cuh"

struct Factors {
    float scale, beta1, rest1, beta2, rest2, keep, size, root, eps;

    __device__ __forceinline__ void average(float g, float &m, float &v) const {
        g *= scale;
        m = beta1 * m + rest1 * g;
        v = beta2 * v + rest2 * (g * g);
    }

    __device__ __forceinline__ float moved(float p, float m, float v) const {
        return p * keep - size * (m / (sqrtf(v) * root + eps));
    }
};

#define FACTORS_ARGS float scale, float beta1, float rest1, float beta2, float rest2, float keep, float size, float root, float eps
#define FACTORS {scale, beta1, rest1, beta2, rest2, keep, size, root, eps}

// Four values from i on, zeros past n.
__device__ __forceinline__ float4 load4(const float *x, size_t i, size_t n) {
    if (i + 4 <= n) return *(const float4 *)(x + i);
    return make_float4(i < n ? x[i] : 0.f, i + 1 < n ? x[i + 1] : 0.f, i + 2 < n ? x[i + 2] : 0.f, 0.f);
}

__device__ __forceinline__ void store4(float *x, size_t i, size_t n, float4 v) {
    if (i + 4 <= n) {
        *(float4 *)(x + i) = v;
    } else {
        if (i < n) x[i] = v.x;
        if (i + 1 < n) x[i + 1] = v.y;
        if (i + 2 < n) x[i + 2] = v.z;
    }
}

extern "C" __global__ void __launch_bounds__(256) adamw(float *p, const float *g, float *m, float *v, int n, FACTORS_ARGS) {
    const Factors f = FACTORS;
    pdl_wait();
    pdl_release();
    const size_t i = 4 * ((size_t)blockIdx.x * 256 + threadIdx.x);
    float4 a = load4(p, i, n), b = load4(m, i, n), c = load4(v, i, n);
    const float4 d = load4(g, i, n);
    f.average(d.x, b.x, c.x), f.average(d.y, b.y, c.y), f.average(d.z, b.z, c.z), f.average(d.w, b.w, c.w);
    a.x = f.moved(a.x, b.x, c.x), a.y = f.moved(a.y, b.y, c.y), a.z = f.moved(a.z, b.z, c.z), a.w = f.moved(a.w, b.w, c.w);
    store4(p, i, n, a), store4(m, i, n, b), store4(v, i, n, c);
}

constexpr int BLOCK = 256, WORDS = BLOCK / 4 + 1;

// How many midpoints are below x.
__device__ __forceinline__ uint32_t nearest(const float *midpoints, float x) {
    uint32_t code = 0;
#pragma unroll
    for (int half = 128; half; half /= 2) code += midpoints[code + half - 1] < x ? half : 0;
    return code;
}

__device__ __forceinline__ float4 values(const float *map, uint32_t codes, float scale) {
    return make_float4(map[codes & 255] * scale, map[codes >> 8 & 255] * scale, map[codes >> 16 & 255] * scale, map[codes >> 24] * scale);
}

__device__ __forceinline__ float largest(float4 x) { return fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w))); }

// Rounds a warp's block, whose words 0 and 1 of a lane are `lane` and `lane + 32`.
__device__ __forceinline__ void store_codes(uint32_t *to, const float *midpoints, const float4 (&x)[2], int lane) {
    const float max = warp_max(fmaxf(largest(x[0]), largest(x[1])));
    const float inverse = max > 0.f ? 1.f / max : 0.f;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float4 v = x[i];
        to[lane + 32 * i] = nearest(midpoints, v.x * inverse) | nearest(midpoints, v.y * inverse) << 8 |
                            nearest(midpoints, v.z * inverse) << 16 | nearest(midpoints, v.w * inverse) << 24;
    }
    if (lane == 0) to[WORDS - 1] = __float_as_uint(max);
}

extern "C" __global__ void __launch_bounds__(256)
    adamw8bit(float *p, const float *g, uint32_t *m, uint32_t *v, const float *maps, int n, FACTORS_ARGS) {
    __shared__ float shared[4 * BLOCK];
    const Factors f = FACTORS;
    pdl_wait();
    pdl_release();
    ((float4 *)shared)[threadIdx.x] = ((const float4 *)maps)[threadIdx.x];
    __syncthreads();
    const float *m_map = shared, *v_map = shared + 2 * BLOCK;
    const int lane = threadIdx.x % 32;
    const size_t block = (size_t)blockIdx.x * 8 + threadIdx.x / 32, first = block * BLOCK + 4 * lane;
    if (block * BLOCK >= n) return;
    m += block * WORDS, v += block * WORDS;
    const float m_scale = __uint_as_float(m[WORDS - 1]), v_scale = __uint_as_float(v[WORDS - 1]);
    float4 a[2], b[2], c[2], d[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        a[i] = load4(p, first + 128 * i, n), d[i] = load4(g, first + 128 * i, n);
        b[i] = values(m_map, m[lane + 32 * i], m_scale), c[i] = values(v_map, v[lane + 32 * i], v_scale);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        f.average(d[i].x, b[i].x, c[i].x), f.average(d[i].y, b[i].y, c[i].y);
        f.average(d[i].z, b[i].z, c[i].z), f.average(d[i].w, b[i].w, c[i].w);
        const float4 moved = make_float4(f.moved(a[i].x, b[i].x, c[i].x), f.moved(a[i].y, b[i].y, c[i].y),
                                         f.moved(a[i].z, b[i].z, c[i].z), f.moved(a[i].w, b[i].w, c[i].w));
        store4(p, first + 128 * i, n, moved);
    }
    __syncwarp();
    store_codes(m, m_map + BLOCK, b, lane);
    store_codes(v, v_map + BLOCK, c, lane);
}

extern "C" __global__ void __launch_bounds__(256) squares(const float *x, int n, float *sums) {
    pdl_wait();
    pdl_release();
    float sum = 0.f;
    for (size_t i = 4 * ((size_t)blockIdx.x * 256 + threadIdx.x); i < n; i += 1024 * (size_t)gridDim.x) {
        const float4 v = load4(x, i, n);
        sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    __shared__ float parts[8];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < 8; w++) sum += parts[w];
        sums[blockIdx.x] = sum;
    }
}
