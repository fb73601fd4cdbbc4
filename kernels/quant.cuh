// The layout of quantised matrices on the GPU, the contract of the gemm kernels, and what these share.
//
// Layout. Rust packs matrices into it (src/ops/quant/tiles.rs). A matrix [n, k] is cut into strips of 16 rows, a strip into chunks of
// CHUNK tiles (the last one may have fewer), and a tile is 16 rows x 64 inputs. Rows past n and inputs past k are zero. A chunk holds the
// codes of its tiles, then their scales, then, for K4, the super-scales of all of them.
//
// A tile's codes are one 16-byte piece (or several) for each of 32 lanes. They hold the A fragments of four mma.m16n8k16 products. Which
// inputs a product takes is free, as long as the activations follow:
//   4-bit and dense: product j, lane quad q = lane % 4, element e: input 32(j/2) + 8q + 4(j%2) + e. A lane's inputs of two products are
//     then 16 contiguous bytes of an activation row.
//   8-bit: input 16j + 4q + e. A product then stays inside a group of 16.
// Elements e = 0, 1 are in registers a0 (row l/4) and a1 (row l/4 + 8), elements 2, 3 in a2 and a3.
//   4 bits: one word per product; the two codes of register i are nibbles i and i + 4. Codebooks: byte i holds both codes.
//   8 bits: two words per product; registers 0 and 1 are in the first and 2 and 3 in the second, two bytes each.
//   dense: four words per product, the bf16 registers themselves.
//
// A tile's scales, for each of the 8 pairs of rows (r, r + 8):
//   S16    Q4_0: half [2 groups of 32][2 rows]                                   value = s (code - 8)
//   SM16   Q4_1: half [2 groups of 32][2 rows][s, m]                             value = s code + m
//   K4     Q4_K: u8 [2 groups of 32][2 rows][sc, m], and for the chunk half [2 rows][d, -dmin]
//   LUT    NF4, FP4: float [2 rows], one group of 64                             value = codebook[code] s
//   S8     8-bit: float [4 groups of 16][2 rows]                                 value = s (code - zero)
//   SM8    8-bit: float [4 groups of 16][2 rows][s, m]                           value = s code + m
//   DENSE  none
// Scales multiply sums of products, in f32, so that weights are never rounded. The exception are codebook values, which the gemm kernels
// round to bf16, after multiplying all of them by the factor that makes the rounding errors smallest.
//
// gemm_F_M_T (F: format, M: variant, T: bf16 or f32): y [m, n] = x [m, k] W^T, with k a multiple of 8.
//   `quant_small.cu`: M = 8 or 16 for m <= M. M = near for m <= 8 where the activations fit in shared memory behind the rings.
//   `quant_wide.cu`: any m, M rows at a time; x and sums are laid out by its `arrange`.
// ldy is the row stride of y in values. `sums`, for formats with mins: x summed over each group, float [groups][64 tokens].
//
// Split-K. The chunks along k are cut into `slices` (1, 2, 4 or 8, chosen by the matrix's shape). A slice is summed in order, and slices
// are summed by a tree, ((s0 + s1) + (s2 + s3)) + .... So a row of y has the same bits for every m and whatever the other rows are.
//
// PDL. A gemm kernel releases the next kernel once its own inputs are complete; `lora_shrink_*` relies on that and runs at the same time.
//
// Columns of the products past m are computed from the last token or from zeros, and not stored.

#pragma once

#include "common.cuh"

enum Format { S16, SM16, K4, LUT, S8, SM8, DENSE };  // in the order of the arrays in constants.cuh

static_assert(MATRIX_TILE_ROWS == 16 && MATRIX_TILE_INPUTS == 64, "the tensor core fragments of four products");

struct Weights {
    const unsigned char *data;  // strips
    const uint32_t *pairs;      // LUT: for each byte of two codes, the pair of bf16 codebook values, multiplied
    float factor;               // LUT: the inverse of that multiplier
    float zero;                 // S8: the code that means zero
    int n, k;
};

