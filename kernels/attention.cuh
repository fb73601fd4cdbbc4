// Shared by the attention kernels: FlashAttention over one tile of query rows on tensor cores.
#pragma once

#include "warpgroup.cuh"

constexpr int WARPS = ATTENTION_WARPS;
constexpr int THREADS = 32 * WARPS;
constexpr float NONE = -INFINITY, LN_2 = 0.69314718f, LOG2_E = 1.44269504f;

__device__ __forceinline__ float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

constexpr int TILE_ROWS = ATTENTION_TILE_ROWS;  // query rows of a tile: consecutive positions, and for each the query heads of one KV head
constexpr int TILE_KEYS = 64;   // keys and values of one stage in shared memory

// Starts the copies of a tile's queries to shared memory. Rows from `rows` on become zero.
template <int DIM>
__device__ __forceinline__ void load_queries(uint32_t queries_at, const bf16 *qkv, int row0, int rows, int heads, int kv_heads,
                                             int kv_head, int group) {
    constexpr int CHUNKS = DIM / 8;
#pragma unroll 4
    for (int i = 0; i < TILE_ROWS * CHUNKS / THREADS; i++) {
        const int chunk = threadIdx.x + THREADS * i, row = chunk / CHUNKS, live = row < rows;
        const int from_row = live ? row : 0, token = row0 + from_row / group, head = kv_head * group + from_row % group;
        const bf16 *from = qkv + ((size_t)token * (heads + 2 * kv_heads) + head) * DIM + 8 * (chunk % CHUNKS);
        cp_async16(queries_at + place_panel<TILE_ROWS>(row, chunk % CHUNKS), from, live);
    }
}

// Online softmax of one half of a tile: replaces its scores for key tile `t` by exp(score - m), and rescales o and l to the new m.
// The halves have 64 query rows each, of which a lane holds two: rows 0 and 1 of m (maximum) and l (sum of exponentials of the lane's
// columns) belong to half 0, rows 2 and 3 to half 1.
template <int DIM, int TILES>
__device__ __forceinline__ void online_softmax(float (&s)[TILES][4], float (&o)[DIM / 8][4], float (&m)[4], float (&l)[4], int half,
                                               int t, int position, int group, float scale, int warp, int lane) {
    // Causal mask. Query rows are numbered from the sequence's position 0 on, `group` rows for each position.
    const int first = position * group + half * 64;
    if ((t * TILE_KEYS + TILE_KEYS - 1) * group > first) {
#pragma unroll
        for (int n = 0; n < TILES; n++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                const int key = t * TILE_KEYS + 8 * n + 2 * (lane % 4) + c % 2;
                if (first + warp * 16 + c / 2 * 8 + lane / 4 < key * group) s[n][c] = NONE;
            }
        }
    }
    // The lane's two rows.
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int r = 2 * half + i, c = 2 * i;
        float max = m[r];
#pragma unroll
        for (int n = 0; n < TILES; n++) max = fmaxf(max, fmaxf(s[n][c], s[n][c + 1]));
        max = fmaxf(max, __shfl_xor_sync(~0u, max, 1));
        max = fmaxf(max, __shfl_xor_sync(~0u, max, 2));
        const float decay = ex2((m[r] - max) * scale), offset = max * scale;
        m[r] = max;
        float sum = 0.f;
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            s[n][c] = ex2(s[n][c] * scale - offset);
            s[n][c + 1] = ex2(s[n][c + 1] * scale - offset);
            sum += s[n][c] + s[n][c + 1];
        }
        l[r] = l[r] * decay + sum;
#pragma unroll
        for (int d = 0; d < DIM / 8; d++) o[d][c] *= decay, o[d][c + 1] *= decay;
    }
}

