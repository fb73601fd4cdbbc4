// Attention over the paged cache (src/ops/attention/cuda.rs launches it).
//
// qkv: bf16 [T][heads + 2 kv_heads][dim], a row's query heads, then keys, then values. out: bf16 [T][heads][dim].
// cache: bf16 [blocks][2][kv_heads][16 tokens][dim], keys before values. Query head h belongs to key-value head h / group.
// tables: u32 block ids of all sequences. Everything is 16-byte aligned; scale is log2(e) / sqrt(dim), times a factor if ever.
//
//   attn_decode_64 / _128 / _any (qkv, cache, work, items, room, tables, T, kv_heads, group, scale, partial, out [, dim])
//     work: {number of items, end, 0, 0}; rows end..T become zero. items: for each part of the keys of a row that is a sequence's only
//     one, {row, start in tables, context length, part | keys of a part << 8}, the parts of a row (at most 32) one after another;
//     there is room for `room`. Any grid of 128 threads.
//     partial: f32 [room][heads][dim], then [room][heads][maximum, sum]: of rows with several parts, whose place in `out` is left to
//   attn_merge_64 / _128 (rows, count, room, heads, partial, out)
//     rows [count]: {first item, row, parts, 0}, other rows having less than 2 parts. Grid: a warp for each of them and query head.
//   attn_prefill_64 / _128 / _any (qkv, cache, work, tables, kv_heads, group, scale, out [, dim])
//     work: {spans, 0, 0, 0}, then for each {first row, rows, position of the first row, start in tables}.
//     Grid: a block of 128 threads, or warp for _any, for each kv_head (head) and tile of 128 / group positions (position);
//     64 and 128 take 768 dim bytes of dynamic shared memory.
//
// A row's softmax runs over parts and tiles of keys at places fixed by its own context length (decode) or absolute (prefill),
// in a fixed order, so its bits depend on nothing but its own sequence, and in prefill not on how its prompt was cut.
//
// What a step brings (work, tables) is there before the step's first kernel starts, and a decoded row's blocks before its last
// are of earlier steps: kernels read these before they wait for the kernel before them. No pointer is __restrict__, since loads
// through the read-only path may be moved up across that wait.
#include "attention.cuh"

constexpr int PAGE = 16;  // tokens of a cache block

// Transpose of an 8x8 matrix of 16-bit values; lane l holds columns 2(l%4)..+1 of row l/4.
__device__ __forceinline__ uint32_t transpose(uint32_t a) {
    uint32_t d;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
    return d;
}

// ---------------------------------------------------------------- decode

// Where 16-byte chunk `chunk` of row `row` lies in a shared matrix of rows of DIM values: eight rows' chunks of the same number
// are in different banks. If the matrix starts at a multiple of 256, chunks 2k and 2k + 1 are at those of 0 and 1 ^ 32k.
template <int DIM> __device__ __forceinline__ uint32_t place(int row, int chunk) {
    return (row * (DIM / 8) + (chunk ^ (row & 7))) * 16;
}

struct DecodeItem {
    int row, start, context, part, keys, parts;

    __device__ explicit DecodeItem(uint4 words)
        : row(words.x), start(words.y), context(words.z), part(words.w & 255), keys(words.w >> 8),
          parts((context + keys - 1) / keys) {}
};

constexpr int HEADS = 8;  // query heads of a unit: columns of a product
constexpr int PARTS = 32;

// Starts the copy of a block's 16 keys or values; from `live` on they are zero, whatever others have left there.
template <int DIM> __device__ __forceinline__ void load_page(uint32_t to, const bf16 *from, int live, int lane) {
    constexpr int CHUNKS = DIM / 8;
#pragma unroll
    for (int i = 0; i < PAGE * CHUNKS / 32; i++) {
        const int chunk = lane + 32 * i, token = chunk / CHUNKS;
        cp_async16(to + place<DIM>(token, chunk % CHUNKS), from + 8 * chunk, token < live);
    }
}