// Sizes of format F.
template <int F> struct Traits {
    static constexpr bool bits8 = F == S8 || F == SM8;
    static constexpr bool min = SUM_GROUP[F] != 0;
    static constexpr int groups = F == LUT ? 1 : bits8 ? 4 : 2;  // of a tile; DENSE has none, and is computed in two halves
    static constexpr int words = CODE_WORDS[F], scale_words = SCALE_WORDS[F], CHUNK = CHUNK_TILES[F];
    // Bytes of a tile's codes, of a tile's scales, of a chunk's super-scales, and of a whole chunk.
    static constexpr int CODES = 128 * words, SCALES = 32 * scale_words, SUPERS = 4 * SUPER_WORDS[F];
    static constexpr int BYTES = CHUNK * (CODES + SCALES) + SUPERS;

    // Bytes of a strip of `tiles` tiles.
    static __host__ __device__ constexpr size_t strip(int tiles) {
        return (size_t)tiles * (CODES + SCALES) + (tiles + CHUNK - 1) / CHUNK * SUPERS;
    }
};

// A lane's part of a tile: codes, scales, super-scales.
template <int F> struct TileData {
    uint32_t w[Traits<F>::words];
    uint32_t s[Traits<F>::scale_words ? Traits<F>::scale_words : 1];
    uint2 super;
};

// Loads tile i of a chunk of `tiles` tiles, from shared or global memory.
template <int F> __device__ __forceinline__ void load_tile(TileData<F> &t, const unsigned char *chunk, int tiles, int i, int lane) {
    constexpr int W = Traits<F>::words, S = Traits<F>::scale_words;
#pragma unroll
    for (int j = 0; j < W / 4; j++) *(uint4 *)&t.w[4 * j] = *(const uint4 *)(chunk + i * Traits<F>::CODES + 512 * j + 16 * lane);
    const unsigned char *scales = chunk + tiles * Traits<F>::CODES + i * Traits<F>::SCALES + lane / 4 * 4 * S;
    if constexpr (S == 2) *(uint2 *)t.s = *(const uint2 *)scales;
    if constexpr (S > 2)
#pragma unroll
        for (int j = 0; j < S / 4; j++) *(uint4 *)&t.s[4 * j] = *(const uint4 *)(scales + 16 * j);
    if constexpr (F == K4)
        t.super = *(const uint2 *)(chunk + tiles * (Traits<F>::CODES + Traits<F>::SCALES) + lane / 4 * 8);
}

// Scale and min of group g, row l/4 + 8 half, for codes as `decode` returns them.
template <int F> __device__ __forceinline__ float2 scale_of(const TileData<F> &t, const Weights &w, int g, int half) {
    if constexpr (F == S16) {
        const __half2 s = *(const __half2 *)&t.s[g];
        return make_float2(half ? __high2float(s) : __low2float(s), 0.f);
    } else if constexpr (F == SM16) {
        return __half22float2(*(const __half2 *)&t.s[2 * g + half]);
    } else if constexpr (F == K4) {
        const uint32_t b = t.s[g] >> (16 * half);
        const float2 d = __half22float2(*(const __half2 *)(half ? &t.super.y : &t.super.x));
        return make_float2(d.x * (float)(b & 0xff), d.y * (float)((b >> 8) & 0xff));
    } else if constexpr (F == LUT) {
        return make_float2(__uint_as_float(t.s[half]), 0.f);
    } else if constexpr (F == S8) {
        return make_float2(__uint_as_float(t.s[2 * g + half]), 0.f);
    } else {
        return make_float2(__uint_as_float(t.s[4 * g + 2 * half]), __uint_as_float(t.s[4 * g + 2 * half + 1]));
    }
}

