// Matrix products on Hopper for any number of rows, with wgmma: gemm_F_M_T, M 16w, 32w, 64w, and for narrow matrices 32n and 64n. The
// contract is in `quant.cuh` (launched from src/ops/quant/cuda.rs). On other GPUs these kernels trap and are not launched.
//
// A thread block has 16 warps in TEAMS teams (1 in w, 2 in n), each of which takes a slice of k. A warp takes a strip, so that a thread
// block has ROWS = 256 / TEAMS rows of W, and TOKENS rows of x.
//
//   gemm_F_M_T (WEIGHTS_ARGS, x, y, m, ldy, slices, sums, partial, arrived)
//     x, sums: as `arrange` leaves them.
//     partial: f32 [grid z][grid x][grid y][TOKENS ROWS]. Where slices > TEAMS, each thread block leaves its sums there, and the last one
//       to arrive adds them up. May be null otherwise.
//     arrived: int [grid z][grid x], the number of thread blocks that have arrived; zero before and after the kernel.
//     Grid: (n / ROWS rounded up, slices / TEAMS, m / TOKENS rounded up), 512 threads. Dynamic shared memory: the stages of activations
//       of each team, the codebook table (LUT: 32 KiB), and the rings of 16 warps.
//   arrange_4 / _8 (x bf16 [m, k], m, k, group, out, sums)
//     Lays x out for gemm kernels of 4-bit and dense (_4) or 8-bit (_8) formats, for each TOKENS rows:
//     out bf16 [tiles][TOKENS][64]: each tile's inputs in the order of the products, with the 16-byte chunks of a row permuted by wgmma's
//       128-byte swizzle. Rows past m and inputs past k are zero.
//     sums f32 [groups][TOKENS], for `group` 16 or 32 (else 0: none): x summed over each group, in order.
//     A thread has 16 inputs of a row. Grid: (tiles, TOKENS / 16, m / TOKENS rounded up), 64 threads.

#include "quant.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// d [64 x N] (=, or += if `add`) a [64 x 16] b [16 x N]: a is in registers in the layout of mma.m16n8k16, 16 rows per warp;
// b is a shared memory descriptor.
__device__ __forceinline__ void wgmma(float (&d)[8], const uint32_t (&a)[4], uint64_t b, int add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %13, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7"
        "}, {%8, %9, %10, %11}, %12, p, 1, 1, 0; }\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
__device__ __forceinline__ void wgmma(float (&d)[16], const uint32_t (&a)[4], uint64_t b, int add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %21, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
        "}, {%16, %17, %18, %19}, %20, p, 1, 1, 0; }\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
          "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
__device__ __forceinline__ void wgmma(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31"
        "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0; }\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
          "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
          "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
          "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

// Waits for all products. The empty asm keeps the compiler from reading `d` earlier.
template <int N> __device__ __forceinline__ void wgmma_wait(float (&d)[N]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;");
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i]));
}

__device__ __forceinline__ void barrier_init(uint32_t barrier, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier, bool arrives) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %1, 0;\n@p mbarrier.arrive.shared.b64 _, [%0]; }" ::"r"(barrier), "r"((int)arrives)
                 : "memory");
}

__device__ __forceinline__ void copy_bulk(void *to, const void *from, int bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     (uint32_t)__cvta_generic_to_shared(to)), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