// A unit of work is an item and up to 8 query heads of a key-value head; a warp takes every fourth block of its keys. Products
// have keys (QK) and dimensions (PV) as rows and query heads as columns, so that keys and values are read once for all of these.
template <int DIM>
__device__ __forceinline__ void decode(const bf16 *qkv, const bf16 *cache, const uint4 *work, const uint4 *work_items, int room,
                                       const uint32_t *tables, int rows, int kv_heads, int group, float scale, float *partial,
                                       bf16 *out) {
    constexpr int CHUNKS = DIM / 8, PAGE_BYTES = PAGE * DIM * 2, STRIDE = DIM + 4;
    static_assert(HEADS * STRIDE * 4 <= 2 * PAGE_BYTES, "a warp's sums take the place of its block");
    __shared__ __align__(256) uint8_t blocks[WARPS][2 * PAGE_BYTES];
    __shared__ float maxima[WARPS][HEADS], sums[WARPS][HEADS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int sets = (group + HEADS - 1) / HEADS, units = kv_heads * sets, heads = kv_heads * group;
    const uint32_t keys_at = shared_address(blocks[warp]), values_at = keys_at + PAGE_BYTES;
    // The lane's rows of 8x8 matrices: as first operands of QK and, transposed, PV.
    const uint32_t key_at = keys_at + place<DIM>(lane % 16, lane / 16);
    const uint32_t value_at = values_at + place<DIM>(lane % 8 + lane / 16 * 8, lane / 8 % 2);

    pdl_release();
    const uint4 header = load_words(work);
    uint4 words = load_words(work_items + min((int)blockIdx.x / units, room - 1)), next;
    const int items = header.x, total = (items + rows - (int)header.y) * units;
    for (int unit = blockIdx.x; unit < total; unit += gridDim.x, words = next) {
        next = load_words(work_items + min((unit + (int)gridDim.x) / units, room - 1));
        const int i = unit / units, kv_head = unit % units / sets, first = unit % sets * HEADS;
        const int columns = min(HEADS, group - first), head = kv_head * group + first;
        if (i >= items) {
            pdl_wait();
            uint4 *to = (uint4 *)(out + ((size_t)(header.y + i - items) * heads + head) * DIM);
#pragma unroll 1
            for (int c = threadIdx.x; c < columns * CHUNKS; c += THREADS) to[c] = make_uint4(0, 0, 0, 0);
            continue;
        }
        const DecodeItem item(words);
        const int keys = min(item.context - item.part * item.keys, item.keys);
        const uint32_t *table = tables + item.start + item.part * item.keys / PAGE + warp;
        const int pages = ((keys + PAGE - 1) / PAGE - warp + WARPS - 1) / WARPS;
        uint32_t ids = 0;
        auto page = [&](int p) {
            if (p % 32 == 0) ids = p + lane < pages ? load_word(table + WARPS * (p + lane)) : 0;
            const size_t block = __shfl_sync(~0u, ids, p % 32);
            return cache + (block * 2 * kv_heads + kv_head) * PAGE * DIM;
        };
        auto live = [&](int p) { return keys - PAGE * (warp + WARPS * p); };
        const size_t to_values = (size_t)kv_heads * PAGE * DIM;

        // The first block: before the wait unless it is the row's last, which has a key of this step.
        const bf16 *from = nullptr;
        const bool newest = item.part * item.keys + (warp + 1) * PAGE >= item.context;
#pragma unroll 1
        for (int waited = 0; waited < 2; waited++) {
            if (waited) pdl_wait();
            if (pages <= 0 || newest != waited) continue;
            from = page(0);
            load_page<DIM>(keys_at, from, live(0), lane);
            cp_commit();
            load_page<DIM>(values_at, from + to_values, live(0), lane);
            cp_commit();
        }
        uint32_t q[DIM / 16][2];
        const bf16 *query = qkv + ((size_t)item.row * (heads + 2 * kv_heads) + head + lane / 4) * DIM + 2 * (lane % 4);
#pragma unroll
        for (int k = 0; k < DIM / 16; k++) {
            q[k][0] = lane / 4 < columns ? *(const uint32_t *)(query + 16 * k) : 0;
            q[k][1] = lane / 4 < columns ? *(const uint32_t *)(query + 16 * k + 8) : 0;
        }

        float o[DIM / 16][4] = {}, m[2] = {NONE, NONE}, l[2] = {0.f, 0.f};
        for (int p = 0; p < pages; p++) {
            const bool more = p + 1 < pages;
            cp_wait<1>();
            __syncwarp();
            float s[2][4] = {};  // even and odd steps apart: half as long a chain
#pragma unroll
            for (int k = 0; k < DIM / 16; k++) {
                uint32_t a[4];
                ldmatrix(a, key_at ^ 32 * k);
                mma_m16n8k16(s[k % 2], a[0], a[1], a[2], a[3], q[k][0], q[k][1]);
            }
            __syncwarp();
            if (more) {
                from = page(p + 1);
                load_page<DIM>(keys_at, from, live(p + 1), lane);
            }
            cp_commit();

            float decay[2];
#pragma unroll
            for (int c = 0; c < 2; c++) {
                float s0 = (s[0][c] + s[1][c]) * scale, s1 = (s[0][c + 2] + s[1][c + 2]) * scale;
                if (lane / 4 >= live(p)) s0 = NONE;
                if (lane / 4 + 8 >= live(p)) s1 = NONE;
                float max = fmaxf(m[c], fmaxf(s0, s1));
#pragma unroll
                for (int x = 4; x < 32; x *= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, x));
                decay[c] = ex2(m[c] - max);
                m[c] = max;
                s[0][c] = ex2(s0 - max), s[0][c + 2] = ex2(s1 - max);
                l[c] = l[c] * decay[c] + (s[0][c] + s[0][c + 2]);
            }
            const uint32_t b0 = transpose(pack(s[0][0], s[0][1])), b1 = transpose(pack(s[0][2], s[0][3]));
            cp_wait<1>();
            __syncwarp();
#pragma unroll
            for (int d = 0; d < DIM / 16; d++) {
                uint32_t a[4];
                ldmatrix_trans(a, value_at ^ 32 * d);
#pragma unroll
                for (int c = 0; c < 4; c++) o[d][c] *= decay[c % 2];
                mma_m16n8k16(o[d], a[0], a[1], a[2], a[3], b0, b1);
            }
            __syncwarp();
            if (more) load_page<DIM>(values_at, from + to_values, live(p + 1), lane);
            cp_commit();
        }

        // The warps' sums, one after another.
        float2 *stats = (float2 *)(partial + (size_t)room * heads * DIM);
#pragma unroll
        for (int c = 0; c < 2; c++) {
#pragma unroll
            for (int x = 4; x < 32; x *= 2) l[c] += __shfl_xor_sync(~0u, l[c], x);
            if (lane < 4) maxima[warp][2 * lane + c] = m[c], sums[warp][2 * lane + c] = l[c];
        }
        __syncthreads();
        auto maximum = [&](int g) { return fmaxf(fmaxf(maxima[0][g], maxima[1][g]), fmaxf(maxima[2][g], maxima[3][g])); };
        float *mine = (float *)blocks[warp];
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const int g = 2 * (lane % 4) + c % 2;
            const float share = ex2(m[c % 2] - maximum(g));
#pragma unroll
            for (int d = 0; d < DIM / 16; d++) mine[g * STRIDE + 16 * d + lane / 4 + c / 2 * 8] = o[d][c] * share;
        }
        __syncthreads();
#pragma unroll 1
        for (int c = threadIdx.x; c < columns * DIM / 4; c += THREADS) {
            const int g = c / (DIM / 4), d = c % (DIM / 4) * 4;
            const float max = maximum(g);
            float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                const float4 part = *(const float4 *)((const float *)blocks[w] + g * STRIDE + d);
                v.x += part.x, v.y += part.y, v.z += part.z, v.w += part.w;
                sum += sums[w][g] * ex2(maxima[w][g] - max);
            }
            if (item.parts == 1) {
                uint2 *to = (uint2 *)(out + ((size_t)item.row * heads + head + g) * DIM + d);
                const float inverse = __fdividef(1.f, sum);
                *to = make_uint2(pack(v.x * inverse, v.y * inverse), pack(v.z * inverse, v.w * inverse));
            } else {
                const size_t at = (size_t)i * heads + head + g;
                *(float4 *)(partial + at * DIM + d) = v;
                if (d == 0) stats[at] = make_float2(max, sum);
            }
        }
        __syncthreads();  // before the next unit's keys come
    }
}

