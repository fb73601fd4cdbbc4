// How matrices are stored, and what the kernels that read them share.
//
// Layout. A matrix [n, k] is strips of 16 rows, a strip chunks of CHUNK tiles (the last one may have fewer), a tile 64 inputs; rows
// past n and inputs past k are zero. A chunk is the codes of its tiles, then their scales, then what K4 has for all of them.
// A tile's codes are 32 lanes' 16-byte pieces: for each of four products of 16x16, a lane's fragment of mma.m16n8k16's first
// operand. Which inputs a product takes is ours to choose, as long as the activations follow:
//   4-bit and dense: product j, lane quad q, element e: input 32(j/2) + 8q + 4(j%2) + e, so that a lane's inputs of two
//     products are 16 bytes of an activation row;
//   8-bit: input 16j + 4q + e, so that a product stays inside a group of 16.
// Element e = 0, 1 are registers a0 (row l/4) and a1 (row l/4 + 8), e = 2, 3 are a2 and a3.
//   4 bits: a word a product; register i's two codes are nibbles i and i + 4. Codebooks: byte i holds both codes.
//   8 bits: two words a product; registers 0 and 1 (2 and 3) in the first (second), two bytes each.
//   dense: four words a product, the registers themselves, bf16.
// A tile's scales, for each of 8 pairs of rows (r, r + 8):
//   S16    Q4_0: half [2 groups of 32][2 rows]                                   value = s (code - 8)
//   SM16   Q4_1: half [2 groups of 32][2 rows][s, m]                             value = s code + m
//   K4     Q4_K: u8 [2 groups of 32][2 rows][sc, m], and for the chunk half [2 rows][d, -dmin]
//   LUT    NF4, FP4: float [2 rows], a group of 64                               value = codebook[code] s
//   S8     8-bit: float [4 groups of 16][2 rows]                                 value = s (code - zero)
//   SM8    8-bit: float [4 groups of 16][2 rows][s, m]                           value = s code + m
//   DENSE  none
// Scales multiply sums of products, in f32, so that weights are never rounded (codebook values are, to bf16, in
// `gemm_*`: after multiplying all by the factor that makes the errors smallest).
//
// gemm_F_M_T: y [m, n] = x [m, k] . W^T, k a multiple of 8: in `quant_small.cu` for m <= M, 8 or 16 (`near`: for m k values that fit
// beside the rings), in `quant_wide.cu` for any m, M at a time. The chunks along k are cut into `slices` (1, 2, 4 or 8, by the
// matrix's shape); a slice is summed in order, and slices by a tree, ((s0 + s1) + (s2 + s3)) + ..., so that a row of y has the same
// bits for every m and every other row. Where there are mins, `sums` is x summed over each group: float [groups][64 tokens];
// `quant_wide.cu` takes x and sums as its `arrange` leaves them.
// Once a product's inputs are there, the next kernel may start: `lora_shrink_*` relies on that and runs beside it.
// Columns of the products past m are computed from the last token or from zeros, and not stored.

#pragma once

#include "common.cuh"

enum Format { S16, SM16, K4, LUT, S8, SM8, DENSE };

struct Weights {
    const unsigned char *data;  // strips
    const uint32_t *pairs;      // LUT: 256 pairs of bf16 codebook values, times the factor
    float factor;               // LUT: one over that factor
    float zero;                 // S8: the code that means zero
    int n, k;
};

template <int F> struct Traits {
    static constexpr bool bits8 = F == S8 || F == SM8;
    static constexpr bool min = F == SM16 || F == K4 || F == SM8;
    static constexpr int groups = F == LUT ? 1 : bits8 ? 4 : 2;  // a tile (dense has none: any two halves)
    static constexpr int words = F == DENSE ? 16 : bits8 ? 8 : 4;  // of codes, a lane and tile
    static constexpr int scale_words = F == SM16 ? 4 : F == S8 ? 8 : F == SM8 ? 16 : F == DENSE ? 0 : 2;  // a row pair and tile
    static constexpr int CHUNK = words > 4 ? 2 : 4;  // tiles
    static constexpr int CODES = 128 * words, SCALES = 32 * scale_words, SUPERS = F == K4 ? 64 : 0;  // bytes
    static constexpr int BYTES = CHUNK * (CODES + SCALES) + SUPERS;  // a whole chunk

    static __host__ __device__ constexpr size_t strip(int tiles) {
        return (size_t)tiles * (CODES + SCALES) + (tiles + CHUNK - 1) / CHUNK * SUPERS;
    }
};

