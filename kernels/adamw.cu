// AdamW steps over flat buffers, with moments in f32 or 8 bits, and sums of squares (launched from src/ops/adamw/cuda.rs; formulas and
// settings: src/ops/adamw.rs).
//
// p and g: f32 [n], parameters and gradients, 16-byte aligned. FACTORS: the arguments of `Factors` below, computed on the host.
//
//   adamw(p, g, m f32 [n], v f32 [n], n, FACTORS)
//     Grid: n / 1024 rounded up, 256 threads.
//   adamw8bit(p, g, m, v, maps, n, FACTORS)
//     m, v: u8 [n / 256 rounded up][260], blocks of 256 values: their codes, then their f32 scale.
//     maps: f32 [2][512], for m and for v: the 256 values of the codes, ascending, then the 255 midpoints between them, then one unused.
//     Grid: n / 2048 rounded up, 256 threads; a warp takes a block of 256 values.
//   squares(x f32 [n], n, sums f32 [thread blocks])
//     sums[b]: the sum of the squares that thread block b takes, in a grid-stride loop over 4 values a thread. 256 threads.
#include "common.cuh"

struct Factors {
    float grad_scale;               // for gradient clipping
    float beta1, one_minus_beta1, beta2, one_minus_beta2;
    float decay;                    // 1 - learning rate * weight decay
    float step_size;                // learning rate / (1 - beta1^t)
    float inverse_root;             // 1 / sqrt(1 - beta2^t)
    float eps;

    // Updates the moments.
    __device__ __forceinline__ void update(float g, float &m, float &v) const {
        g *= grad_scale;
        m = beta1 * m + one_minus_beta1 * g;
        v = beta2 * v + one_minus_beta2 * (g * g);
    }

    // The new parameter.
    __device__ __forceinline__ float apply(float p, float m, float v) const {
        return p * decay - step_size * (m / (sqrtf(v) * inverse_root + eps));
    }
};

#define FACTORS_ARGS                                                                                              \
    float grad_scale, float beta1, float one_minus_beta1, float beta2, float one_minus_beta2, float decay,        \
        float step_size, float inverse_root, float eps
#define FACTORS {grad_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, decay, step_size, inverse_root, eps}

// Loads four values from i on, zeros past n.
__device__ __forceinline__ float4 load4(const float *x, size_t i, size_t n) {
    if (i + 4 <= n) return *(const float4 *)(x + i);
    return make_float4(i < n ? x[i] : 0.f, i + 1 < n ? x[i + 1] : 0.f, i + 2 < n ? x[i + 2] : 0.f, 0.f);
}

// Stores four values from i on, up to n.
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
    f.update(d.x, b.x, c.x), f.update(d.y, b.y, c.y), f.update(d.z, b.z, c.z), f.update(d.w, b.w, c.w);
    a.x = f.apply(a.x, b.x, c.x), a.y = f.apply(a.y, b.y, c.y), a.z = f.apply(a.z, b.z, c.z), a.w = f.apply(a.w, b.w, c.w);
    store4(p, i, n, a), store4(m, i, n, b), store4(v, i, n, c);
}

constexpr int BLOCK = ADAMW_BLOCK, WORDS = BLOCK / 4 + 1;  // values of a quantisation block, and its words: codes and scale

// The code of the value nearest to x: the number of midpoints below x, by binary search.
__device__ __forceinline__ uint32_t nearest(const float *midpoints, float x) {
    uint32_t code = 0;
#pragma unroll
    for (int half = 128; half; half /= 2) code += midpoints[code + half - 1] < x ? half : 0;
    return code;
}

// Dequantises four codes.
__device__ __forceinline__ float4 dequantise(const float *map, uint32_t codes, float scale) {
    return make_float4(map[codes & 255] * scale, map[codes >> 8 & 255] * scale, map[codes >> 16 & 255] * scale, map[codes >> 24] * scale);
}

__device__ __forceinline__ float largest(float4 x) { return fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w))); }

// Quantises a warp's block: a lane has the values of words `lane` and `lane + 32`.
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
    // Load the maps to shared memory.
    ((float4 *)shared)[threadIdx.x] = ((const float4 *)maps)[threadIdx.x];
    __syncthreads();
    const float *m_map = shared, *v_map = shared + 2 * BLOCK;
    const int lane = threadIdx.x % 32;
    const size_t block = (size_t)blockIdx.x * 8 + threadIdx.x / 32, first = block * BLOCK + 4 * lane;
    if (block * BLOCK >= n) return;
    m += block * WORDS, v += block * WORDS;
    const float m_scale = __uint_as_float(m[WORDS - 1]), v_scale = __uint_as_float(v[WORDS - 1]);
    // Load parameters and gradients, and dequantise the moments.
    float4 a[2], b[2], c[2], d[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        a[i] = load4(p, first + 128 * i, n), d[i] = load4(g, first + 128 * i, n);
        b[i] = dequantise(m_map, m[lane + 32 * i], m_scale), c[i] = dequantise(v_map, v[lane + 32 * i], v_scale);
    }
    // Update and store the parameters.
#pragma unroll
    for (int i = 0; i < 2; i++) {
        f.update(d[i].x, b[i].x, c[i].x), f.update(d[i].y, b[i].y, c[i].y);
        f.update(d[i].z, b[i].z, c[i].z), f.update(d[i].w, b[i].w, c[i].w);
        const float4 moved = make_float4(f.apply(a[i].x, b[i].x, c[i].x), f.apply(a[i].y, b[i].y, c[i].y),
                                         f.apply(a[i].z, b[i].z, c[i].z), f.apply(a[i].w, b[i].w, c[i].w));
        store4(p, first + 128 * i, n, moved);
    }
    // Quantise and store the moments.
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
    // Reduce over the thread block.
    __shared__ float parts[8];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < 8; w++) sum += parts[w];
        sums[blockIdx.x] = sum;
    }
}
