// LoRA on a step's rows, for whatever mix of adapters and ranks it has: h = weight · scale · x·Aᵀ (shrink), then
// y += Σ h·Bᵀ + weight · scale · bias (expand). One launch of each does all modules of a site (q, k, v; o; gate, up; down;
// head). Steps with DoRA's adapters have a third, y *= gains (gain). No launch depends on adapters: blocks take items from the step's worklist and ranks from the slot table.
//
// work: 32-bit words at a 16-byte address, written by src/ops/lora/cuda.rs: two List headers, one of the segments taken 8
//   rows at a time and one of those taken 64 (shrink) and 32 (expand) at a time; the address of the h workspace (words 32
//   and 33); then what the headers point to.
// table: Entry [slot][entries]; this launch reads entry `entry` of each slot. Blocks of weights at Entry::base: A bf16
//   [Σ rank, k], the modules stacked; per module B bf16 [n, rank]; per module with a bias, f32 [n], up to 16 bytes each;
//   if Entry::gains, 16 times that many bytes from the base, f32 [n0 + n1 + n2], 1 for columns of other modules.
//   Ranks are multiples of 8, padded by zero rows of A and columns of B; 0 for a module that is not there.
// x: bf16 [rows, k], k a multiple of 8. y: bf16 or f32 [rows, n0 + n1 + n2], the modules' outputs side by side.
// h: f32, at Term::hidden [row of the segment][Term::stride], the modules' ranks stacked; if List::apart, one such plane,
//   List::plane values apart, for each split of k, else their sum.
//
// A row's bits depend on its own x, y and terms alone: k is cut into `splits` of `width`, and those into the warps' parts,
// by k alone; parts and splits are summed in order, whether by the shrinking block or by the expanding one. Both sizes of
// chunks, and any grid, give the same bits. Blocks are 128 threads; a grid of any size does all items.

#include "common.cuh"

constexpr int WARPS = 4;

struct alignas(16) List {
    uint32_t terms;      // How many there are.
    uint32_t chunks;     // What the expanding kernel takes.
    uint32_t apart;      // Whether each split of k has its own item and plane of h.
    uint32_t plane;      // Values between planes of h.
    uint32_t term_at;    // Word of the first Term.
    uint32_t chunk_at;   // Word of the first Chunk.
    uint32_t starts_at;  // Word of [kind of site][terms + 1]: units before each term. A unit is a chunk and 16 ranks.
    uint32_t unused;
    uint32_t units[8];   // By kind of site: 0 to 4 for qkv, o, gate and up, down, head.
};

// An adapter under a segment.
struct alignas(16) Term {
    uint32_t row, rows;  // The segment's.
    uint32_t slot;
    float weight;
    uint32_t hidden;     // Where its h starts, in values.
    uint32_t stride;     // Values between rows of h.
    uint32_t unused[2];
};

// Some rows of a segment.
struct alignas(16) Chunk {
    uint32_t row, rows;
    uint32_t term, terms;  // Its segment's terms follow one another.
};

struct alignas(16) Entry {
    uint64_t base;
    uint16_t ranks[3];
    uint16_t biases;  // Bit i: module i has one.
    float scales[3];
    uint32_t gains;  // Where they are, in 16 bytes; 0: none.
};

static_assert(sizeof(List) == 64 && sizeof(Term) == 32 && sizeof(Chunk) == 16 && sizeof(Entry) == 32, "as in Rust");

// Weights pass through once, or come from L2 again: they need no room in L1. Zeros if not `there`.
__device__ __forceinline__ uint4 load_weights16(const bf16* p, bool there) {
    uint4 v = make_uint4(0, 0, 0, 0);
    asm volatile("{.reg .pred p; setp.ne.b32 p, %5, 0; @p ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];}"
                 : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
                 : "l"(p), "r"(int(there)));
    return v;
}

__device__ __forceinline__ uint2 load_weights8(const bf16* p, bool there) {
    uint2 v = make_uint2(0, 0);
    asm volatile("{.reg .pred p; setp.ne.b32 p, %3, 0; @p ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];}"
                 : "+r"(v.x), "+r"(v.y)
                 : "l"(p), "r"(int(there)));
    return v;
}