// A fragments of product j. Codes become exact bf16 values, minus the zero code for formats without mins; codebooks give their values,
// DENSE the weights themselves. `table`: the codebook in shared memory (`fill_table`).
template <int F> __device__ __forceinline__ void decode(uint32_t a[4], const TileData<F> &t, int j, const uint32_t *table, float zero) {
    if constexpr (F == DENSE) {
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = t.w[4 * j + i];
    } else if constexpr (F == LUT) {
        // Each lane reads its own copy, in its own bank.
        const uint32_t w = t.w[j];
        const char *base = (const char *)table;
        const uint32_t l = (threadIdx.x & 31) * 4;
        a[0] = *(const uint32_t *)(base + (((w << 7) & 0x7f80) | l));
        a[1] = *(const uint32_t *)(base + (((w >> 1) & 0x7f80) | l));
        a[2] = *(const uint32_t *)(base + (((w >> 9) & 0x7f80) | l));
        a[3] = *(const uint32_t *)(base + (((w >> 17) & 0x7f80) | l));
    } else if constexpr (Traits<F>::bits8) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t w = t.w[2 * j + i / 2];
            // 2^23 + code is exact, and so is the difference as bf16.
            const float lo = __uint_as_float(__byte_perm(w, 0x4b000000, 0x7540 + (i % 2) * 2)) - (8388608.f + zero);
            const float hi = __uint_as_float(__byte_perm(w, 0x4b000000, 0x7541 + (i % 2) * 2)) - (8388608.f + zero);
            const bf162 p = __floats2bfloat162_rn(lo, hi);
            a[i] = *(const uint32_t *)&p;
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            // 0x4300 | code is 128 + code as bf16. The lop3 does mask and or at once; the compiler does not find it with both constants
            // as immediates. Volatile, so that it stays before the wait for products that it is meant to overlap.
            asm volatile(
                "{ .reg .b32 biased;\n"
                "lop3.b32 biased, %1, %2, %3, 0xea;\n"
                "fma.rn.bf16x2 %0, biased, %4, %5; }"
                : "=r"(a[i])
                : "r"(t.w[j] >> (4 * i)), "r"(0x000f000f), "r"(0x43004300), "r"(0x3f803f80), "r"(F == S16 ? 0xc308c308 : 0xc300c300));
        }
    }
}

// Fills the codebook table in shared memory: 256 pairs of values, with a copy of each for every bank.
template <int F> __device__ __forceinline__ void fill_table(uint32_t *table, const Weights &w) {
    if constexpr (F == LUT) {
        for (int i = threadIdx.x; i < 256; i += blockDim.x) {
            const uint32_t v = w.pairs[i];
#pragma unroll
            for (int j = 0; j < 8; j++) ((uint4 *)table)[i * 8 + (i + j) % 8] = make_uint4(v, v, v, v);
        }
    }
}

template <typename T> __device__ __forceinline__ void store(T *y, float v);
template <> __device__ __forceinline__ void store<bf16>(bf16 *y, float v) { *y = __float2bfloat16_rn(v); }
template <> __device__ __forceinline__ void store<float>(float *y, float v) { *y = v; }

// Stores eight neighbouring values, or the first `count` of them.
template <typename T> __device__ __forceinline__ void store8(T *y, float4 a, float4 b, int count) {
    if (count >= 8 && (size_t)y % 16 == 0) {
        if constexpr (sizeof(T) == 4) {
            ((float4 *)y)[0] = a, ((float4 *)y)[1] = b;
        } else {
            const __align__(16) bf162 v[4] = {__floats2bfloat162_rn(a.x, a.y), __floats2bfloat162_rn(a.z, a.w), __floats2bfloat162_rn(b.x, b.y),
                                __floats2bfloat162_rn(b.z, b.w)};
            *(uint4 *)y = *(const uint4 *)v;
        }
        return;
    }
    const float v[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (i < count) store<T>(y + i, v[i]);
}

// Sums the slices by a tree.
__device__ __forceinline__ float tree(const float (&s)[4], int slices) {
    return slices == 1 ? s[0] : slices == 2 ? s[0] + s[1] : (s[0] + s[1]) + (s[2] + s[3]);
}

__device__ __forceinline__ float tree(const float (&s)[8], int slices) {
    const float low[4] = {s[0], s[1], s[2], s[3]}, high[4] = {s[4], s[5], s[6], s[7]};
    return slices <= 4 ? tree(low, slices) : tree(low, 4) + tree(high, 4);
}

#if __CUDA_ARCH__ >= 900
// Waits until the mbarrier's phase of `parity` has completed.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
    asm volatile(
        "{ .reg .pred p;\n"
        "again: mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n"
        "@!p bra again; }\n" ::"r"(barrier), "r"(parity) : "memory");
}
#endif