// A pipeline of a team's activations: a ring of stages in shared memory, with the sums over groups for formats with mins, laid out by
// `arrange`. One warp of the team is the producer; all warps signal when they have used a stage.
//
// F: format. TOKENS: rows of x. TEAMS: teams of the thread block.
template <int F, int TOKENS, int TEAMS> struct Stages {
    static constexpr int CHUNK = Traits<F>::CHUNK, G = Traits<F>::groups, WARPS = WIDE_PRODUCT_WARPS / TEAMS;
    static constexpr int COUNT = WIDE_STAGES;
    static constexpr int FIT = WIDE_STAGE_ROWS / TOKENS / TEAMS, TILES = CHUNK < FIT ? CHUNK : FIT;  // of a stage; divides CHUNK
    static constexpr int TILE = TOKENS * 128, BYTES = TILES * TILE;  // of a tile and of a stage
    static constexpr int TILE_SUMS = Traits<F>::min ? G * TOKENS * 4 : 0, SUMS = TILES * TILE_SUMS;
    static constexpr int SHARED = COUNT * (BYTES + SUMS);

    unsigned char *shared;
    uint32_t full, empty;  // mbarriers of the first stage; those of the next are 8 bytes further
    const unsigned char *x, *x_sums;
    int count;  // tiles

    __device__ __forceinline__ const unsigned char *sums(int stage) const { return shared + COUNT * BYTES + stage * SUMS; }

    // Called by one thread, before any other uses the barriers.
    __device__ __forceinline__ void init() const {
#pragma unroll
        for (int i = 0; i < COUNT; i++) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, WARPS);
    }

    // Starts loading the tiles of a step, once their stage is empty. Called by the producer warp.
    __device__ __forceinline__ void produce(int step, int lane) const {
        const int stage = step % COUNT, tiles = min(TILES, count - step * TILES);
        const uint32_t barrier = full + 8 * stage;
        if (tiles <= 0) return;
        if (step >= COUNT) barrier_wait(empty + 8 * stage, (step / COUNT - 1) & 1);
        if (lane == 0) {
            asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(tiles * (TILE + TILE_SUMS)) : "memory");
            copy_bulk(shared + stage * BYTES, x + (size_t)step * BYTES, tiles * TILE, barrier);
            if constexpr (Traits<F>::min)
                copy_bulk(shared + COUNT * BYTES + stage * SUMS, x_sums + (size_t)step * SUMS, tiles * TILE_SUMS, barrier);
        }
        __syncwarp();
    }
};

// A warp's products of its strip with `stages.count` tiles. A unit is the products of one group of a tile; while a unit's products run,
// the warp decodes the unit after the next one. DEPTH: stages of the weight ring.
template <int F, int TOKENS, int TEAMS, int DEPTH> struct Multiplier {
    using S = Stages<F, TOKENS, TEAMS>;
    static constexpr int G = Traits<F>::groups, P = 4 / G, CHUNK = Traits<F>::CHUNK, UNITS = CHUNK * G;
    static constexpr int STAGE_UNITS = S::TILES * G, STEPS = CHUNK / S::TILES;

    const Weights &w;
    const S &stages;
    const uint32_t *table;
    Ring<F, DEPTH> &ring;
    const int lane;
    const bool producer;
    const unsigned char *data;
    TileData<F> t;
    uint32_t a[2][P][4];      // A fragments of two units
    float2 s[2][2];           // their scales and mins, for the lane's two rows
    float part[TOKENS / 2];   // sums of the unit that runs
    float acc[TOKENS / 2];
    int ring_stage, round;    // of the weight ring
    // For each step of a chunk, its activations' stage, the parity of that stage's barrier, and its wgmma descriptor.
    int stage[STEPS], parity[STEPS];
    uint64_t rows[STEPS];

    // Waits for the weights of a chunk.
    __device__ __forceinline__ void take(int chunk) {
        data = ring.take(chunk, ring_stage, round);
        if (++ring_stage == DEPTH) ring_stage = 0, round++;
    }

    // Finds the activations of a chunk.
    __device__ __forceinline__ void locate(int chunk) {
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            const int step = chunk * STEPS + i;
            stage[i] = step % S::COUNT, parity[i] = step / S::COUNT & 1;
            const uint32_t at = (uint32_t)__cvta_generic_to_shared(stages.shared) + stage[i] * S::BYTES;
            rows[i] = (uint64_t)(at >> 4) | (uint64_t)1 << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
        }
    }

    // Decodes unit `u` of a chunk of `tiles` tiles.
    __device__ __forceinline__ void prepare(int u, int tiles) {
        const int g = u % G, d = u % 2;
        if (g == 0) load_tile<F>(t, data, tiles, u / G, lane);
#pragma unroll
        for (int p = 0; p < P; p++) decode<F>(a[d][p], t, g * P + p, table, w.zero);
        if constexpr (F != DENSE) s[d][0] = scale_of<F>(t, w, g, 0), s[d][1] = scale_of<F>(t, w, g, 1);
        if constexpr (F == LUT) s[d][0].x *= w.factor, s[d][1].x *= w.factor;
    }

    // Starts the products of unit `u`, once its activations are there.
    __device__ __forceinline__ void start(int u) {
        const int i = u / G, g = u % G, step = u / STAGE_UNITS;
        if (u % STAGE_UNITS == 0) barrier_wait(stages.full + 8 * stage[step], parity[step]);
        const uint64_t desc = rows[step] + (uint64_t)(i % S::TILES * S::TILE / 16);
        asm volatile("wgmma.fence.sync.aligned;");
#pragma unroll
        for (int p = 0; p < P; p++) wgmma(F == DENSE ? acc : part, a[u % 2][p], desc + (g * P + p) * 2, F == DENSE || p);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    }

    // Waits for the products of unit `u`, and adds them to acc, scaled.
    __device__ __forceinline__ void finish(int chunk, int u) {
        const int i = u / G, g = u % G, d = u % 2, step = u / STAGE_UNITS;
        wgmma_wait(F == DENSE ? acc : part);
        if constexpr (F != DENSE) {
            const float *sums = (const float *)stages.sums(stage[step]) + (i % S::TILES * G + g) * TOKENS + 2 * (lane % 4);
#pragma unroll
            for (int n = 0; n < TOKENS / 8; n++) {
                float2 xs;
                if constexpr (Traits<F>::min) xs = *(const float2 *)(sums + 8 * n);
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float &to = acc[4 * n + e];
                    to = fmaf(s[d][e / 2].x, part[4 * n + e], to);
                    if constexpr (Traits<F>::min) to = fmaf(s[d][e / 2].y, e % 2 ? xs.y : xs.x, to);
                }
            }
        }
        if ((u + 1) % STAGE_UNITS == 0) {
            __syncwarp();
            barrier_arrive(stages.empty + 8 * stage[step], lane == 0);
            // Load into the previous stage, not this one: the other warps may lag by a stage.
            if (producer) stages.produce(chunk * STEPS + step + S::COUNT - 1, lane);
        }
    }

    __device__ __forceinline__ void run() {
        const int whole = stages.count / CHUNK, rest = stages.count % CHUNK;
        // Whole chunks, pipelined across chunks.
        if (whole) take(0), prepare(0, CHUNK), prepare(1, CHUNK);
        for (int chunk = 0; chunk < whole; chunk++) {
            locate(chunk);
            start(0);
#pragma unroll
            for (int u = 0; u < UNITS; u++) {
                finish(chunk, u);
                if (u + 1 < UNITS) start(u + 1);
                if (u + 2 < UNITS) {
                    prepare(u + 2, CHUNK);
                } else if (chunk + 1 < whole) {
                    if (u + 2 == UNITS) take(chunk + 1);
                    prepare(u + 2 - UNITS, CHUNK);
                }
            }
        }
        // The rest, less than a chunk, not pipelined.
        if (rest) take(whole), locate(whole);
#pragma unroll
        for (int u = 0; u < UNITS - G; u++)
            if (u / G < rest) prepare(u, rest), start(u), finish(whole, u);
    }
};