// By 16-byte loads.
template <typename T>
__device__ __forceinline__ T load_record(const void* p) {
    T value;
#pragma unroll
    for (int i = 0; i < sizeof(T) / 16; i++) reinterpret_cast<uint4*>(&value)[i] = static_cast<const uint4*>(p)[i];
    return value;
}

__device__ __forceinline__ List load_list(const uint32_t* work, int list) {
    return load_record<List>(work + list * (sizeof(List) / 4));
}

__device__ __forceinline__ float* hidden_values(const uint32_t* work) {
    return reinterpret_cast<float*>(work[32] | static_cast<uint64_t>(work[33]) << 32);
}

// This block's run of the items: neighbours share a term or a chunk.
__device__ __forceinline__ void own_items(uint32_t items, uint32_t& from, uint32_t& to) {
    const uint32_t each = items / gridDim.x, more = items % gridDim.x;
    from = blockIdx.x * each + min(blockIdx.x, more);
    to = from + each + (blockIdx.x < more);
}

// Which of `n` terms an item is in, by their ascending starts and the end of the last, and that term's start and end. By
// whole warps.
__device__ __forceinline__ uint32_t find(const uint32_t* starts, uint32_t n, uint32_t item, uint32_t& begin, uint32_t& end) {
    const uint32_t lane = threadIdx.x % 32;
    uint32_t first = 0;
    while (n > 31) {
        const uint32_t step = (n + 31) / 32, at = lane * step;
        const bool below = at < n && starts[first + at] <= item;
        const uint32_t skip = (31 - __clz(__ballot_sync(~0u, below))) * step;
        first += skip;
        n = min(step, n - skip);
    }
    const uint32_t start = lane <= n ? starts[first + lane] : ~0u;
    const uint32_t last = 31 - __clz(__ballot_sync(~0u, lane < n && start <= item));
    begin = __shfl_sync(~0u, start, last);
    end = __shfl_sync(~0u, start, last + 1);
    return first + last;
}