// A warp adds up the parts of one row and query head, in their order.
template <int DIM>
__device__ __forceinline__ void merge(const uint4 *rows, int count, int room, int heads, const float *partial, bf16 *out) {
    constexpr int VALUES = DIM / 32, AT_ONCE = 8;  // a lane's values; parts whose loads are not waited for one by one
    __shared__ float weights[WARPS][PARTS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int unit = blockIdx.x * WARPS + warp, head = unit % heads;
    pdl_release();
    const uint4 entry = unit < count * heads ? load_words(rows + unit / heads) : make_uint4(0, 0, 0, 0);
    const int parts = entry.z;
    pdl_wait();
    if (parts < 2) return;
    const size_t first = (size_t)entry.x * heads + head;
    const float *from = partial + first * DIM + VALUES * lane;
    const float2 *stats = (const float2 *)(partial + (size_t)room * heads * DIM) + first + lane * heads;
    const float2 part = lane < parts ? __ldcg(stats) : make_float2(NONE, 0.f);
    float x[AT_ONCE][VALUES], v[VALUES] = {};
    for (int p0 = 0; p0 < parts; p0 += AT_ONCE) {
#pragma unroll
        for (int p = 0; p < AT_ONCE; p++)
#pragma unroll
            for (int e = 0; e < VALUES; e += 2) {
                float2 two = make_float2(0.f, 0.f);
                if (p0 + p < parts) two = __ldcg((const float2 *)(from + (size_t)(p0 + p) * heads * DIM + e));
                x[p][e] = two.x, x[p][e + 1] = two.y;
            }
        if (p0 == 0) {
            const float share = ex2(part.x - warp_max(part.x));
            weights[warp][lane] = __fdividef(share, warp_sum(share * part.y));
            __syncwarp();
        }
#pragma unroll
        for (int p = 0; p < AT_ONCE; p++)
#pragma unroll
            for (int e = 0; e < VALUES; e++)
                if (p0 + p < parts) v[e] += weights[warp][p0 + p] * x[p][e];
    }
    uint32_t *to = (uint32_t *)(out + ((size_t)entry.y * heads + head) * DIM + VALUES * lane);
#pragma unroll
    for (int e = 0; e < VALUES; e += 2) to[e / 2] = pack(v[e], v[e + 1]);
}

#define DECODE(DIM)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, 5)                                                               \
        attn_decode_##DIM(const bf16 *qkv, const bf16 *cache, const uint4 *work, const uint4 *items, int room,             \
                          const uint32_t *tables, int rows, int kv_heads, int group, float scale, float *partial, bf16 *out) { \
        decode<DIM>(qkv, cache, work, items, room, tables, rows, kv_heads, group, scale, partial, out);                    \
    }                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                  \
        attn_merge_##DIM(const uint4 *rows, int count, int room, int heads, const float *partial, bf16 *out) {             \
        merge<DIM>(rows, count, room, heads, partial, out);                                                                \
    }