// Adds the second team's sums to the first's, through shared memory.
template <int TOKENS, int WARPS>
__device__ __forceinline__ void add_teams(float (&acc)[TOKENS / 2], float4 *exchange, int team, int own, int lane) {
    if (team == 1)
#pragma unroll
        for (int i = 0; i < TOKENS / 8; i++) exchange[(i * WARPS + own) * 32 + lane] = *(float4 *)&acc[4 * i];
    __syncthreads();
    if (team == 0)
#pragma unroll
        for (int i = 0; i < TOKENS / 8; i++) {
            const float4 v = exchange[(i * WARPS + own) * 32 + lane];
            acc[4 * i] += v.x, acc[4 * i + 1] += v.y, acc[4 * i + 2] += v.z, acc[4 * i + 3] += v.w;
        }
    __syncthreads();
}

// Counts this thread block as arrived, after it has stored its partial sums. Whether it is the last of the gridDim.y that share rows.
__device__ __forceinline__ bool arrive(int *arrived) {
    __shared__ int last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(arrived, 1) == gridDim.y - 1;
        if (last) *arrived = 0;
    }
    __syncthreads();
    return last;
}

#endif

// F: format. TOKENS: rows of x of a thread block. TEAMS: teams of warps, 1 or 2. T: type of y.
template <int F, int TOKENS, int TEAMS, typename T>
__device__ __forceinline__ void gemm_wide(Weights w, const unsigned char *x, T *y, int m, int ldy, int slices,
                                          const unsigned char *group_sums, float *partial, int *arrived) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using S = Stages<F, TOKENS, TEAMS>;
    constexpr int DEPTH = WIDE_RING_STAGES[F], CHUNK = Traits<F>::CHUNK, WARPS = S::WARPS;
    constexpr int TABLE = F == LUT ? CODEBOOK_TABLE_BYTES : 0;
    using WeightRing = Ring<F, DEPTH>;
    static_assert(TEAMS == 1 || S::SHARED % 1024 == 0, "wgmma's swizzle needs stages aligned to 1024 bytes");
    static_assert(TEAMS * S::SHARED + TABLE + WIDE_PRODUCT_WARPS * WeightRing::SHARED + 1024 <= 227 * 1024, "a thread block's shared memory");
    // Layout: the teams' activations, the codebook table, the warps' rings of weights.
    extern __shared__ __align__(1024) unsigned char shared[];
    __shared__ uint64_t barriers[TEAMS][2 * S::COUNT];
    // The shuffle tells the compiler that a warp's threads agree.
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const int team = warp / WARPS, own = warp % WARPS;
    const int tiles = (w.k + 63) / 64, chunks = (tiles + CHUNK - 1) / CHUNK, strips = (w.n + 15) / 16;
    // The team's slice: `count` tiles from chunk `first` on.
    const int slice = blockIdx.y * TEAMS + team, first = slice * chunks / slices;
    const int count = min((slice + 1) * chunks / slices * CHUNK, tiles) - first * CHUNK;
    x += ((size_t)blockIdx.z * tiles + first * CHUNK) * S::TILE;
    group_sums += ((size_t)blockIdx.z * tiles + first * CHUNK) * S::TILE_SUMS;

    // Set up the barriers, and start loading weights, which need no wait for the previous kernel.
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(barriers[team]);
    const S stages = {shared + team * S::SHARED, at, at + 8 * S::COUNT, x, group_sums, count};
    if (own == 0 && lane == 0) stages.init();
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    // Warps past the last strip compute with the first strip's weights, and their rows are not stored.
    const int strip = blockIdx.x * WARPS + own;
    unsigned char *rings = shared + TEAMS * S::SHARED + TABLE;
    WeightRing ring(w, rings + warp * WeightRing::SHARED, strip < strips ? strip : 0, first, count, lane);
    uint32_t *table = (uint32_t *)(shared + TEAMS * S::SHARED);
    fill_table<F>(table, w);
    __syncthreads();

    // Wait for the activations, and compute.
    pdl_wait();
    pdl_release();
    Multiplier<F, TOKENS, TEAMS, DEPTH> multiplier = {w, stages, table, ring, lane, own == 0};
    if (own == 0)
        for (int step = 0; step < S::COUNT - 1; step++) stages.produce(step, lane);
    multiplier.run();
    float(&acc)[TOKENS / 2] = multiplier.acc;

    // Reduce over teams, in the place of the activations.
    __syncthreads();
    if constexpr (TEAMS == 2) add_teams<TOKENS, WARPS>(acc, (float4 *)shared, team, own, lane);
    // Reduce over thread blocks: all store their sums, and the last one to arrive goes on.
    if (gridDim.y > 1) {
        constexpr size_t SIZE = 16 * WARPS * TOKENS / 4;
        const size_t group = (size_t)blockIdx.z * gridDim.x + blockIdx.x;
        float4 *all = (float4 *)partial + group * gridDim.y * SIZE + own * 32 + lane;
        if (team == 0)
#pragma unroll
            for (int i = 0; i < TOKENS / 8; i++) __stcg(all + blockIdx.y * SIZE + i * WARPS * 32, *(float4 *)&acc[4 * i]);
        if (!arrive(arrived + group)) return;
        __threadfence();
        // The last one adds up all sums, by the tree.
        if (team == 0) {
#pragma unroll
            for (int i = 0; i < TOKENS / 8; i++) {
                float4 v[4];
#pragma unroll
                for (int p = 0; p < 4; p++)
                    if (p < gridDim.y) v[p] = __ldcg(all + p * SIZE + i * WARPS * 32);
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float s[4] = {((float *)&v[0])[e], ((float *)&v[1])[e], ((float *)&v[2])[e], ((float *)&v[3])[e]};
                    acc[4 * i + e] = tree(s, gridDim.y);
                }
            }
        }
    }
    // Store, through [TOKENS][ROWS] in shared memory (swizzled against bank conflicts), so that a thread stores eight columns at a time.
    constexpr int ROWS = 16 * WARPS;
    float *sums = (float *)shared;
    if (team == 0)