// h for chunks of 8·NT rows. An item is one chunk, 16 ranks and, in lists with planes apart, one split. Ranks are the 16
// rows of the tensor cores' tile, so one row of x costs no more bytes of A than eight. Both operands permute k alike:
// lane l holds k 8(l%4)..+8 of every 32, sixteen bytes of row-major A and x.
//
// Runs beside the product before it, on multiprocessors that the product leaves free: products let the next kernel start only
// once all before them has ended, so x is there (in L2, which is where it is read from) and nobody reads h any more. Who
// comes next waits for both, since this kernel ends after the product.
template <int NT>
__device__ __forceinline__ void shrink(const uint32_t* work, const Entry* table, const bf16* x, int entries, int entry,
                                       int k, int splits, int width, int kind) {
    constexpr int ROWS = 8 * NT, BLOCKS = NT > 1 ? 1 : 4;
    __shared__ float part[WARPS][16][ROWS + 8];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int own_rank = threadIdx.x % 16, own_row = threadIdx.x / 16;
    pdl_release();
    const List list = load_list(work, NT > 1);
    const uint32_t units = reinterpret_cast<const List*>(work)[NT > 1].units[kind];
    const uint32_t* starts = work + list.starts_at + kind * (list.terms + 1);
    const uint32_t each = list.apart ? splits : 1;
    uint32_t from, to;
    own_items(units * each, from, to);
    float* const hidden = hidden_values(work);

    Term term;
    Entry weights;
    uint32_t begin = 0, end = 0, tiles = 1, ranks = 0;
    for (uint32_t item = from; item < to; item++) {
        const uint32_t unit = item / each;
        if (unit >= end) {
            const uint32_t i = find(starts, list.terms, unit, begin, end);
            term = load_record<Term>(work + list.term_at + i * (sizeof(Term) / 4));
            weights = load_record<Entry>(table + size_t(term.slot) * entries + entry);
            tiles = (end - begin) / ((term.rows + ROWS - 1) / ROWS);
            ranks = weights.ranks[0] + weights.ranks[1] + weights.ranks[2];
        }
        const uint32_t first_row = (unit - begin) / tiles * ROWS, first_rank = (unit - begin) % tiles * 16;
        if (first_rank >= ranks) continue;  // Another layer's rank is higher.
        const int rows = min(term.rows - first_row, ROWS);
        const bool upper = first_rank + 8 < ranks;
        const bf16* const a = reinterpret_cast<const bf16*>(weights.base) + size_t(first_rank + g) * k + 8 * t;
        const bf16* const b = x + size_t(term.row + first_row + g) * k + 8 * t;
        const uint32_t rank = first_rank + own_rank;
        const float scale = term.weight * (rank < weights.ranks[0]                                ? weights.scales[0]
                                           : rank < uint32_t(weights.ranks[0]) + weights.ranks[1] ? weights.scales[1]
                                                                                                  : weights.scales[2]);
        const int first_split = list.apart ? item % each : 0, last_split = list.apart ? first_split + 1 : splits;

        float sum[NT] = {};
        for (int split = first_split; split < last_split; split++) {
            const int start = split * width + warp * (width / WARPS), stop = min(start + width / WARPS, k);
            float c[NT][4] = {};
            for (int at = start; at < stop; at += 32 * BLOCKS) {
                uint4 low[BLOCKS], high[BLOCKS];
#pragma unroll
                for (int i = 0; i < BLOCKS; i++) {
                    const bool there = at + 32 * i + 8 * t < stop;
                    low[i] = load_weights16(a + at + 32 * i, there);
                    high[i] = load_weights16(a + size_t(8) * k + at + 32 * i, there && upper);
                }
#pragma unroll
                for (int i = 0; i < BLOCKS; i++) {
                    uint4 v[NT];
#pragma unroll
                    for (int n = 0; n < NT; n++) {
                        v[n] = make_uint4(0, 0, 0, 0);
                        if (8 * n + g < rows && at + 32 * i + 8 * t < stop)
                            v[n] = __ldcg(reinterpret_cast<const uint4*>(b + size_t(8 * n) * k + at + 32 * i));
                    }
#pragma unroll
                    for (int n = 0; n < NT; n++) {
                        if (8 * n >= rows) break;
                        mma_m16n8k16(c[n], low[i].x, high[i].x, low[i].y, high[i].y, v[n].x, v[n].y);
                        mma_m16n8k16(c[n], low[i].z, high[i].z, low[i].w, high[i].w, v[n].z, v[n].w);
                    }
                }
            }
#pragma unroll
            for (int n = 0; n < NT; n++) {
                *reinterpret_cast<float2*>(&part[warp][g][8 * n + 2 * t]) = make_float2(c[n][0], c[n][1]);
                *reinterpret_cast<float2*>(&part[warp][g + 8][8 * n + 2 * t]) = make_float2(c[n][2], c[n][3]);
            }
            __syncthreads();
#pragma unroll
            for (int n = 0; n < NT; n++) {
                float v = part[0][own_rank][own_row + 8 * n];
#pragma unroll
                for (int w = 1; w < WARPS; w++) v += part[w][own_rank][own_row + 8 * n];
                // No fused multiply-add: planes apart are rounded before they are summed.
                sum[n] = __fadd_rn(sum[n], __fmul_rn(v, scale));
            }
            __syncthreads();
        }
        if (rank >= ranks) continue;
        float* const h = hidden + (list.apart ? size_t(first_split) * list.plane : 0) + term.hidden + rank;
#pragma unroll
        for (int n = 0; n < NT; n++)
            if (8 * n + own_row < rows) h[size_t(first_row + 8 * n + own_row) * term.stride] = sum[n];
    }
    pdl_wait();
}

extern "C" __global__ void __launch_bounds__(128, 5)
    lora_shrink_small(const uint32_t* work, const Entry* table, const bf16* x, int entries, int entry, int k, int splits,
                      int width, int kind) {
    shrink<1>(work, table, x, entries, entry, k, splits, width, kind);
}

extern "C" __global__ void __launch_bounds__(128, 4)
    lora_shrink_large(const uint32_t* work, const Entry* table, const bf16* x, int entries, int entry, int k, int splits,
                      int width, int kind) {
    shrink<8>(work, table, x, entries, entry, k, splits, width, kind);
}

// Eight neighbouring columns of a row of y, as loaded. `vector`: all eight are there, at a 16-byte address.
template <typename Y>
struct Columns;

template <>
struct Columns<bf16> {
    uint4 raw;

