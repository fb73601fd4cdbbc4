// y += Σ h·Bᵀ + weight · scale · bias (lora_expand_*), and y *= gains (lora_gain_*). Contract: `lora.cuh`.

#include "lora.cuh"

// Eight neighbouring columns of a row of y, of which `count` exist. `vector`: all eight do, at a 16-byte address.
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

// Splits two neighbouring values of h into bf16 values and the bf16 remainders of that rounding. Two tensor core products then keep about
// 16 bits of h.
__device__ __forceinline__ void split_bf16(float v0, float v1, uint32_t& high, uint32_t& low) {
    const bf162 h = __floats2bfloat162_rn(v0, v1);
    const float2 f = __bfloat1622float2(h);
    const bf162 l = __floats2bfloat162_rn(v0 - f.x, v1 - f.y);
    high = *reinterpret_cast<const uint32_t*>(&h);
    low = *reinterpret_cast<const uint32_t*>(&l);
}

// A step of a warp: 16 ranks of one term, by 64 columns of one module, for the rows of a chunk.
struct alignas(16) Step {
    const float* h;     // h of the chunk's first row, from the step's first rank on
    const float* bias;  // the columns' bias; null if there is none, and for all but a term's first step
    float scale;        // factor of the bias
    int stride;         // values between rows of h
    int ranks;          // remaining ranks, 16 of which the step takes
    uint32_t item;      // NONE after the last step
    int row, rows;      // rows of the chunk
    int column, count;  // first column in y, and the number of columns from it to the module's end
};

constexpr uint32_t NONE = ~0u;
constexpr int STEP_BYTES = 2048;  // weights of a step

// The producer of a warp's pipeline: walks its steps in order, and loads their weights to shared memory as bf16 [8][8][16], column 8g + j
// at [j][g ^ j], so that neither stores nor loads have bank conflicts. It reads only the worklist, the table and weights, and so need not
// wait for the previous kernel.
struct Steps {
    const uint32_t* const work;
    const SlotEntry* const table;
    const List list;
    const int entries, entry, k, warp;
    const int n[3], tiles[3], groups;
    uint32_t item, to;         // the current item, and the end of this thread block's
    uint32_t seen = NONE;      // number of the chunk that is loaded
    Chunk chunk;
    uint32_t term = 0;         // number, in the chunk, of the next term
    const bf16* b;             // B of the current term and module, from the tile's first column on
    Step step = {};
    int first = 0, ranks = 0;  // the step's first rank, and the ranks of the module

    __device__ __forceinline__ Steps(const uint32_t* work, const SlotEntry* table, const List& list, int entries, int entry, int k, int n0,
                                     int n1, int n2)
        : work(work), table(table), list(list), entries(entries), entry(entry), k(k), warp(threadIdx.x / 32), n{n0, n1, n2},
          tiles{(n0 + 63) / 64, (n1 + 63) / 64, (n2 + 63) / 64}, groups((tiles[0] + tiles[1] + tiles[2] + WARPS - 1) / WARPS) {
        own_items(list.chunks * groups, item, to);
        item--;
        chunk.terms = 0;
    }