// Divides a tile's output by l, and writes it and, if not null, lse. Rows pass through `shared`, so that stores are 16 bytes wide; a warp
// reads only what it wrote itself.
template <int DIM>
__device__ __forceinline__ void store_tile(uint8_t *shared, float (&o)[2][DIM / 8][4], const float (&m)[4], float (&l)[4], int row0,
                                           int rows, int heads, int kv_head, int group, float scale, int warp, int lane, bf16 *out,
                                           float *lse) {
    constexpr int CHUNKS = DIM / 8;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        // Reduce l over the four lanes of each row, and normalise.
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int r = 2 * half + i, row = half * 64 + warp * 16 + i * 8 + lane / 4;
            l[r] += __shfl_xor_sync(~0u, l[r], 1);
            l[r] += __shfl_xor_sync(~0u, l[r], 2);
            if (lse && lane % 4 == 0 && row < rows)
                lse[(size_t)(row0 + row / group) * heads + kv_head * group + row % group] = (m[r] * scale + __log2f(l[r])) * LN_2;
            const float inverse = __fdividef(1.f, l[r]);
#pragma unroll
            for (int d = 0; d < DIM / 8; d++) o[half][d][2 * i] *= inverse, o[half][d][2 * i + 1] *= inverse;
        }
        // Store.
        const int first = half * 64 + warp * 16;
        store_shared<DIM, TILE_ROWS>(shared + first * PANEL_ROW, o[half], 1.f, lane);
        __syncwarp();
#pragma unroll 4
        for (int i = 0; i < CHUNKS / 2; i++) {
            const int chunk = lane + 32 * i, row = first + chunk / CHUNKS;
            if (row >= rows) break;
            bf16 *to = out + ((size_t)(row0 + row / group) * heads + kv_head * group + row % group) * DIM + 8 * (chunk % CHUNKS);
            *(uint4 *)to = *(const uint4 *)(shared + place_panel<TILE_ROWS>(row, chunk % CHUNKS));
        }
    }
}

// Causal attention of one tile of `rows` query rows. The first row belongs to token `row0` of the batch, which is at `position` of its
// sequence. `keys.load(to, t, count)` starts the copies of keys and then values 64 t to 64 t + 63, with zeros from `count` on. `scale`
// includes log2(e). `lse` may be null.
//
// DIM: width of a head. Keys: the source of keys and values (CachedKeys or RowKeys). Called by all THREADS threads, with dynamic shared
// memory for TILE_ROWS + 4 TILE_KEYS rows.
template <int DIM, class Keys>
__device__ __forceinline__ void attend_tile(const bf16 *qkv, int row0, int position, int rows, const Keys &keys, int kv_heads,
                                            int kv_head, int group, float scale, bf16 *out, float *lse) {
    constexpr int TILES = TILE_KEYS / 8;
    constexpr int QUERY_BYTES = panels_bytes<DIM, TILE_ROWS>, KEY_BYTES = panels_bytes<DIM, TILE_KEYS>;
    // Layout: queries, then two stages of keys and values.
    extern __shared__ __align__(1024) uint8_t shared[];
    const uint32_t queries_at = shared_address(shared), stages_at = queries_at + QUERY_BYTES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, heads = kv_heads * group;
    const int count = position + rows / group;

    // Load the queries and the first stage of keys and values.
    keys.load(stages_at, 0, count);
    load_queries<DIM>(queries_at, qkv, row0, rows, heads, kv_heads, kv_head, group);
    cp_commit();

    float o[2][DIM / 8][4] = {}, m[4] = {NONE, NONE, NONE, NONE}, l[4] = {};
    const int tiles = (count + TILE_KEYS - 1) / TILE_KEYS;
    for (int t = 0; t < tiles; t++) {
        // Wait for this stage, and start loading the next one.
        cp_wait<0>();
        publish_copies();
        __syncthreads();
        if (t + 1 < tiles) {
            keys.load(stages_at + (t + 1) % 2 * 2 * KEY_BYTES, t + 1, count);
            cp_commit();
        }
        // Compute. One half's softmax runs while the other half's products do.
        const uint32_t keys_at = stages_at + t % 2 * 2 * KEY_BYTES, values_at = keys_at + KEY_BYTES;
        float s[2][TILES][4];
        start_products<DIM, TILE_ROWS>(s[0], queries_at, keys_at);
        start_products<DIM, TILE_ROWS>(s[1], queries_at + 64 * PANEL_ROW, keys_at);
        finish<1>(s[0]);
        online_softmax<DIM>(s[0], o[0], m, l, 0, t, position, group, scale, warp, lane);
        start_accumulate<DIM>(o[0], s[0], values_at);
        finish<1>(s[1]);
        online_softmax<DIM>(s[1], o[1], m, l, 1, t, position, group, scale, warp, lane);
        start_accumulate<DIM>(o[1], s[1], values_at);
        finish<0>(o[0]);
        finish<0>(o[1]);
    }

    // Store, in the place of the queries.
    __syncthreads();
    store_tile<DIM>(shared, o, m, l, row0, rows, heads, kv_head, group, scale, warp, lane, out, lse);
}