    __device__ __forceinline__ void load(const bf16* p, int count, bool vector) {
        if (vector) {
            raw = *reinterpret_cast<const uint4*>(p);
            return;
        }
        const uint16_t* const v = reinterpret_cast<const uint16_t*>(p);
        auto pair = [&](int i) { return (i < count ? v[i] : 0u) | (i + 1 < count ? v[i + 1] : 0u) << 16; };
        raw = make_uint4(pair(0), pair(2), pair(4), pair(6));
    }

    __device__ __forceinline__ void add_store(bf16* p, int count, bool vector, const float (&d)[8]) {
        auto sum = [&](uint32_t y, int i) {
            const bf162 v = __floats2bfloat162_rn(__uint_as_float(y << 16) + d[i], __uint_as_float(y & 0xffff0000u) + d[i + 1]);
            return *reinterpret_cast<const uint32_t*>(&v);
        };
        const uint4 v = make_uint4(sum(raw.x, 0), sum(raw.y, 2), sum(raw.z, 4), sum(raw.w, 6));
        if (vector) {
            *reinterpret_cast<uint4*>(p) = v;
            return;
        }
        auto store = [&](uint32_t pair, int i) {
            uint16_t* const to = reinterpret_cast<uint16_t*>(p) + i;
            if (i < count) to[0] = pair;
            if (i + 1 < count) to[1] = pair >> 16;
        };
        store(v.x, 0), store(v.y, 2), store(v.z, 4), store(v.w, 6);
    }
};

template <>
struct Columns<float> {
    float v[8];

    __device__ __forceinline__ void load(const float* p, int count, bool vector) {
        if (vector) {
            *reinterpret_cast<float4*>(v) = *reinterpret_cast<const float4*>(p);
            *reinterpret_cast<float4*>(v + 4) = *reinterpret_cast<const float4*>(p + 4);
            return;
        }
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = i < count ? p[i] : 0.f;
    }

    __device__ __forceinline__ void add_store(float* p, int count, bool vector, const float (&d)[8]) {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] += d[i];
        if (vector) {
            *reinterpret_cast<float4*>(p) = *reinterpret_cast<const float4*>(v);
            *reinterpret_cast<float4*>(p + 4) = *reinterpret_cast<const float4*>(v + 4);
            return;
        }
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i < count) p[i] = v[i];
    }
};

// Two neighbouring values of h as bf16, and what that rounding lost: together 16 bits, two products of the tensor cores.
__device__ __forceinline__ void split_bf16(float v0, float v1, uint32_t& high, uint32_t& low) {
    const bf162 h = __floats2bfloat162_rn(v0, v1);
    const float2 f = __bfloat1622float2(h);
    const bf162 l = __floats2bfloat162_rn(v0 - f.x, v1 - f.y);
    high = *reinterpret_cast<const uint32_t*>(&h);
    low = *reinterpret_cast<const uint32_t*>(&l);
}