// A pipeline of a warp's weights: a ring of chunks in shared memory that only this warp uses. On Hopper one lane starts a bulk copy of a
// whole chunk, elsewhere all lanes copy with cp.async.
//
// F: format. DEPTH: stages of the ring.
template <int F, int DEPTH> struct Ring {
    static constexpr int STAGES = DEPTH, CHUNK = Traits<F>::CHUNK;
    static constexpr int BYTES = (Traits<F>::BYTES + 127) / 128 * 128;
    static constexpr int SHARED = STAGES * BYTES + 128;  // bytes per warp: stages, then their mbarriers

    unsigned char *shared;
    uint32_t barriers;
    const unsigned char *from;
    int tiles, lane;

    // For `tiles` tiles from chunk `first` of a strip on. Starts loading the first STAGES - 1 chunks.
    __device__ __forceinline__ Ring(const Weights &w, unsigned char *shared, int strip, int first, int tiles, int lane)
        : shared(shared), barriers((uint32_t)__cvta_generic_to_shared(shared + STAGES * BYTES)),
          from(w.data + Traits<F>::strip((w.k + 63) / 64) * strip + (size_t)first * Traits<F>::BYTES), tiles(tiles), lane(lane) {
#if __CUDA_ARCH__ >= 900
        if (lane == 0) {
#pragma unroll
            for (int i = 0; i < STAGES; i++) asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barriers + 8 * i));
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        }
        __syncwarp();
#endif
#pragma unroll
        for (int i = 0; i < STAGES - 1; i++) start(i, i);
    }

    // Tiles of a chunk.
    __device__ __forceinline__ int size(int chunk) const { return min(CHUNK, tiles - chunk * CHUNK); }

    // Starts loading a chunk, if there is one, into a stage.
    __device__ __forceinline__ void start(int chunk, int stage) {
        const int size = this->size(chunk);
        const int bytes = size * (Traits<F>::CODES + Traits<F>::SCALES) + Traits<F>::SUPERS;
        const unsigned char *at = from + (size_t)chunk * Traits<F>::BYTES;
        const uint32_t to = (uint32_t)__cvta_generic_to_shared(shared + stage * BYTES);
#if __CUDA_ARCH__ >= 900
        asm volatile(
            "{ .reg .pred p; setp.ne.b32 p, %4, 0;\n"
            "@p mbarrier.arrive.expect_tx.shared.b64 _, [%3], %2;\n"
            "@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3]; }" ::"r"(to), "l"(at),
            "r"(bytes), "r"(barriers + 8 * stage), "r"(int(size > 0 && lane == 0))
            : "memory");
        __syncwarp();
#else
        if (size > 0)
            for (int i = 16 * lane; i < bytes; i += 512) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + i), "l"(at + i));
        asm volatile("cp.async.commit_group;");
#endif
    }

    // Waits for a chunk and returns it; chunks are taken in order. Starts loading another one into the stage of the previous chunk, whose
    // tiles must have been used. `round`: how often the ring has wrapped around, which gives the parity of the stage's mbarrier.
    __device__ __forceinline__ const unsigned char *take(int chunk, int stage, int round) {
        __syncwarp();
        start(chunk + STAGES - 1, stage == 0 ? STAGES - 1 : stage - 1);
#if __CUDA_ARCH__ >= 900
        barrier_wait(barriers + 8 * stage, round & 1);
#else
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
        __syncwarp();
#endif
        return shared + stage * BYTES;
    }
};

#define WEIGHTS_ARGS const unsigned char *data, const uint32_t *pairs, float factor, float zero, int n, int k
#define WEIGHTS {data, pairs, factor, zero, n, k}
// Instantiates kernels for all formats.
#define ALL_FORMATS(KERNELS) \
    KERNELS(S16, s16) KERNELS(SM16, sm16) KERNELS(K4, k4) KERNELS(LUT, lut) KERNELS(S8, s8) KERNELS(SM8, sm8) KERNELS(DENSE, dense)