    // Makes `step` the next step. Its item is NONE after the last one.
    __device__ __forceinline__ void next() {
        for (first += 16, step.h += 16, step.ranks -= 16, step.bias = nullptr; first >= ranks;) {
            // The next item, and its chunk. An item is a chunk and a group of 4 column tiles, one for each warp.
            if (term >= chunk.terms) {
                if (++item >= to) {
                    step.item = NONE, item = to - 1, ranks = 0, chunk.terms = 0;
                    return;
                }
                if (item / groups != seen) {
                    seen = item / groups;
                    chunk = load_record<Chunk>(work + list.chunk_at + seen * (sizeof(Chunk) / 4));
                }
                term = 0;
            }
            // The warp's tile of 64 columns, and its module.
            int tile = item % groups * WARPS + warp, module = 0;
            if (tile >= tiles[0]) tile -= tiles[0], module = 1;
            if (module == 1 && tile >= tiles[1]) tile -= tiles[1], module = 2;
            if (module == 2 && tile >= tiles[2]) {
                term = chunk.terms;
                continue;
            }
            // The next term, and where its weights are.
            const Term t = load_record<Term>(work + list.term_at + (chunk.term + term++) * (sizeof(Term) / 4));
            const SlotEntry weights = load_record<SlotEntry>(table + size_t(t.slot) * entries + entry);
            const int r0 = weights.ranks[0], r1 = weights.ranks[1], r2 = weights.ranks[2], column = 64 * tile;
            const int before = module == 0 ? 0 : module == 1 ? r0 : r0 + r1;
            first = 0, ranks = module == 0 ? r0 : module == 1 ? r1 : r2;
            b = reinterpret_cast<const bf16*>(weights.base) + size_t(r0 + r1 + r2) * k;
            // Biases, f32, each padded to 16 bytes, follow all B.
            step.bias = nullptr;
            if (weights.biases >> module & 1) {
                const bf16* p = b + size_t(n[0]) * r0 + size_t(n[1]) * r1 + size_t(n[2]) * r2;
                if (module > 0 && weights.biases & 1) p += (n[0] + 3) / 4 * 8;
                if (module > 1 && weights.biases & 2) p += (n[1] + 3) / 4 * 8;
                step.bias = reinterpret_cast<const float*>(p) + column;
            }
            if (module > 0) b += size_t(n[0]) * r0;
            if (module > 1) b += size_t(n[1]) * r1;
            b += size_t(column) * ranks;
            step.h = h_values(work) + t.h_offset + size_t(chunk.row - t.row) * t.h_stride + before;
            step.scale = t.weight * (module == 0 ? weights.scales[0] : module == 1 ? weights.scales[1] : weights.scales[2]);
            step.stride = t.h_stride, step.ranks = ranks, step.item = item, step.row = chunk.row, step.rows = chunk.rows;
            step.column = column + (module > 0 ? n[0] : 0) + (module > 1 ? n[1] : 0);
            step.count = (module == 0 ? n[0] : module == 1 ? n[1] : n[2]) - column;
        }
    }

    // Starts loading the next step's weights into a free stage, and writes its description there.
    __device__ __forceinline__ void start(unsigned char* weights, Step* description) {
        next();
        const int lane = threadIdx.x % 32;
        if (step.item != NONE) {
#pragma unroll
            for (int i = 0; i < STEP_BYTES / 512; i++) {
                const int piece = lane + 32 * i, column = piece / 2, half = piece % 2, j = column % 8;
                const bool live = column < step.count && 8 * half < step.ranks;
                cp_async16(shared_address(weights + j * 256 + (column / 8 ^ j) * 32 + half * 16),
                           live ? b + column * ranks + first + 8 * half : b, live);
            }
        }
        cp_commit();
        if (lane == 0) *description = step;
    }
};

// Adds the bias of a lane's columns to all rows. `count`: columns from the lane's first on.
template <int NT>
__device__ __forceinline__ void add_bias(float (&c)[NT][4][4], const Step& step, int count, int g) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float v = j < count ? __fmul_rn(step.scale, step.bias[8 * g + j]) : 0.f;
#pragma unroll
        for (int m = 0; m < NT; m++) c[m][j / 2][j % 2 * 2] += v, c[m][j / 2][j % 2 * 2 + 1] += v;
    }
}