// y += h·Bᵀ for chunks of 8·NT rows; a warp does a chunk and 64 columns of one module, alone. Columns are the 16 rows of the
// tensor cores' tile. Ranks are permuted as k above, lane l holding 4(l%4)..+4 of every 16; columns so that a lane's
// outputs of the four tiles are eight neighbours: row m of tile j is column 8(m%8) + 2j + m/8.
template <int NT, typename Y>
__device__ __forceinline__ void expand(const uint32_t* work, const Entry* table, Y* y, int entries, int entry, int k,
                                       int splits, int n0, int n1, int n2) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int n = n0 + n1 + n2;
    const int tiles0 = (n0 + 63) / 64, tiles1 = (n1 + 63) / 64, tiles = tiles0 + tiles1 + (n2 + 63) / 64;
    pdl_release();
    const List list = load_list(work, NT > 1);
    const uint32_t groups = (tiles + WARPS - 1) / WARPS;
    uint32_t from, to;
    own_items(list.chunks * groups, from, to);
    const float* const hidden = hidden_values(work);
    const int planes = list.apart ? splits : 1;
    bool waited = false;
    for (uint32_t item = from; item < to; item++) {
        int tile = item % groups * WARPS + warp;
        if (tile >= tiles) continue;
        int module = 0, width = n0, offset = 0;
        if (tile >= tiles0) tile -= tiles0, module = 1, width = n1, offset = n0;
        if (module == 1 && tile >= tiles1) tile -= tiles1, module = 2, width = n2, offset = n0 + n1;
        const Chunk chunk = load_record<Chunk>(work + list.chunk_at + item / groups * (sizeof(Chunk) / 4));
        const int rows = chunk.rows;
        const Term* const terms = reinterpret_cast<const Term*>(work + list.term_at) + chunk.term;

        // This lane's columns, of the module, and how many of the eight there are.
        const int column = tile * 64 + 8 * g, count = width - column;
        const bool vector = count >= 8 && n % 8 == 0 && offset % 8 == 0;
        Y* const out = y + size_t(chunk.row + 2 * t) * n + offset + column;
        Columns<Y> old[NT][2];
        auto load_old = [&] {
#pragma unroll
            for (int i = 0; i < NT; i++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    if (8 * i + 2 * t + e < rows && count > 0) old[i][e].load(out + size_t(8 * i + e) * n, count, vector);
        };
        bool loaded = false;
        float c[NT][4][4] = {};
        for (uint32_t i = 0; i < chunk.terms; i++) {
            const Term term = load_record<Term>(terms + i);
            const Entry weights = load_record<Entry>(table + size_t(term.slot) * entries + entry);
            const int r0 = weights.ranks[0], r1 = weights.ranks[1], r2 = weights.ranks[2];
            const int ranks = module == 0 ? r0 : module == 1 ? r1 : r2;
            if (!ranks) continue;
            const bf16* b = reinterpret_cast<const bf16*>(weights.base) + size_t(r0 + r1 + r2) * k;
            if (weights.biases >> module & 1) {
                const float scale = term.weight * (module == 0   ? weights.scales[0]
                                                   : module == 1 ? weights.scales[1]
                                                                 : weights.scales[2]);
                // f32, each up to a multiple of 16 bytes, after all B.
                const bf16* p = b + size_t(n0) * r0 + size_t(n1) * r1 + size_t(n2) * r2;
                if (module > 0 && weights.biases & 1) p += (n0 + 3) / 4 * 8;
                if (module > 1 && weights.biases & 2) p += (n1 + 3) / 4 * 8;
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    const float v = j < count ? __fmul_rn(scale, reinterpret_cast<const float*>(p)[column + j]) : 0.f;
#pragma unroll
                    for (int m = 0; m < NT; m++) c[m][j / 2][j % 2 * 2] += v, c[m][j / 2][j % 2 * 2 + 1] += v;
                }
            }
            if (module > 0) b += size_t(n0) * r0;
            if (module > 1) b += size_t(n1) * r1;
            b += size_t(column) * ranks;
            const int before = module == 0 ? 0 : module == 1 ? r0 : r0 + r1;
            const float* const h = hidden + term.hidden + size_t(chunk.row - term.row + g) * term.stride + before;
            for (int first = 0; first < ranks; first += 16) {
                const int rank = first + 4 * t;
                uint2 w[8];
#pragma unroll
                for (int j = 0; j < 8; j++) w[j] = load_weights8(b + j * ranks + rank, rank < ranks && j < count);
                // Weights first, they were there before the step.
                if (!waited) pdl_wait();
                waited = true;
                if (NT == 1 && !loaded) load_old();
                loaded = true;
                float4 v[NT] = {};
                const float* p = h + rank;
#pragma unroll(NT > 1 ? 1 : 4)
                for (int plane = 0; plane < planes; plane++, p += list.plane)
#pragma unroll
                    for (int m = 0; m < NT; m++) {
                        if (rank >= ranks || 8 * m + g >= rows) continue;
                        const float4 u = *reinterpret_cast<const float4*>(p + size_t(8 * m) * term.stride);
                        v[m].x += u.x, v[m].y += u.y, v[m].z += u.z, v[m].w += u.w;
                    }
#pragma unroll
                for (int m = 0; m < NT; m++) {
                    if (8 * m >= rows) break;
                    uint32_t high[2], low[2];
                    split_bf16(v[m].x, v[m].y, high[0], low[0]);
                    split_bf16(v[m].z, v[m].w, high[1], low[1]);
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        mma_m16n8k16(c[m][j], w[2 * j].x, w[2 * j + 1].x, w[2 * j].y, w[2 * j + 1].y, high[0], high[1]);
                        mma_m16n8k16(c[m][j], w[2 * j].x, w[2 * j + 1].x, w[2 * j].y, w[2 * j + 1].y, low[0], low[1]);
                    }
                }
            }
        }
        if (!loaded) continue;
        // Many rows have no registers to load it early.
        if (NT > 1) load_old();
