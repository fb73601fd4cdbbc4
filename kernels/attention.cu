// Attention over the paged KV cache, for decode and prefill (launched from src/ops/attention/cuda.rs).
//
// Arguments. All pointers are 16-byte aligned.
//   qkv: bf16 [T][heads + 2 kv_heads][dim], each row's query heads, then its keys, then its values; rotated by RoPE.
//   out: bf16 [T][heads][dim].
//   cache: bf16 [blocks][2][kv_heads][16 tokens][dim], the KV blocks of one layer, keys before values.
//   tables: u32 KV block ids, the block tables of all sequences one after another.
//   group: query heads of a KV head. Query head h uses KV head h / group.
//   scale: log2(e) / sqrt(dim), since exponentials are taken with base 2.
//
// Kernels.
//   attn_decode_64 / _128 / _any (qkv, cache, work, items, room, tables, T, kv_heads, group, scale, partial, out [, dim])
//     Decode rows. The keys of a row are cut into KV splits, each of which one thread block attends to.
//     work: {items, end, 0, 0}: the number of items, and the first padding row. Rows end..T of out become zero.
//     items [room]: one item per KV split of each decode row, {row, start of its block table in tables, context length,
//       split | keys of a split << 8}. A row's splits (at most 32) follow one another. `room` is the capacity of the list.
//     partial: f32 [room][heads][dim], then [room][heads][maximum, sum]. Rows with several splits leave each split's unnormalised
//       output and softmax statistics there, for attn_merge; rows with one split go straight to out.
//     Grid: any number of thread blocks of 128 threads; thread blocks loop over the items.
//     _any takes a whole row at its first split, and needs no attn_merge.
//   attn_merge_64 / _128 (rows, count, room, heads, partial, out)
//     Merges the KV splits of each decode row.
//     rows [count]: {first item, row, splits, 0}; entries with fewer than 2 splits are skipped.
//     Grid: one warp for each (entry, query head), 128 threads.
//   attn_prefill_64 / _128 / _any (qkv, cache, work, tables, kv_heads, group, scale, out [, dim])
//     Spans of several rows, causal.
//     work: {spans, 0, 0, 0}, then one entry per span: {first row, rows, position of the first row, start of its block table in tables}.
//     Grid, _64 and _128: one thread block of 128 threads for each (tile of 128 / group positions, KV head), and 768 dim bytes of
//       dynamic shared memory. Grid, _any: one warp for each (row, query head), 128 threads.
//
// Determinism. A row's softmax runs over splits and tiles whose borders are fixed by its own context length (decode) or are absolute
// positions (prefill), in a fixed order. So its bits depend on nothing but its own sequence, and in prefill not on how the prompt was
// cut into chunks.
//
// Reads before pdl_wait. The worklist and block tables are uploaded before the first kernel of a step starts, and all KV blocks of a
// decode row but its last were written by earlier steps. Kernels load these before they wait for the previous kernel. No pointer is
// __restrict__, because the compiler may move loads through the read-only path up across that wait.
#include "attention.cuh"

// Transposes an 8x8 matrix of 16-bit values, of which lane l holds columns 2(l%4)..+1 of row l/4.
__device__ __forceinline__ uint32_t transpose(uint32_t a) {
    uint32_t d;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
    return d;
}

// ---------------------------------------------------------------- decode

// Byte offset of 16-byte chunk `chunk` of row `row` in a shared matrix with rows of DIM values. The swizzle puts the same chunk of eight
// consecutive rows into different banks. In a matrix aligned to 256 bytes, chunks 2k and 2k + 1 lie at the offsets of chunks 0 and 1,
// xor 32k.
template <int DIM> __device__ __forceinline__ uint32_t place(int row, int chunk) {
    return (row * (DIM / 8) + (chunk ^ (row & 7))) * 16;
}

// An entry of the decode worklist.
struct DecodeItem {
    int row, start, context, split, keys, splits;  // keys: of each split but the last, which may have fewer

    __device__ explicit DecodeItem(uint4 words)
        : row(words.x), start(words.y), context(words.z), split(words.w & 255), keys(words.w >> 8),
          splits((context + keys - 1) / keys) {}
};

constexpr int HEADS = DECODE_HEADS;  // columns of a product

