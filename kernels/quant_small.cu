// Matrix products for up to 16 rows, bound by reading the weights: gemm_F_near_T, gemm_F_8_T and gemm_F_16_T, whose contract is in
// `quant.cuh` (launched from src/ops/quant/cuda.rs).
//
// A thread block has 8 warps. A warp takes a strip and a slice of k, so a thread block takes 8 / slices strips. Weights come through
// the warp's ring. Activations come straight to registers, two tiles ahead; in the `near` kernels from shared memory, where the thread
// block copies all of them.
// Grid: strips / (8 / slices) rounded up, 256 threads. Dynamic shared memory: the codebook table (LUT: 32 KiB), the rings of 8 warps, and
// for `near` x itself, m k values.

#include "quant.cuh"

// B fragments of a tile for 8 tokens, and the sums over its groups.
template <int F> struct TileInputs {
    uint32_t b[8];
    float2 sums[Traits<F>::min ? Traits<F>::groups : 1];
};

// Loads the inputs of a tile for 8 NT tokens. xs: each token's inputs, from the lane's first on. `most`: the last offset from which a
// lane can load inside a row; beyond the end of a row weights are zero, so that any inputs will do.
template <int F, int NT>
__device__ __forceinline__ void load_inputs(TileInputs<F> (&in)[NT], const bf16 *const (&xs)[NT], const float *group_sums, int tile,
                                            bool ragged, int most) {
    constexpr int G = Traits<F>::groups;
#pragma unroll
    for (int i = 0; i < NT; i++) {
        uint32_t *b = in[i].b;
        if constexpr (Traits<F>::bits8) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int at = 64 * tile + 16 * j;
                const uint2 v = *(const uint2 *)(xs[i] + (ragged ? min(at, most) : at));
                b[2 * j] = v.x, b[2 * j + 1] = v.y;
            }
        } else {
#pragma unroll
            for (int g = 0; g < 2; g++) {
                const int at = 64 * tile + 32 * g;
                const uint4 v = *(const uint4 *)(xs[i] + (ragged ? min(at, most) : at));
                b[4 * g] = v.x, b[4 * g + 1] = v.y, b[4 * g + 2] = v.z, b[4 * g + 3] = v.w;
            }
        }
        if constexpr (Traits<F>::min)
#pragma unroll
            for (int g = 0; g < G; g++) in[i].sums[g] = *(const float2 *)(group_sums + (tile * G + g) * 64 + 8 * i);
    }
}

// Dequantises a tile in registers, group by group, and multiplies it by the inputs: acc += scale (codes x) + min sum(x).
template <int F, int NT>
__device__ __forceinline__ void multiply_tile(float (&acc)[NT][4], const TileData<F> &t, const TileInputs<F> (&in)[NT], const Weights &w,
                                              const uint32_t *table) {
    constexpr int G = Traits<F>::groups, P = 4 / G;  // groups of a tile, products of a group
#pragma unroll
    for (int g = 0; g < G; g++) {
        uint32_t a[P][4];
#pragma unroll
        for (int p = 0; p < P; p++) decode<F>(a[p], t, g * P + p, table, w.zero);
        float2 s[2];
        if constexpr (F != DENSE) s[0] = scale_of<F>(t, w, g, 0), s[1] = scale_of<F>(t, w, g, 1);
        if constexpr (F == LUT) s[0].x *= w.factor, s[1].x *= w.factor;
#pragma unroll
        for (int i = 0; i < NT; i++) {
            const uint32_t *b = in[i].b + g * 2 * P;
            float c[4] = {0.f, 0.f, 0.f, 0.f};
            float(&to)[4] = F == DENSE ? acc[i] : c;
#pragma unroll
            for (int p = 0; p < P; p++) mma_m16n8k16(to, a[p][0], a[p][1], a[p][2], a[p][3], b[2 * p], b[2 * p + 1]);
            if constexpr (F != DENSE) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    acc[i][e] = fmaf(s[e / 2].x, c[e], acc[i][e]);
                    if constexpr (Traits<F>::min) acc[i][e] = fmaf(s[e / 2].y, e % 2 ? in[i].sums[g].y : in[i].sums[g].x, acc[i][e]);
                }
            }
        }
    }
}