template <int F> struct TileData {
    uint32_t w[Traits<F>::words];
    uint32_t s[Traits<F>::scale_words ? Traits<F>::scale_words : 1];
    uint2 super;
};

// Tile i of a chunk of `tiles`, from wherever the chunk is.
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

// Scale and min of group g, row l/4 + 8 half. With codes as `decode` gives them.
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

// Fragments of product j: codes as exact bf16 (minus zero where there are no mins), codebook values, or values.
template <int F> __device__ __forceinline__ void decode(uint32_t a[4], const TileData<F> &t, int j, const uint32_t *table, float zero) {
    if constexpr (F == DENSE) {
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = t.w[4 * j + i];
    } else if constexpr (F == LUT) {
        // The table has a copy for each lane's bank.
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
            // 0x4300 | code is 128 + code as bf16. One instruction, which the compiler does not find with both constants in it.
            // Volatile, so that it stays before a wait for products that it is to overlap.
            asm volatile(
                "{ .reg .b32 biased;\n"
                "lop3.b32 biased, %1, %2, %3, 0xea;\n"
                "fma.rn.bf16x2 %0, biased, %4, %5; }"
                : "=r"(a[i])
                : "r"(t.w[j] >> (4 * i)), "r"(0x000f000f), "r"(0x43004300), "r"(0x3f803f80), "r"(F == S16 ? 0xc308c308 : 0xc300c300));
        }
    }
}

// The codebook's pairs, a copy for each bank.
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

// Eight neighbours, or as many as are there.
template <typename T> __device__ __forceinline__ void store8(T *y, float4 a, float4 b, int there) {
    if (there >= 8 && (size_t)y % 16 == 0) {
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
        if (i < there) store<T>(y + i, v[i]);
}

// The tree over slices.
__device__ __forceinline__ float tree(const float (&s)[4], int slices) {
    return slices == 1 ? s[0] : slices == 2 ? s[0] + s[1] : (s[0] + s[1]) + (s[2] + s[3]);
}

__device__ __forceinline__ float tree(const float (&s)[8], int slices) {
    const float low[4] = {s[0], s[1], s[2], s[3]}, high[4] = {s[4], s[5], s[6], s[7]};
    return slices <= 4 ? tree(low, slices) : tree(low, 4) + tree(high, 4);
}

#if __CUDA_ARCH__ >= 900
// Until the phase of `parity` has ended.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
    asm volatile(
        "{ .reg .pred p;\n"
        "again: mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n"
        "@!p bra again; }\n" ::"r"(barrier), "r"(parity) : "memory");
}
#endif

// A warp's chunks on their way from memory: a ring in shared memory that only this warp uses. On Hopper one lane asks the copy
// engine for a whole chunk; elsewhere all lanes copy.
template <int F, int DEPTH> struct Ring {
    static constexpr int STAGES = DEPTH, CHUNK = Traits<F>::CHUNK;
    static constexpr int BYTES = (Traits<F>::BYTES + 127) / 128 * 128;
    static constexpr int SHARED = STAGES * BYTES + 128;  // a warp: stages, then their barriers

    unsigned char *shared;
    uint32_t barriers;
    const unsigned char *from;
    int tiles, lane;

    // `tiles` tiles from chunk `first` of a strip on; starts the first STAGES - 1 chunks.
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

    __device__ __forceinline__ int size(int chunk) const { return min(CHUNK, tiles - chunk * CHUNK); }

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

    // Waits for a chunk, in order, and starts another where the one before was, whose tiles have been used. Each stage's barrier
    // turns once a round.
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
// One kernel of each kind for each format.
#define ALL_FORMATS(KERNELS) \
    KERNELS(S16, s16) KERNELS(SM16, sm16) KERNELS(K4, k4) KERNELS(LUT, lut) KERNELS(S8, s8) KERNELS(SM8, sm8) KERNELS(DENSE, dense)
