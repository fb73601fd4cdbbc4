// Dequantised weights, embedding rows, and sums of activations (launched from src/ops/quant/cuda.rs). The layout of weights is described
// in `quant.cuh`, as are the arguments WEIGHTS_ARGS. Pointers are 16-byte aligned.
//
//   group_sums(x bf16 [m, k], m, k, group, sums f32 [k / group][64])
//     x summed over each group of 16 or 32 inputs, in order; zero for tokens past m. k is padded to a multiple of 64. One thread per
//     sum, 256 threads.
//   dequantise_F (WEIGHTS_ARGS, codebook f32 [16], out bf16 [n, k])
//     All values, each rounded once. One warp per tile; grid: tiles / 8 rounded up, 256 threads.
//   gather_F (WEIGHTS_ARGS, codebook f32 [16], ids u32 [rows], offset, out f32 [rows, k])
//     Rows ids[i] - offset of the matrix; other rows of out are left alone. One warp per row and tile; grid: (tiles of a row / 8 rounded
//     up, rows), 256 threads.

#include "quant.cuh"

extern "C" __global__ void __launch_bounds__(256) group_sums(const bf16 *x, int m, int k, int group, float *sums) {
    pdl_wait();
    const int i = blockIdx.x * 256 + threadIdx.x, token = i % 64, first = i / 64 * group;
    if (first >= (k + 63) / 64 * 64) return;
    float sum = 0.f;
    if (token < m && first < k) {
        const uint4 *p = (const uint4 *)(x + (size_t)token * k + first);
        for (int j = 0; j < group / 8 && first + 8 * j < k; j++) {
            const uint4 v = p[j];
            const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float2 f = __bfloat1622float2(*(const bf162 *)&words[e]);
                sum += f.x;
                sum += f.y;
            }
        }
    }
    sums[i] = sum;
}

// Loads a tile of a strip from global memory.
template <int F> __device__ __forceinline__ void load_global(TileData<F> &t, const Weights &w, int strip, int tile, int lane) {
    constexpr int CHUNK = Traits<F>::CHUNK;
    const int tiles = (w.k + 63) / 64, chunk = tile / CHUNK;
    load_tile<F>(t, w.data + Traits<F>::strip(tiles) * strip + (size_t)chunk * Traits<F>::BYTES, min(CHUNK, tiles - chunk * CHUNK),
                 tile % CHUNK, lane);
}

// Element e of product j, row l/4 + 8 half: exact in f32 except for the roundings of the format itself.
template <int F> __device__ __forceinline__ float value(const TileData<F> &t, const Weights &w, const float *codebook, int j, int e,
                                                        int half) {
    const int i = e / 2 * 2 + half;  // the register
    if constexpr (F == DENSE) {
        const uint32_t v = t.w[4 * j + i];
        return __uint_as_float(e % 2 ? v & 0xffff0000 : v << 16);
    } else {
        const float2 s = scale_of<F>(t, w, j * Traits<F>::groups / 4, half);
        if constexpr (F == LUT) return __fmul_rn(codebook[(t.w[j] >> (8 * i + 4 * (e % 2))) & 15], s.x);
        if constexpr (F == S8) return __fmul_rn(s.x, (float)((t.w[2 * j + i / 2] >> (16 * (i % 2) + 8 * (e % 2))) & 255) - w.zero);
        if constexpr (F == SM8)
            return __fadd_rn(__fmul_rn(s.x, (float)((t.w[2 * j + i / 2] >> (16 * (i % 2) + 8 * (e % 2))) & 255)), s.y);
        const float code = (float)((t.w[j] >> (4 * i + 16 * (e % 2))) & 15);
        if constexpr (F == S16) return __fmul_rn(s.x, code - 8.f);
        return __fadd_rn(__fmul_rn(s.x, code), s.y);
    }
}

// F: format.
template <int F> __device__ __forceinline__ void dequantise(Weights w, const float *codebook, bf16 *out) {
    pdl_wait();
    const int lane = threadIdx.x % 32, q = lane % 4;
    const int tiles = (w.k + 63) / 64;
    const long long tile = (long long)blockIdx.x * 8 + threadIdx.x / 32;
    if (tile >= (long long)tiles * ((w.n + 15) / 16)) return;
    // Load the codebook and the tile.
    __shared__ float book[16];
    if (F == LUT && threadIdx.x % 32 < 16) book[threadIdx.x % 32] = codebook[threadIdx.x % 32];
    __syncwarp();
    TileData<F> t;
    const int strip = tile / tiles, at = tile % tiles * 64;
    load_global<F>(t, w, strip, tile % tiles, lane);
    // Dequantise and store the lane's two rows.
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = 16 * strip + lane / 4 + 8 * half;
        if (row >= w.n) continue;
        bf16 *to = out + (size_t)row * w.k;
        // A lane holds runs of contiguous inputs: 4 for 8-bit codes, else 8.
        constexpr int RUN = Traits<F>::bits8 ? 4 : 8;
#pragma unroll
        for (int run = 0; run < 16 / RUN; run++) {
            const int first = at + (Traits<F>::bits8 ? 16 * run + 4 * q : 32 * run + 8 * q);
            __align__(16) bf16 v[RUN];
#pragma unroll
            for (int i = 0; i < RUN; i++) v[i] = __float2bfloat16_rn(value<F>(t, w, book, run * (RUN / 4) + i / 4, i % 4, half));
            if (w.k % 8 == 0) {
                if (first >= w.k) continue;
                if constexpr (RUN == 8) *(uint4 *)(to + first) = *(const uint4 *)v;
                else *(uint2 *)(to + first) = *(const uint2 *)v;
            } else {
                for (int i = 0; i < RUN && first + i < w.k; i++) to[first + i] = v[i];
            }
        }
    }
}

// F: format.
template <int F>
__device__ __forceinline__ void gather(Weights w, const float *codebook, const uint32_t *ids, int offset, float *out) {
    pdl_wait();
    const int lane = threadIdx.x % 32, tiles = (w.k + 63) / 64, tile = blockIdx.x * 8 + threadIdx.x / 32;
    const int row = (int)ids[blockIdx.y] - offset;
    if (tile >= tiles || row < 0 || row >= w.n) return;
    // A tile spreads its rows over eight groups of four lanes: only the four lanes that hold this row go on.
    if (lane / 4 != row % 8) return;
    const int q = lane % 4, half = row % 16 / 8;
    TileData<F> t;
    load_global<F>(t, w, row / 16, tile, lane);
    float *to = out + (size_t)blockIdx.y * w.k;
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int at = 64 * tile + (Traits<F>::bits8 ? 16 * j + 4 * q : 32 * (j / 2) + 8 * q + 4 * (j % 2)) + e;
            const float v = value<F>(t, w, codebook, j, e, half);
            if (at < w.k) to[at] = v;
        }
}

#define VALUES(F, f)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) dequantise_##f(WEIGHTS_ARGS, const float *codebook, bf16 *out) { \
        dequantise<F>(WEIGHTS, codebook, out);                                                                        \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256) gather_##f(WEIGHTS_ARGS, const float *codebook, const uint32_t *ids, \
                                                                 int offset, float *out) {                            \
        gather<F>(WEIGHTS, codebook, ids, offset, out);                                                               \
    }
ALL_FORMATS(VALUES)