DECODE(64)
DECODE(128)

// ---------------------------------------------------------------- prefill

// The span and the place in it of tile number `tile`, spans being cut into tiles of `positions`; later tiles of a span, which
// have more keys, come first. Called by whole warps. False: there is none.
__device__ __forceinline__ bool find_tile(const uint4 *work, int positions, int &tile, uint4 &span) {
    const int lane = threadIdx.x % 32, spans = load_words(work).x;
    for (int start = 0; start < spans; start += 32) {
        const uint4 mine = start + lane < spans ? load_words(work + 1 + start + lane) : make_uint4(0, 0, 0, 0);
        const int tiles = ((int)mine.y + positions - 1) / positions;
        int end = tiles;
#pragma unroll
        for (int o = 1; o < 32; o *= 2) {
            const int before = __shfl_up_sync(~0u, end, o);
            if (lane >= o) end += before;
        }
        const uint32_t after = __ballot_sync(~0u, tile < end);
        if (after) {
            const int from = __ffs(after) - 1;
            tile = __shfl_sync(~0u, end, from) - 1 - tile;
            span.x = __shfl_sync(~0u, mine.x, from), span.y = __shfl_sync(~0u, mine.y, from);
            span.z = __shfl_sync(~0u, mine.z, from), span.w = __shfl_sync(~0u, mine.w, from);
            return true;
        }
        tile -= __shfl_sync(~0u, end, 31);
    }
    return false;
}