#pragma unroll
        for (int i = 0; i < TOKENS / 2; i++) {
            const int t = i / 4 * 8 + lane % 4 * 2 + i % 2, row = 16 * own + lane / 4 + i % 4 / 2 * 8;
            sums[t * ROWS + (row ^ t % 8 / 2 * 8)] = acc[i];
        }
    __syncthreads();
    const int token0 = blockIdx.z * TOKENS, live = min(m - token0, TOKENS);
    for (int i = threadIdx.x; i < ROWS / 8 * live; i += 512) {
        const int t = i / (ROWS / 8), row = i % (ROWS / 8) * 8, column = blockIdx.x * ROWS + row;
        if (column >= w.n) continue;
        const float4 *v = (const float4 *)(sums + t * ROWS + (row ^ t % 8 / 2 * 8));
        store8<T>(y + (size_t)(token0 + t) * ldy + column, v[0], v[1], w.n - column);
    }
#else
    __trap();  // not to be launched
#endif
}

#define GEMM(F, f, T, type, M, name, TEAMS)                                                                           \
    extern "C" __global__ void __launch_bounds__(512, 1)                                                              \
        gemm_##f##_##name##_##type(WEIGHTS_ARGS, const unsigned char *x, T *y, int m, int ldy, int slices,            \
                                   const unsigned char *sums, float *partial, int *arrived) {                         \
        gemm_wide<F, M, TEAMS, T>(WEIGHTS, x, y, m, ldy, slices, sums, partial, arrived);                             \
    }
