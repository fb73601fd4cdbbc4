// Products for 17 to 64 rows, on Hopper with its warpgroup instructions: gemm_F_32_T and gemm_F_64_T of `quant.cuh`.

#include "quant.cuh"

#if __CUDA_ARCH__ >= 900
// d [64 x N] (=, or += if `add`) a [64 x 16] b [16 x N]: a in registers as mma.m16n8k16 wants it, one block of 16 rows a warp.
__device__ __forceinline__ void wgmma(float (&d)[16], const uint32_t (&a)[4], uint64_t b, int add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %21, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
        "{%16,%17,%18,%19}, %20, p, 1, 1, 0; }\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
__device__ __forceinline__ void wgmma(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32,%33,%34,%35}, %36, p, 1, 1, 0; }\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
// Waits for all products; the compiler must not read `d` before.
template <int N> __device__ __forceinline__ void wgmma_wait(float (&d)[N]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}
#endif

// m <= 32 H with H 1 or 2: 16 warps, a strip each; activations in shared memory, where all warps' products read them. ROWS is 256.
// Grid: (ceil(n / ROWS), slices), on Hopper in clusters of (1, slices): the blocks of a row group add their sums through each other's
// shared memory. Elsewhere sums meet in `partial` [row group][slice][32 H][ROWS], where the block that comes last adds them;
// `arrived` [row groups] is zero before and after.
template <int F, int H, typename T>
__device__ __forceinline__ void gemm_wide(Weights w, const bf16 *x, T *y, int m, int ldy, int slices,
                                          const float *group_sums, float *partial, int *arrived) {
    constexpr int TOKENS = 32 * H, G = Traits<F>::groups, P = 4 / G, CHUNK = Traits<F>::CHUNK;
    constexpr int WARPS = 16, THREADS = 32 * WARPS, ROWS = 16 * WARPS;
    constexpr int TILE = TOKENS * 128, BUFFER = CHUNK * TILE;  // bytes
    constexpr int SUMS = CHUNK * G * TOKENS;
    constexpr int TABLE = F == LUT ? 32768 : Traits<F>::min ? 2 * SUMS * 4 : 0;
    extern __shared__ __align__(1024) unsigned char shared[];
    unsigned char *buffers = shared;                    // [2][BUFFER]
    uint32_t *table = (uint32_t *)(shared + 2 * BUFFER);  // LUT
    float *gsums = (float *)(shared + 2 * BUFFER);        // mins: [2][CHUNK G][TOKENS]
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, q = lane % 4;
    const int tiles = (w.k + 63) / 64, chunks = (tiles + CHUNK - 1) / CHUNK, strips = (w.n + 15) / 16;
    const int strip = blockIdx.x * WARPS + warp, slice = blockIdx.y;
    const int first = slice * chunks / slices, count = min((slice + 1) * chunks / slices * CHUNK, tiles) - first * CHUNK;
    // Rows past the end are computed from the first strip's weights, and not stored.
    using Tiles = Ring<F, F == DENSE ? 2 : 3>;
    Tiles ring(w, shared + 2 * BUFFER + TABLE + warp * Tiles::SHARED, strip < strips ? strip : 0, first, count, lane);
    fill_table<F>(table, w);
    pdl_wait();
    pdl_release();

    // A thread carries 16 inputs of one or more tokens to where products read them: rows of 128 bytes, 16-byte pieces swizzled by
    // the row. A warp has 8 tokens of one tile at a time.
    constexpr int STRIDE = 8 * WARPS / CHUNK, EACH = (TOKENS + STRIDE - 1) / STRIDE;
    const int part = lane % 4, unit = warp % CHUNK, token0 = warp / CHUNK * 8 + lane / 4;
    const int from = 64 * (first * CHUNK + unit) + 16 * part;
    uint4 held[EACH][2];
    float held_sum[Traits<F>::min ? (SUMS + THREADS - 1) / THREADS : 1];
    auto fetch = [&](int step) {
        const int at = from + 64 * step;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int token = token0 + STRIDE * i;
            held[i][0] = held[i][1] = make_uint4(0, 0, 0, 0);
            if (token >= m || step + unit >= count) continue;
            const uint4 *p = (const uint4 *)(x + (size_t)token * w.k + at);
            if (at < w.k) held[i][0] = p[0];
            if (at + 8 < w.k) held[i][1] = p[1];
        }
        if constexpr (Traits<F>::min) {
#pragma unroll
            for (int i = 0; i < (SUMS + THREADS - 1) / THREADS; i++) {
                const int group = (threadIdx.x + THREADS * i) / TOKENS;
                if (threadIdx.x + THREADS * i < SUMS && step + group / G < count)
                    held_sum[i] = group_sums[((size_t)(first * CHUNK + step) * G + group) * 64 + threadIdx.x % TOKENS];
            }
        }
    };
    auto put = [&](int buffer) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int token = token0 + STRIDE * i;
            if (token >= TOKENS) continue;
            unsigned char *row = buffers + buffer * BUFFER + unit * TILE + token * 128;
            const int swizzle = token % 8;
            const uint4 a = held[i][0], b = held[i][1];
            if constexpr (Traits<F>::bits8) {
                *(uint4 *)(row + ((2 * part) ^ swizzle) * 16) = make_uint4(a.x, a.z, b.x, b.z);
                *(uint4 *)(row + ((2 * part + 1) ^ swizzle) * 16) = make_uint4(a.y, a.w, b.y, b.w);
            } else {
                const int g = part / 2, at = part % 2 * 8;
                *(uint2 *)(row + ((4 * g) ^ swizzle) * 16 + at) = make_uint2(a.x, b.x);
                *(uint2 *)(row + ((4 * g + 1) ^ swizzle) * 16 + at) = make_uint2(a.y, b.y);
                *(uint2 *)(row + ((4 * g + 2) ^ swizzle) * 16 + at) = make_uint2(a.z, b.z);
                *(uint2 *)(row + ((4 * g + 3) ^ swizzle) * 16 + at) = make_uint2(a.w, b.w);
            }
        }
        if constexpr (Traits<F>::min) {
#pragma unroll
            for (int i = 0; i < (SUMS + THREADS - 1) / THREADS; i++)
                if (threadIdx.x + THREADS * i < SUMS) gsums[buffer * SUMS + threadIdx.x + THREADS * i] = held_sum[i];
        }