// A tile's keys and values from the cache.
template <int DIM> struct CachedKeys {
    const bf16 *cache;
    const uint32_t *table;  // of the sequence
    int kv_heads, kv_head;

    __device__ __forceinline__ void load(uint32_t to, int t, int keys) const {
        constexpr int CHUNKS = DIM / 8;
        uint32_t ids[TILE_KEYS / PAGE];
#pragma unroll
        for (int b = 0; b < TILE_KEYS / PAGE; b++) ids[b] = table[min(t * (TILE_KEYS / PAGE) + b, (keys - 1) / PAGE)];
#pragma unroll
        for (int i = 0; i < TILE_KEYS * CHUNKS / THREADS; i++) {
            const int chunk = threadIdx.x + THREADS * i, key = chunk / CHUNKS;
            const uint32_t at = to + place_panel<TILE_KEYS>(key, chunk % CHUNKS);
            const size_t block = ids[i * THREADS / (PAGE * CHUNKS)];
            const bf16 *from = cache + (block * 2 * kv_heads + kv_head) * PAGE * DIM + 8 * (chunk % (PAGE * CHUNKS));
            const bool live = t * TILE_KEYS + key < keys;
            cp_async16(at, from, live);
            cp_async16(at + panels_bytes<DIM, TILE_KEYS>, from + (size_t)kv_heads * PAGE * DIM, live);
        }
    }
};

template <int DIM>
__device__ __forceinline__ void prefill(const bf16 *qkv, const bf16 *cache, const uint4 *work, const uint32_t *tables,
                                        int kv_heads, int group, float scale, bf16 *out) {
    const int positions = TILE_ROWS / group, kv_head = blockIdx.x % kv_heads;
    int tile = blockIdx.x / kv_heads;
    uint4 span;
    if (!find_tile(work, positions, tile, span)) return;
    pdl_wait();
    pdl_release();
    const int first = tile * positions;
    const CachedKeys<DIM> keys = {cache, tables + span.w, kv_heads, kv_head};
    attend_tile<DIM>(qkv, span.x + first, span.z + first, min(positions, (int)span.y - first) * group, keys, kv_heads, kv_head, group,
                     scale, out, nullptr);
}

#define PREFILL(DIM)                                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                               \
        attn_prefill_##DIM(const bf16 *qkv, const bf16 *cache, const uint4 *work, const uint32_t *tables, int kv_heads,    \
                           int group, float scale, bf16 *out) {                                                            \
        prefill<DIM>(qkv, cache, work, tables, kv_heads, group, scale, out);                                               \
    }
PREFILL(64)
PREFILL(128)

// ---------------------------------------------------------------- any width

constexpr int MOST_DIM = 256;