// y += h·Bᵀ for chunks of 8·NT rows. A warp takes a chunk and 64 columns of one module, and needs no other warp. Columns are the 16 rows
// of a tensor core tile. Ranks are permuted like k in `lora_shrink.cu`: lane l holds ranks 4(l%4)..+4 of every 16. Columns are permuted so
// that a lane's outputs of the four tiles are eight neighbours: row m of tile j is column 8(m%8) + 2j + m/8.
//
// NT: rows of a chunk in units of 8, 1 (small) or 4 (large). Y: type of y.
template <int NT, typename Y>
__device__ __forceinline__ void expand(const uint32_t* work, const SlotEntry* table, Y* y, int entries, int entry, int k,
                                       int splits, int n0, int n1, int n2) {
    __shared__ __align__(256) unsigned char weights[WARPS][STAGES][STEP_BYTES];
    __shared__ Step descriptions[WARPS][STAGES];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int n = n0 + n1 + n2;
    pdl_release();
    // Start loading weights, which were there before the step; then wait for shrink.
    const List list = load_list(work, NT > 1);
    const int planes = list.split_planes ? splits : 1;
    Steps steps(work, table, list, entries, entry, k, n0, n1, n2);
    for (int i = 0; i < STAGES - 1; i++) steps.start(weights[warp][i], &descriptions[warp][i]);
    pdl_wait();

    uint32_t item = NONE;
    int rows = 0, count = 0;  // the item's rows, and its columns from this lane's first on
    bool vector = false;
    Y* out = nullptr;
    Columns<Y> old[NT][2];
    float c[NT][4][4];
    const float* loaded = nullptr;  // the h that `high` and `low` hold
    uint32_t high[NT][2], low[NT][2];
    auto load_old = [&] {
#pragma unroll
        for (int i = 0; i < NT; i++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                if (8 * i + 2 * t + e < rows && count > 0) old[i][e].load(out + size_t(8 * i + e) * n, count, vector);
    };
    for (int stage = 0;; stage = (stage + 1) % STAGES) {
        // Wait for the step's weights.
        cp_wait<STAGES - 2>();
        __syncwarp();
        const Step step = descriptions[warp][stage];
        if (step.item == NONE) break;
        // Begin an item.
        if (step.item != item) {
            item = step.item, rows = step.rows, count = step.count - 8 * g;
            vector = count >= 8 && n % 8 == 0 && step.column % 8 == 0;
            out = y + size_t(step.row + 2 * t) * n + step.column + 8 * g;
            if (NT == 1) load_old();
#pragma unroll
            for (int m = 0; m < NT; m++)
#pragma unroll
                for (int j = 0; j < 4; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++) c[m][j][e] = 0.f;
        }
        // Compute: the bias, then h unless the step before had the same, then the product.
        if (step.bias) add_bias<NT>(c, step, count, g);
        if (step.h != loaded) {
            loaded = step.h;
            // Add up the planes of h in order, and split the sum into bf16 fragments.
            float4 v[NT] = {};
            const float* p = step.h + size_t(g) * step.stride + 4 * t;
#pragma unroll(NT > 1 ? 1 : 4)
            for (int plane = 0; plane < planes; plane++, p += list.plane)
#pragma unroll
                for (int m = 0; m < NT; m++) {
                    if (4 * t >= step.ranks || 8 * m + g >= rows) continue;
                    const float4 u = *reinterpret_cast<const float4*>(p + size_t(8 * m) * step.stride);
                    v[m].x += u.x, v[m].y += u.y, v[m].z += u.z, v[m].w += u.w;
                }
#pragma unroll
            for (int m = 0; m < NT; m++) {
                split_bf16(v[m].x, v[m].y, high[m][0], low[m][0]);
                split_bf16(v[m].z, v[m].w, high[m][1], low[m][1]);
            }
        }
        // c += h·Bᵀ.
        uint2 w[8];
#pragma unroll
        for (int j = 0; j < 8; j++) w[j] = *reinterpret_cast<const uint2*>(&weights[warp][stage][j * 256 + (g ^ j) * 32 + t * 8]);
#pragma unroll
        for (int m = 0; m < NT; m++) {
            if (8 * m >= rows) break;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                mma_m16n8k16(c[m][j], w[2 * j].x, w[2 * j + 1].x, w[2 * j].y, w[2 * j + 1].y, high[m][0], high[m][1]);
                mma_m16n8k16(c[m][j], w[2 * j].x, w[2 * j + 1].x, w[2 * j].y, w[2 * j + 1].y, low[m][0], low[m][1]);
            }
        }
        // End an item: add to y and store. With many rows there are no registers to load the old y earlier.
        if (descriptions[warp][(stage + 1) % STAGES].item != item) {
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
        // Load the next step into the previous stage, which the warp no longer reads.
        const int last = (stage + STAGES - 1) % STAGES;
        steps.start(weights[warp][last], &descriptions[warp][last]);
    }
}

// blocks: thread blocks of an SM.
#define EXPAND(name, NT, Y, blocks)                                                                                     \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, blocks)                                                          \
        name(const uint32_t* work, const SlotEntry* table, Y* y, int entries, int entry, int k, int splits, int n0, int n1, \
             int n2) {                                                                                                  \
        expand<NT, Y>(work, table, y, entries, entry, k, splits, n0, n1, n2);                                           \
    }

EXPAND(lora_expand_small, EXPAND_SMALL_ROWS / 8, bf16, 5)
EXPAND(lora_expand_large, EXPAND_LARGE_ROWS / 8, bf16, 3)
EXPAND(lora_expand_small_f32, EXPAND_SMALL_ROWS / 8, float, 4)
EXPAND(lora_expand_large_f32, EXPAND_LARGE_ROWS / 8, float, 2)

__device__ __forceinline__ float to_float(bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ void store(bf16* p, float v) { *p = __float2bfloat16_rn(v); }
__device__ __forceinline__ void store(float* p, float v) { *p = v; }

// y *= gains, after expand. A DoRA adapter is exclusive: its rows have no other term. An item is a chunk of either list and 512 columns.
// Y: type of y.
template <typename Y>
__device__ __forceinline__ void gain(const uint32_t* work, const SlotEntry* table, Y* y, int entries, int entry, int n) {
    constexpr int COLUMNS = GAIN_COLUMNS, ROWS = 8;
    pdl_release();
    pdl_wait();
    const uint32_t small = load_list(work, 0).chunks, large = load_list(work, 1).chunks;
    const uint32_t groups = (n + COLUMNS - 1) / COLUMNS;
    uint32_t from, to;
    own_items((small + large) * groups, from, to);
    for (uint32_t item = from; item < to; item++) {
        // Find the chunk, its adapter and the gains.
        const uint32_t i = item / groups;
        const List list = load_list(work, i >= small);
        const Chunk chunk = load_record<Chunk>(work + list.chunk_at + (i < small ? i : i - small) * (sizeof(Chunk) / 4));
        const Term term = load_record<Term>(work + list.term_at + chunk.term * (sizeof(Term) / 4));
        const SlotEntry weights = load_record<SlotEntry>(table + size_t(term.slot) * entries + entry);
        if (!weights.gains) continue;
        const float* const gains = reinterpret_cast<const float*>(weights.base + uint64_t(16) * weights.gains);
        const int first = item % groups * COLUMNS, last = min(first + COLUMNS, n);
        for (int column = first + threadIdx.x; column < last; column += blockDim.x) {
            const float factor = gains[column];
            Y* const out = y + size_t(chunk.row) * n + column;
            for (int row = 0; row < chunk.rows; row += ROWS) {
                // All loads of 8 rows come before their stores: the compiler cannot reorder them, since they may alias.
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
    extern "C" __global__ void __launch_bounds__(32 * WARPS)                                                   \
        name(const uint32_t* work, const SlotEntry* table, Y* y, int entries, int entry, int n) {                  \
        gain<Y>(work, table, y, entries, entry, n);                                                            \
    }

GAIN(lora_gain, bf16)
GAIN(lora_gain_f32, float)