#if __CUDA_ARCH__ >= 900
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
    };

    float acc[16 * H] = {};
    float part_sums[16 * H];
    int stage = 0, round = 0;
    // Starts the products of group g of the tile at `rows` into `part_sums` (dense: `acc`).
    auto multiply = [&](const uint32_t(&a)[P][4], const unsigned char *rows, int g) {
#if __CUDA_ARCH__ >= 900
        const uint64_t desc = (uint64_t)(((uint32_t)__cvta_generic_to_shared(rows) & 0x3ffff) >> 4) | (uint64_t)1 << 16 |
                              (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int p = 0; p < P; p++) wgmma(F == DENSE ? acc : part_sums, a[p], desc + (g * P + p) * 2, F == DENSE || p);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
        // In the same order of sums.
#pragma unroll
        for (int i = 0; i < 4 * H; i++) {
            const int token = 8 * i + lane / 4;
            float(&to)[4] = *(float(*)[4])((F == DENSE ? acc : part_sums) + 4 * i);
            if constexpr (F != DENSE) to[0] = to[1] = to[2] = to[3] = 0.f;
#pragma unroll
            for (int p = 0; p < P; p++) {
                const unsigned char *row = rows + token * 128 + 4 * q;
                const int piece = 2 * (g * P + p);
                mma_m16n8k16(to, a[p][0], a[p][1], a[p][2], a[p][3], *(const uint32_t *)(row + (piece ^ token % 8) * 16),
                             *(const uint32_t *)(row + ((piece + 1) ^ token % 8) * 16));
            }
        }
#endif
    };
    // Waits for them and adds them, scaled.
    auto finish = [&](const float2(&s)[2], const float *xsums) {
#if __CUDA_ARCH__ >= 900
        if constexpr (F == DENSE) wgmma_wait(acc);
        else wgmma_wait(part_sums);
#endif
        if constexpr (F != DENSE) {
#pragma unroll
            for (int i = 0; i < 4 * H; i++) {
                float2 xs;
                if constexpr (Traits<F>::min) xs = *(const float2 *)(xsums + 8 * i + 2 * q);
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    acc[4 * i + e] = fmaf(s[e / 2].x, part_sums[4 * i + e], acc[4 * i + e]);
                    if constexpr (Traits<F>::min) acc[4 * i + e] = fmaf(s[e / 2].y, e % 2 ? xs.y : xs.x, acc[4 * i + e]);
                }
            }
        }
    };
    // A chunk: while a group's products are under way, the next group is decoded. In the middle, activations for the next chunk
    // go where nobody reads since the last barrier.
    auto run = [&](auto full, int chunk, int size, const unsigned char *data) {
        constexpr bool FULL = decltype(full)::value;
        // A whole tile of codebook values ahead does not fit into the registers.
        constexpr bool AHEAD = !(F == LUT && H == 2);
        const int buffer = chunk % 2;
        uint32_t a[2][P][4];
        float2 s[2][2];
        TileData<F> t;
        auto prepare = [&](int i) {
            if (i % G == 0) load_tile<F>(t, data, FULL ? CHUNK : size, i / G, lane);
#pragma unroll
            for (int p = 0; p < P; p++) decode<F>(a[i % 2][p], t, i % G * P + p, table, w.zero);
            if constexpr (F != DENSE) s[i % 2][0] = scale_of<F>(t, w, i % G, 0), s[i % 2][1] = scale_of<F>(t, w, i % G, 1);
            if constexpr (F == LUT) s[i % 2][0].x *= w.factor, s[i % 2][1].x *= w.factor;
        };
        if (AHEAD) prepare(0);
#pragma unroll
        for (int i = 0; i < CHUNK * G; i++) {
            if (FULL || i < size * G) {
                if (!AHEAD) prepare(i);
                multiply(a[i % 2], buffers + buffer * BUFFER + i / G * TILE, i % G);
                if (AHEAD && (FULL ? i + 1 < CHUNK * G : i + 1 < size * G)) prepare(i + 1);
                finish(s[i % 2], gsums + buffer * SUMS + i * TOKENS);
            }
            if (i == CHUNK * G / 2 - 1 && (chunk + 1) * CHUNK < count) {
                put(buffer ^ 1);
                fetch((chunk + 2) * CHUNK);
            }
        }
    };
    fetch(0);
    put(0);
    fetch(CHUNK);
    for (int chunk = 0; chunk * CHUNK < count; chunk++) {
        __syncthreads();
        const unsigned char *data = ring.take(chunk, stage, round);
        if (++stage == Tiles::STAGES) stage = 0, round++;
        const int size = ring.size(chunk);
        if (size == CHUNK) run(Constant<true>(), chunk, size, data);
        else run(Constant<false>(), chunk, size, data);
    }

    auto each = [&](auto f) {
#pragma unroll
        for (int i = 0; i < 4 * H; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) f(8 * i + 2 * q + e % 2, warp * 16 + lane / 4 + e / 2 * 8, acc[4 * i + e]);
    };
    if (slices == 1) {
        each([&](int t, int row, float v) {
            const int column = blockIdx.x * ROWS + row;
            if (t < m && column < w.n) store<T>(y + (size_t)t * ldy + column, v);
        });
        return;
    }