#define GEMMS(F, f, T, type)                                                                                          \
    GEMM(F, f, T, type, 16, 16w, 1) GEMM(F, f, T, type, 32, 32w, 1) GEMM(F, f, T, type, 32, 32n, 2)                   \
    GEMM(F, f, T, type, 64, 64w, 1) GEMM(F, f, T, type, 64, 64n, 2)
#define BOTH(F, f) GEMMS(F, f, bf16, bf16) GEMMS(F, f, float, f32)
ALL_FORMATS(BOTH)

// BITS8: for 8-bit formats.
template <bool BITS8>
__device__ __forceinline__ void arrange(const bf16 *x, int m, int k, int group, unsigned char *out, float *sums) {
    pdl_release();
    pdl_wait();
    const int each = blockDim.x / 4, tokens = each * gridDim.y, token = blockIdx.y * each + threadIdx.x / 4;
    const int tile = blockIdx.x, part = threadIdx.x % 4;
    const int at = 64 * tile + 16 * part, from = blockIdx.z * tokens;
    out += (size_t)blockIdx.z * gridDim.x * tokens * 128;
    // Load 16 inputs.
    uint4 a = make_uint4(0, 0, 0, 0), b = a;
    const uint4 *p = (const uint4 *)(x + (size_t)(from + token) * k + at);
    if (from + token < m && at < k) a = p[0];
    if (from + token < m && at + 8 < k) b = p[1];
    // Store them in the order of the products.
    unsigned char *row = out + ((size_t)tile * tokens + token) * 128;
    const int swizzle = token % 8;
    if constexpr (BITS8) {
        *(uint4 *)(row + ((2 * part) ^ swizzle) * 16) = make_uint4(a.x, a.z, b.x, b.z);
        *(uint4 *)(row + ((2 * part + 1) ^ swizzle) * 16) = make_uint4(a.y, a.w, b.y, b.w);
    } else {
        const int g = part / 2, half = part % 2 * 8;
        *(uint2 *)(row + ((4 * g) ^ swizzle) * 16 + half) = make_uint2(a.x, b.x);
        *(uint2 *)(row + ((4 * g + 1) ^ swizzle) * 16 + half) = make_uint2(a.y, b.y);
        *(uint2 *)(row + ((4 * g + 2) ^ swizzle) * 16 + half) = make_uint2(a.z, b.z);
        *(uint2 *)(row + ((4 * g + 3) ^ swizzle) * 16 + half) = make_uint2(a.w, b.w);
    }
    if (!group) return;
    // Sum them, in order; a group of 32 continues the sum of the thread before.
    auto add = [&](float sum) {
        const uint32_t words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float2 f = __bfloat1622float2(*(const bf162 *)&words[i]);
            sum += f.x;
            sum += f.y;
        }
        return sum;
    };
    float sum = add(0.f);
    sums += (size_t)blockIdx.z * gridDim.x * (64 / group) * tokens;
    if (group == 32) {
        const float before = __shfl_up_sync(~0u, sum, 1);
        if (part % 2) sum = add(before);
        if (part % 2) sums[((size_t)tile * 2 + part / 2) * tokens + token] = sum;
    } else {
        sums[((size_t)tile * 4 + part) * tokens + token] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(64) arrange_4(const bf16 *x, int m, int k, int group, unsigned char *out, float *sums) {
    arrange<false>(x, m, k, group, out, sums);
}

extern "C" __global__ void __launch_bounds__(64) arrange_8(const bf16 *x, int m, int k, int group, unsigned char *out, float *sums) {
    arrange<true>(x, m, k, group, out, sums);
}