// Starts the copy of the 16 keys or values of a KV block. Tokens from `live` on become zero, whatever the cache holds there.
template <int DIM> __device__ __forceinline__ void load_kv_block(uint32_t to, const bf16 *from, int live, int lane) {
    constexpr int CHUNKS = DIM / 8;
#pragma unroll
    for (int i = 0; i < KV_BLOCK * CHUNKS / 32; i++) {
        const int chunk = lane + 32 * i, token = chunk / CHUNKS;
        cp_async16(to + place<DIM>(token, chunk % CHUNKS), from + 8 * chunk, token < live);
    }
}

// Loads the B fragments of q^T, a column per query head; columns from `columns` on are zero.
template <int DIM>
__device__ __forceinline__ void load_query(uint32_t (&q)[DIM / 16][2], const bf16 *query, int columns, int lane) {
#pragma unroll
    for (int k = 0; k < DIM / 16; k++) {
        q[k][0] = lane / 4 < columns ? *(const uint32_t *)(query + 16 * k) : 0;
        q[k][1] = lane / 4 < columns ? *(const uint32_t *)(query + 16 * k + 8) : 0;
    }
}

// Scores of a KV block, K q^T: the sum of s[0] and s[1], which halve the chain of dependent products.
template <int DIM>
__device__ __forceinline__ void score_block(float (&s)[2][4], const uint32_t (&q)[DIM / 16][2], uint32_t key_at) {
#pragma unroll
    for (int k = 0; k < DIM / 16; k++) {
        uint32_t a[4];
        ldmatrix(a, key_at ^ 32 * k);
        mma_m16n8k16(s[k % 2], a[0], a[1], a[2], a[3], q[k][0], q[k][1]);
    }
}

// Online softmax of a KV block with `live` keys: turns the scores into exp(score - m) in s[0], and updates the maxima m and the sums l
// of the lane's two columns. `decay` is the factor for what was accumulated before.
__device__ __forceinline__ void online_softmax(float (&s)[2][4], float (&m)[2], float (&l)[2], float (&decay)[2], int live, float scale,
                                               int lane) {
#pragma unroll
    for (int c = 0; c < 2; c++) {
        float s0 = (s[0][c] + s[1][c]) * scale, s1 = (s[0][c + 2] + s[1][c + 2]) * scale;
        if (lane / 4 >= live) s0 = NONE;
        if (lane / 4 + 8 >= live) s1 = NONE;
        float max = fmaxf(m[c], fmaxf(s0, s1));
#pragma unroll
        for (int x = 4; x < 32; x *= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, x));
        decay[c] = ex2(m[c] - max);
        m[c] = max;
        s[0][c] = ex2(s0 - max), s[0][c + 2] = ex2(s1 - max);
        l[c] = l[c] * decay[c] + (s[0][c] + s[0][c + 2]);
    }
}

// o = o decay + V^T p for a KV block; b0 and b1 are the B fragment of the probabilities p.
template <int DIM>
__device__ __forceinline__ void accumulate_block(float (&o)[DIM / 16][4], const float (&decay)[2], uint32_t b0, uint32_t b1,
                                                 uint32_t value_at) {
#pragma unroll
    for (int d = 0; d < DIM / 16; d++) {
        uint32_t a[4];
        ldmatrix_trans(a, value_at ^ 32 * d);
#pragma unroll
        for (int c = 0; c < 4; c++) o[d][c] *= decay[c % 2];
        mma_m16n8k16(o[d], a[0], a[1], a[2], a[3], b0, b1);
    }
}