#if __CUDA_ARCH__ >= 900
    // [TOKENS][ROWS], in place of the activations and rings, that nobody needs any more; swizzled against bank conflicts.
    float *mine = (float *)shared;
    __syncthreads();
    each([&](int t, int row, float v) { mine[t * ROWS + (row ^ t % 8 / 2 * 8)] = v; });
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    const uint32_t sums = (uint32_t)__cvta_generic_to_shared(mine);
    for (int i = threadIdx.x + THREADS * blockIdx.y; i < ROWS / 2 * m; i += THREADS * slices) {
        const int t = i / (ROWS / 2), row = i % (ROWS / 2) * 2, column = blockIdx.x * ROWS + row;
        if (column >= w.n) continue;
        float s0[4], s1[4];
#pragma unroll
        for (int p = 0; p < 4; p++) {
            s0[p] = s1[p] = 0.f;
            if (p < slices) {
                uint32_t there;
                const uint32_t at = sums + (t * ROWS + (row ^ t % 8 / 2 * 8)) * 4;
                asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(p));
                asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(s0[p]), "=f"(s1[p]) : "r"(there));
            }
        }
        T *to = y + (size_t)t * ldy + column;
        store<T>(to, tree(s0, slices));
        if (column + 1 < w.n) store<T>(to + 1, tree(s1, slices));
    }
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#else
    constexpr size_t SIZE = (size_t)TOKENS * ROWS;
    float *all = partial + blockIdx.x * slices * SIZE;
    each([&](int t, int row, float v) {
        if (t < m) __stcg(all + blockIdx.y * SIZE + t * ROWS + row, v);
    });
    __shared__ int last_block;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last_block = atomicAdd(arrived + blockIdx.x, 1) == slices - 1;
        if (last_block) arrived[blockIdx.x] = 0;
    }
    __syncthreads();
    if (!last_block) return;
    __threadfence();
    for (int i = threadIdx.x; i < ROWS * m; i += THREADS) {
        const int t = i / ROWS, row = i % ROWS, column = blockIdx.x * ROWS + row;
        if (column >= w.n) continue;
        float s[4];
#pragma unroll
        for (int p = 0; p < 4; p++) s[p] = p < slices ? __ldcg(all + p * SIZE + i) : 0.f;
        store<T>(y + (size_t)t * ldy + column, tree(s, slices));
    }
#endif
}

#define GEMM(F, f, T, type, M)                                                                                        \
    extern "C" __global__ void __launch_bounds__(512, 1) gemm_##f##_##M##_##type(                                     \
        WEIGHTS_ARGS, const bf16 *x, T *y, int m, int ldy, int slices, const float *sums, float *partial, int *arrived) { \
        gemm_wide<F, M / 32, T>(WEIGHTS, x, y, m, ldy, slices, sums, partial, arrived);                               \
    }
#define GEMMS(F, f) GEMM(F, f, bf16, bf16, 32) GEMM(F, f, bf16, bf16, 64) GEMM(F, f, float, f32, 32) GEMM(F, f, float, f32, 64)
ALL_FORMATS(GEMMS)