// One query head of one row over its `keys` keys, by a warp: scores a key a lane, sums a dimension a lane.
__device__ __forceinline__ void attend(const bf16 *query, const bf16 *cache, const uint32_t *table, int keys, int kv_heads,
                                       int kv_head, int dim, float scale, bf16 *out) {
    __shared__ float queries[WARPS][MOST_DIM];
    const int lane = threadIdx.x % 32;
    float *q = queries[threadIdx.x / 32], o[MOST_DIM / 32] = {}, m = NONE, l = 0.f;
    __syncwarp();
    for (int d = lane; d < dim; d += 32) q[d] = __bfloat162float(query[d]) * scale;
    __syncwarp();
    auto page = [&](int key) { return cache + ((size_t)table[key / PAGE] * 2 * kv_heads + kv_head) * PAGE * dim + key % PAGE * dim; };
    for (int first = 0; first < keys; first += 32) {
        const int live = min(32, keys - first);
        float s = NONE;
        if (lane < live) {
            const bf162 *k = (const bf162 *)page(first + lane);
            s = 0.f;
            for (int d = 0; d < dim / 2; d++) {
                const float2 x = __bfloat1622float2(k[d]);
                s += q[2 * d] * x.x + q[2 * d + 1] * x.y;
            }
        }
        const float max = fmaxf(m, warp_max(s)), decay = ex2(m - max), p = ex2(s - max);
        m = max;
        l = l * decay + p;
#pragma unroll
        for (int i = 0; i < MOST_DIM / 32; i++) o[i] *= decay;
        for (int key = 0; key < live; key++) {
            const bf16 *v = page(first + key) + (size_t)kv_heads * PAGE * dim;
            const float weight = __shfl_sync(~0u, p, key);
#pragma unroll
            for (int i = 0; i < MOST_DIM / 32; i++) {
                if (lane + 32 * i < dim) o[i] += weight * __bfloat162float(v[lane + 32 * i]);
            }
        }
    }
    const float inverse = __fdividef(1.f, warp_sum(l));
#pragma unroll
    for (int i = 0; i < MOST_DIM / 32; i++) {
        if (lane + 32 * i < dim) out[lane + 32 * i] = __float2bfloat16_rn(o[i] * inverse);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    attn_decode_any(const bf16 *qkv, const bf16 *cache, const uint4 *work, const uint4 *items, int room, const uint32_t *tables,
                    int rows, int kv_heads, int group, float scale, float *partial, bf16 *out, int dim) {
    pdl_wait();
    pdl_release();
    const uint4 header = work[0];
    const int heads = kv_heads * group, total = ((int)header.x + rows - (int)header.y) * heads;
    for (int unit = blockIdx.x * WARPS + threadIdx.x / 32; unit < total; unit += gridDim.x * WARPS) {
        const int i = unit / heads, head = unit % heads;
        if (i >= header.x) {
            bf16 *to = out + ((size_t)(header.y + i - header.x) * heads + head) * dim;
            for (int d = threadIdx.x % 32; d < dim; d += 32) to[d] = __float2bfloat16_rn(0.f);
            continue;
        }
        const DecodeItem item(items[i]);
        if (item.part > 0) continue;
        attend(qkv + ((size_t)item.row * (heads + 2 * kv_heads) + head) * dim, cache, tables + item.start, item.context, kv_heads,
               head / group, dim, scale, out + ((size_t)item.row * heads + head) * dim);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    attn_prefill_any(const bf16 *qkv, const bf16 *cache, const uint4 *work, const uint32_t *tables, int kv_heads, int group,
                     float scale, bf16 *out, int dim) {
    pdl_wait();
    pdl_release();
    const int heads = kv_heads * group, unit = blockIdx.x * WARPS + threadIdx.x / 32, head = unit % heads;
    int tile = unit / heads;
    uint4 span;
    if (!find_tile(work, 1, tile, span)) return;
    const size_t row = span.x + tile;
    attend(qkv + (row * (heads + 2 * kv_heads) + head) * dim, cache, tables + span.w, span.z + tile + 1, kv_heads, head / group,
           dim, scale, out + (row * heads + head) * dim);
}