// Decode attention. A work unit is an item and up to 8 query heads of one KV head; a thread block takes a unit at a time. A warp takes
// every fourth KV block of the item's split. Products have keys (QK) or dimensions (PV) as rows and query heads as columns, so that keys
// and values are read once for all query heads.
//
// DIM: width of a head, 64 or 128.
template <int DIM>
__device__ __forceinline__ void decode(const bf16 *qkv, const bf16 *cache, const uint4 *work, const uint4 *work_items, int room,
                                       const uint32_t *tables, int rows, int kv_heads, int group, float scale, float *partial,
                                       bf16 *out) {
    constexpr int CHUNKS = DIM / 8, BLOCK_BYTES = KV_BLOCK * DIM * 2, STRIDE = DIM + 4;
    static_assert(HEADS * STRIDE * 4 <= 2 * BLOCK_BYTES, "a warp's output takes the place of its KV block");
    __shared__ __align__(256) uint8_t blocks[WARPS][2 * BLOCK_BYTES];
    __shared__ float maxima[WARPS][HEADS], sums[WARPS][HEADS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int sets = (group + HEADS - 1) / HEADS, units = kv_heads * sets, heads = kv_heads * group;
    const uint32_t keys_at = shared_address(blocks[warp]), values_at = keys_at + BLOCK_BYTES;
    // The lane's rows for ldmatrix: A operands of QK and, transposed, of PV.
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
        // Padding rows come after the items.
        if (i >= items) {
            pdl_wait();
            uint4 *to = (uint4 *)(out + ((size_t)(header.y + i - items) * heads + head) * DIM);
#pragma unroll 1
            for (int c = threadIdx.x; c < columns * CHUNKS; c += THREADS) to[c] = make_uint4(0, 0, 0, 0);
            continue;
        }
        const DecodeItem item(words);
        const int keys = min(item.context - item.split * item.keys, item.keys);
        const uint32_t *table = tables + item.start + item.split * item.keys / KV_BLOCK + warp;
        const int count = ((keys + KV_BLOCK - 1) / KV_BLOCK - warp + WARPS - 1) / WARPS;  // the warp's KV blocks
        // Keys of the warp's KV block number b; the warp loads 32 ids of the block table at a time.
        uint32_t ids = 0;
        auto kv_block = [&](int b) {
            if (b % 32 == 0) ids = b + lane < count ? load_word(table + WARPS * (b + lane)) : 0;
            const size_t block = __shfl_sync(~0u, ids, b % 32);
            return cache + (block * 2 * kv_heads + kv_head) * KV_BLOCK * DIM;
        };
        auto live = [&](int b) { return keys - KV_BLOCK * (warp + WARPS * b); };
        const size_t to_values = (size_t)kv_heads * KV_BLOCK * DIM;

        // Load the warp's first KV block: before the wait, unless it is the row's last one, which has a key of this step.
        const bf16 *from = nullptr;
        const bool newest = item.split * item.keys + (warp + 1) * KV_BLOCK >= item.context;
#pragma unroll 1
        for (int waited = 0; waited < 2; waited++) {
            if (waited) pdl_wait();
            if (count <= 0 || newest != waited) continue;
            from = kv_block(0);
            load_kv_block<DIM>(keys_at, from, live(0), lane);
            cp_commit();
            load_kv_block<DIM>(values_at, from + to_values, live(0), lane);
            cp_commit();
        }
        // Load the query.
        uint32_t q[DIM / 16][2];
        load_query<DIM>(q, qkv + ((size_t)item.row * (heads + 2 * kv_heads) + head + lane / 4) * DIM + 2 * (lane % 4), columns, lane);

        float o[DIM / 16][4] = {}, m[2] = {NONE, NONE}, l[2] = {0.f, 0.f};
        for (int b = 0; b < count; b++) {
            const bool more = b + 1 < count;
            // Wait for the keys and compute scores; then their place takes the next keys.
            cp_wait<1>();
            __syncwarp();
            float s[2][4] = {};
            score_block<DIM>(s, q, key_at);
            __syncwarp();
            if (more) {
                from = kv_block(b + 1);
                load_kv_block<DIM>(keys_at, from, live(b + 1), lane);
            }
            cp_commit();

            float decay[2];
            online_softmax(s, m, l, decay, live(b), scale, lane);
            const uint32_t b0 = transpose(pack(s[0][0], s[0][1])), b1 = transpose(pack(s[0][2], s[0][3]));

            // Wait for the values and accumulate; then their place takes the next values.
            cp_wait<1>();
            __syncwarp();
            accumulate_block<DIM>(o, decay, b0, b1, value_at);
            __syncwarp();
            if (more) load_kv_block<DIM>(values_at, from + to_values, live(b + 1), lane);
            cp_commit();
        }

        // Reduce over lanes, and share each warp's statistics and output, rescaled to the maximum of all warps.
        float2 *stats = (float2 *)(partial + (size_t)room * heads * DIM);
#pragma unroll
        for (int c = 0; c < 2; c++) {
#pragma unroll
            for (int x = 4; x < 32; x *= 2) l[c] += __shfl_xor_sync(~0u, l[c], x);
            if (lane < 4) maxima[warp][2 * lane + c] = m[c], sums[warp][2 * lane + c] = l[c];
        }
        __syncthreads();
        auto maximum = [&](int g) { return fmaxf(fmaxf(maxima[0][g], maxima[1][g]), fmaxf(maxima[2][g], maxima[3][g])); };
        float *own_out = (float *)blocks[warp];
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const int g = 2 * (lane % 4) + c % 2;
            const float factor = ex2(m[c % 2] - maximum(g));
#pragma unroll
            for (int d = 0; d < DIM / 16; d++) own_out[g * STRIDE + 16 * d + lane / 4 + c / 2 * 8] = o[d][c] * factor;
        }
        __syncthreads();
        // Reduce over warps, in their order, and store: to out, or to partial where attn_merge has to merge splits.
#pragma unroll 1
        for (int c = threadIdx.x; c < columns * DIM / 4; c += THREADS) {
            const int g = c / (DIM / 4), d = c % (DIM / 4) * 4;
            const float max = maximum(g);
            float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                const float4 u = *(const float4 *)((const float *)blocks[w] + g * STRIDE + d);
                v.x += u.x, v.y += u.y, v.z += u.z, v.w += u.w;
                sum += sums[w][g] * ex2(maxima[w][g] - max);
            }
            if (item.splits == 1) {
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

// Merges the KV splits of one row and query head, in their order. One warp each.
//
// DIM: width of a head, 64 or 128.
template <int DIM>
__device__ __forceinline__ void merge(const uint4 *rows, int count, int room, int heads, const float *partial, bf16 *out) {
    constexpr int VALUES = DIM / 32, IN_FLIGHT = 8;  // values of a lane; splits loaded at once
    __shared__ float weights[WARPS][MAX_SPLITS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int unit = blockIdx.x * WARPS + warp, head = unit % heads;
    pdl_release();
    const uint4 entry = unit < count * heads ? load_words(rows + unit / heads) : make_uint4(0, 0, 0, 0);
    const int splits = entry.z;
    pdl_wait();
    if (splits < 2) return;
    // Load the statistics, a split a lane.
    const size_t first = (size_t)entry.x * heads + head;
    const float *from = partial + first * DIM + VALUES * lane;
    const float2 *stats = (const float2 *)(partial + (size_t)room * heads * DIM) + first + lane * heads;
    const float2 stat = lane < splits ? __ldcg(stats) : make_float2(NONE, 0.f);
    float x[IN_FLIGHT][VALUES], v[VALUES] = {};
    for (int s0 = 0; s0 < splits; s0 += IN_FLIGHT) {
        // Load the outputs of the next splits.
#pragma unroll
        for (int s = 0; s < IN_FLIGHT; s++)
#pragma unroll
            for (int e = 0; e < VALUES; e += 2) {
                float2 two = make_float2(0.f, 0.f);
                if (s0 + s < splits) two = __ldcg((const float2 *)(from + (size_t)(s0 + s) * heads * DIM + e));
                x[s][e] = two.x, x[s][e + 1] = two.y;
            }
        // Compute all splits' weights, once, while the first outputs are on their way.
        if (s0 == 0) {
            const float weight = ex2(stat.x - warp_max(stat.x));
            weights[warp][lane] = __fdividef(weight, warp_sum(weight * stat.y));
            __syncwarp();
        }
        // Accumulate.
#pragma unroll
        for (int s = 0; s < IN_FLIGHT; s++)
#pragma unroll
            for (int e = 0; e < VALUES; e++)
                if (s0 + s < splits) v[e] += weights[warp][s0 + s] * x[s][e];
    }
    // Store.
    uint32_t *to = (uint32_t *)(out + ((size_t)entry.y * heads + head) * DIM + VALUES * lane);
#pragma unroll
    for (int e = 0; e < VALUES; e += 2) to[e / 2] = pack(v[e], v[e + 1]);
}

#define DECODE(DIM)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, DECODE_BLOCKS_PER_SM)                                            \
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

// Finds tile number `tile` of all spans, which are cut into tiles of `positions` rows: sets `span` to its span, and `tile` to its number in
// that span. A span's later tiles, which have more keys, come first. Returns false if there is no such tile. Called by whole warps.
__device__ __forceinline__ bool find_tile(const uint4 *work, int positions, int &tile, uint4 &span) {
    const int lane = threadIdx.x % 32, spans = load_words(work).x;
    for (int start = 0; start < spans; start += 32) {
        // A span a lane, and the number of tiles up to it.
        const uint4 mine = start + lane < spans ? load_words(work + 1 + start + lane) : make_uint4(0, 0, 0, 0);
        const int tiles = ((int)mine.y + positions - 1) / positions;
        int end = tiles;
#pragma unroll
        for (int o = 1; o < 32; o *= 2) {
            const int before = __shfl_up_sync(~0u, end, o);
            if (lane >= o) end += before;
        }
        // The first span that ends after the tile.
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

// The keys and values of a sequence in the KV cache, for `attend_tile`.
template <int DIM> struct CachedKeys {
    const bf16 *cache;
    const uint32_t *table;  // the sequence's block table
    int kv_heads, kv_head;

    // Starts the copies of keys and then values 64 t to 64 t + 63, with zeros from `keys` on.
    __device__ __forceinline__ void load(uint32_t to, int t, int keys) const {
        constexpr int CHUNKS = DIM / 8;
        uint32_t ids[TILE_KEYS / KV_BLOCK];
#pragma unroll
        for (int b = 0; b < TILE_KEYS / KV_BLOCK; b++) ids[b] = table[min(t * (TILE_KEYS / KV_BLOCK) + b, (keys - 1) / KV_BLOCK)];
#pragma unroll
        for (int i = 0; i < TILE_KEYS * CHUNKS / THREADS; i++) {
            const int chunk = threadIdx.x + THREADS * i, key = chunk / CHUNKS;
            const uint32_t at = to + place_panel<TILE_KEYS>(key, chunk % CHUNKS);
            const size_t block = ids[i * THREADS / (KV_BLOCK * CHUNKS)];
            const bf16 *from = cache + (block * 2 * kv_heads + kv_head) * KV_BLOCK * DIM + 8 * (chunk % (KV_BLOCK * CHUNKS));
            const bool live = t * TILE_KEYS + key < keys;
            cp_async16(at, from, live);
            cp_async16(at + panels_bytes<DIM, TILE_KEYS>, from + (size_t)kv_heads * KV_BLOCK * DIM, live);
        }
    }
};

// Prefill attention: one tile of one span. DIM: width of a head, 64 or 128.
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

// ---------------------------------------------------------------- any head width


// Attention of one query head of one row to the sequence's first `keys` keys, by a warp. A lane computes the score of one key at a time,
// and accumulates every 32nd dimension.
__device__ __forceinline__ void attend(const bf16 *query, const bf16 *cache, const uint32_t *table, int keys, int kv_heads,
                                       int kv_head, int dim, float scale, bf16 *out) {
    __shared__ float queries[WARPS][MAX_HEAD_DIM];
    const int lane = threadIdx.x % 32;
    // Load the query, scaled.
    float *q = queries[threadIdx.x / 32], o[MAX_HEAD_DIM / 32] = {}, m = NONE, l = 0.f;
    __syncwarp();
    for (int d = lane; d < dim; d += 32) q[d] = __bfloat162float(query[d]) * scale;
    __syncwarp();
    auto key_at = [&](int key) {
        return cache + ((size_t)table[key / KV_BLOCK] * 2 * kv_heads + kv_head) * KV_BLOCK * dim + key % KV_BLOCK * dim;
    };
    for (int first = 0; first < keys; first += 32) {
        // Scores of 32 keys.
        const int live = min(32, keys - first);
        float s = NONE;
        if (lane < live) {
            const bf162 *k = (const bf162 *)key_at(first + lane);
            s = 0.f;
            for (int d = 0; d < dim / 2; d++) {
                const float2 x = __bfloat1622float2(k[d]);
                s += q[2 * d] * x.x + q[2 * d + 1] * x.y;
            }
        }
        // Online softmax.
        const float max = fmaxf(m, warp_max(s)), decay = ex2(m - max), p = ex2(s - max);
        m = max;
        l = l * decay + p;
#pragma unroll
        for (int i = 0; i < MAX_HEAD_DIM / 32; i++) o[i] *= decay;
        // Accumulate the values.
        for (int key = 0; key < live; key++) {
            const bf16 *v = key_at(first + key) + (size_t)kv_heads * KV_BLOCK * dim;
            const float weight = __shfl_sync(~0u, p, key);
#pragma unroll
            for (int i = 0; i < MAX_HEAD_DIM / 32; i++) {
                if (lane + 32 * i < dim) o[i] += weight * __bfloat162float(v[lane + 32 * i]);
            }
        }
    }
    // Normalise and store.
    const float inverse = __fdividef(1.f, warp_sum(l));
#pragma unroll
    for (int i = 0; i < MAX_HEAD_DIM / 32; i++) {
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
        // Padding rows come after the items.
        if (i >= header.x) {
            bf16 *to = out + ((size_t)(header.y + i - header.x) * heads + head) * dim;
            for (int d = threadIdx.x % 32; d < dim; d += 32) to[d] = __float2bfloat16_rn(0.f);
            continue;
        }
        const DecodeItem item(items[i]);
        if (item.split > 0) continue;  // the first split's item stands for the whole row
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