// F: format. TOKENS8: tokens in units of 8, 1 or 2; 0 for `near`, with 8 tokens at most. T: type of y.
template <int F, int TOKENS8, typename T>
__device__ __forceinline__ void gemm_small(Weights w, const bf16 *x, T *y, int m, int ldy, int slices,
                                           const float *group_sums) {
    constexpr bool NEAR = TOKENS8 == 0;
    constexpr int NT = NEAR ? 1 : TOKENS8;
    constexpr int G = Traits<F>::groups, CHUNK = Traits<F>::CHUNK;
    extern __shared__ __align__(1024) unsigned char shared[];
    __shared__ float sums[8][NT][32][4];
    // The warp's strip and slice: `count` tiles from chunk `first` on.
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, q = lane % 4, token = lane / 4;
    const int tiles = (w.k + 63) / 64, chunks = (tiles + CHUNK - 1) / CHUNK, strips = (w.n + 15) / 16;
    const int per = 8 / slices;  // strips of the thread block
    const int strip = blockIdx.x * per + warp / slices, slice = warp % slices;
    const int first = slice * chunks / slices;
    const int count = strip < strips ? min((slice + 1) * chunks / slices * CHUNK, tiles) - first * CHUNK : 0;

    // Start loading weights, which need no wait for the previous kernel.
    uint32_t *table = (uint32_t *)shared;
    using Tiles = Ring<F, SMALL_RING_STAGES[F]>;
    Tiles ring(w, shared + (F == LUT ? CODEBOOK_TABLE_BYTES : 0) + warp * Tiles::SHARED, strip, first, count, lane);
    fill_table<F>(table, w);
    if constexpr (F == LUT && !NEAR) __syncthreads();

    // Wait for the activations; `near` copies them to shared memory.
    pdl_wait();
    pdl_release();
    bf16 *const near = (bf16 *)(shared + (F == LUT ? CODEBOOK_TABLE_BYTES : 0) + 8 * Tiles::SHARED);
    if constexpr (NEAR) {
        for (int i = threadIdx.x; i < m * w.k / 8; i += 256) ((uint4 *)near)[i] = ((const uint4 *)x)[i];
        __syncthreads();
    }

    TileInputs<F> in[4][NT];  // of four tiles, by tile % 4
    const int start = 64 * CHUNK * first + (Traits<F>::bits8 ? 4 : 8) * q;
    const bf16 *xs[NT];
#pragma unroll
    for (int i = 0; i < NT; i++) xs[i] = (NEAR ? near : x) + (size_t)min(8 * i + token, m - 1) * w.k + start;
    const float *gs = group_sums + (size_t)first * CHUNK * G * 64 + 2 * q;
    const bool ragged = w.k % 64;
    auto load = [&](int d, int tile) {
        if (tile >= count) return;
        load_inputs<F, NT>(in[d], xs, gs, tile, ragged, w.k - start - (Traits<F>::bits8 ? 4 : 8));
    };
    if constexpr (!NEAR) load(0, 0), load(1, 1);

    // Compute, a tile at a time.
    float acc[NT][4] = {};
    int stage = 0, round = 0;
    const unsigned char *data = nullptr;
    for (int tile = 0; tile < count; tile += 4) {
#pragma unroll
        for (int d = 0; d < 4; d++) {
            if (tile + d < count) {
                const int chunk = (tile + d) / CHUNK;
                if (d % CHUNK == 0) {
                    data = ring.take(chunk, stage, round);
                    if (++stage == Tiles::STAGES) stage = 0, round++;
                }
                TileData<F> t;
                load_tile<F>(t, data, ring.size(chunk), d % CHUNK, lane);
                if constexpr (NEAR) load(d, tile + d);
                multiply_tile<F, NT>(acc, t, in[d], w, table);
                // Load the inputs of two tiles at once, between the uses of the previous two: waiting for one load waits for all loads
                // issued before.
                if (!NEAR && d % 2 == 0) {
                    load((d + 2) % 4, tile + d + 2);
                    load((d + 3) % 4, tile + d + 3);
                }
            }
        }
    }

    // Reduce over slices through shared memory, and store: one thread per output, 16 neighbouring rows of W for each token.
#pragma unroll
    for (int i = 0; i < NT; i++) *(float4 *)sums[warp][i][lane] = *(float4 *)acc[i];
    __syncthreads();
    for (int o = threadIdx.x; o < per * 16 * 8 * NT; o += 256) {
        const int row = o % 16, own = o / 16 % per, t = o / 16 / per;
        const int column = (blockIdx.x * per + own) * 16 + row;
        if (t >= m || column >= w.n) continue;
        const int l = row % 8 * 4 + t % 8 / 2, e = row / 8 * 2 + t % 2;
        float s[8];
#pragma unroll
        for (int i = 0; i < 8; i++) s[i] = i < slices ? sums[own * slices + i][t / 8][l][e] : 0.f;
        store<T>(y + (size_t)t * ldy + column, tree(s, slices));
    }
}

#define GEMM(F, f, T, type, M, TOKENS8)                                                                               \
    extern "C" __global__ void __launch_bounds__(256) gemm_##f##_##M##_##type(WEIGHTS_ARGS, const bf16 *x, T *y, int m, int ldy, \
                                                                              int slices, const float *sums) {        \
        gemm_small<F, TOKENS8, T>(WEIGHTS, x, y, m, ldy, slices, sums);                                               \
    }
#define GEMMS(F, f)                                                                                                   \
    GEMM(F, f, bf16, bf16, near, 0) GEMM(F, f, bf16, bf16, 8, 1) GEMM(F, f, bf16, bf16, 16, 2)                        \
    GEMM(F, f, float, f32, near, 0) GEMM(F, f, float, f32, 8, 1) GEMM(F, f, float, f32, 16, 2)
ALL_FORMATS(GEMMS)