#pragma unroll
        for (int i = 0; i < NT; i++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                if (8 * i + 2 * t + e >= rows || count <= 0) continue;
                const float d[8] = {c[i][0][e], c[i][0][2 + e], c[i][1][e], c[i][1][2 + e],
                                    c[i][2][e], c[i][2][2 + e], c[i][3][e], c[i][3][2 + e]};
                old[i][e].add_store(out + size_t(8 * i + e) * n, count, vector, d);
            }
    }
    if (!waited) pdl_wait();
}

#define EXPAND(name, NT, Y, blocks)                                                                                     \
    extern "C" __global__ void __launch_bounds__(128, blocks)                                                           \
        name(const uint32_t* work, const Entry* table, Y* y, int entries, int entry, int k, int splits, int n0, int n1, \
             int n2) {                                                                                                  \
        expand<NT, Y>(work, table, y, entries, entry, k, splits, n0, n1, n2);                                           \
    }

EXPAND(lora_expand_small, 1, bf16, 5)
EXPAND(lora_expand_large, 4, bf16, 3)
EXPAND(lora_expand_small_f32, 1, float, 4)
EXPAND(lora_expand_large_f32, 4, float, 2)

__device__ __forceinline__ float to_float(bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ void store(bf16* p, float v) { *p = __float2bfloat16_rn(v); }
__device__ __forceinline__ void store(float* p, float v) { *p = v; }

// y *= gains of the rows' adapters, each of which has its rows to itself, after expanding. An item is a chunk of either
// list and 512 columns.
template <typename Y>
__device__ __forceinline__ void gain(const uint32_t* work, const Entry* table, Y* y, int entries, int entry, int n) {
    constexpr int COLUMNS = 512, ROWS = 8;
    pdl_release();
    pdl_wait();
    const uint32_t few = load_list(work, 0).chunks, many = load_list(work, 1).chunks;
    const uint32_t groups = (n + COLUMNS - 1) / COLUMNS;
    uint32_t from, to;
    own_items((few + many) * groups, from, to);
    for (uint32_t item = from; item < to; item++) {
        const uint32_t i = item / groups;
        const List list = load_list(work, i >= few);
        const Chunk chunk = load_record<Chunk>(work + list.chunk_at + (i < few ? i : i - few) * (sizeof(Chunk) / 4));
        const Term term = load_record<Term>(work + list.term_at + chunk.term * (sizeof(Term) / 4));
        const Entry weights = load_record<Entry>(table + size_t(term.slot) * entries + entry);
        if (!weights.gains) continue;
        const float* const gains = reinterpret_cast<const float*>(weights.base + uint64_t(16) * weights.gains);
        const int first = item % groups * COLUMNS, last = min(first + COLUMNS, n);
        for (int column = first + threadIdx.x; column < last; column += blockDim.x) {
            const float factor = gains[column];
            Y* const out = y + size_t(chunk.row) * n + column;
            for (int row = 0; row < chunk.rows; row += ROWS) {
                // All loads of some rows before their stores, which may lie anywhere to the compiler.
                Y v[ROWS];
#pragma unroll
                for (int r = 0; r < ROWS; r++)
                    if (row + r < chunk.rows) v[r] = out[size_t(row + r) * n];
#pragma unroll
                for (int r = 0; r < ROWS; r++)
                    if (row + r < chunk.rows) store(out + size_t(row + r) * n, to_float(v[r]) * factor);
            }
        }
    }
}

#define GAIN(name, Y)                                                                                          \
    extern "C" __global__ void __launch_bounds__(128)                                                          \
        name(const uint32_t* work, const Entry* table, Y* y, int entries, int entry, int n) {                  \
        gain<Y>(work, table, y, entries, entry, n);                                                            \
    }

GAIN(lora_gain, bf16)
GAIN(lora_gain_f32, float)
