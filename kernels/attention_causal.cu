// Causal attention over packed sequences, and its gradients, for training (launched from src/ops/attention/cuda/causal.rs).
// FlashAttention-2 (Dao, 2023): the backward kernels compute the probabilities again from the log-sum-exp of each row.
//
// Arguments. All pointers are 16-byte aligned.
//   qkv, dqkv: bf16 [T][heads + 2 kv_heads][dim], each row's query heads, then its keys, then its values; rotated by RoPE.
//   out, dout: bf16 [T][heads][dim].
//   lse: f32 [T][heads], the natural logarithm of the sum of exponentials.
//   delta: f32 [T][heads], the dot product of out and dout: FlashAttention's D, not LoRA's delta.
//   work: one item per tile of each sequence, {first row of the sequence, its length, first position of the tile, 0}.
//   group: query heads of a KV head.
//   scale: log2(e) / sqrt(dim).
//
// Kernels. The grid has one thread block of 128 threads for each (item, KV head).
//   attn_causal_64 / _96 / _128 (qkv, work, kv_heads, group, scale, out, lse)
//     Forward. A tile is 128 / group positions.
//   attn_delta(out, dout, dim, rows, lanes, delta)
//     A row is one head of one token. `lanes` lanes, a power of two, take a row; where dim % 8 == 0 each takes 8 values, so that
//     8 lanes >= dim. Grid: rows lanes / 256 rounded up, 256 threads.
//   attn_causal_dq_64 / _96 / _128 (qkv, dout, lse, delta, work, kv_heads, group, scale, dqkv)
//     Gradient of the queries. A tile is 128 / group positions.
//   attn_causal_dkv_64 / _96 / _128 (qkv, dout, lse, delta, work, kv_heads, group, scale, dqkv)
//     Gradients of the keys and values. A tile is 64 keys; the thread block loops over all query heads of the group and all positions
//     from the tile's first on.
//   Dynamic shared memory of these: 384 rows of 128 bytes (dim 64) or 256 bytes, and 1024 bytes more for attn_causal_dkv.
//   attn_causal_any, attn_causal_dq_any, attn_causal_dkv_any (the same arguments, then dim)
//     For any even dim up to 256. A tile is 64 positions. The grid has one thread block of 128 threads for each (item, query head), or
//     (item, KV head) for dkv. No dynamic shared memory.
//
// Determinism. Every sum has an order fixed by its sequence alone, and there are no atomics: a sequence's bits do not depend on the
// other sequences.
#include "attention.cuh"

// The keys and values of a sequence in its rows of qkv, for `attend_tile`.
template <int DIM> struct RowKeys {
    const bf16 *keys;  // the first row's
    size_t width;      // values of a row of qkv
    int to_values;     // offset from a row's key to its value

    __device__ __forceinline__ void load(uint32_t to, int t, int count) const {
        load_rows<TILE_KEYS>(to, t * TILE_KEYS, count);
    }

    // Starts the copies of ROWS keys, and then of ROWS values, from `first` on, with zeros from `count` on.
    template <int ROWS> __device__ __forceinline__ void load_rows(uint32_t to, int first, int count) const {
        constexpr int CHUNKS = DIM / 8;
#pragma unroll
        for (int i = 0; i < ROWS * CHUNKS / THREADS; i++) {
            const int chunk = threadIdx.x + THREADS * i, row = chunk / CHUNKS;
            const bool live = first + row < count;
            const uint32_t at = to + place_panel<ROWS>(row, chunk % CHUNKS);
            const bf16 *from = keys + (live ? first + row : 0) * width + 8 * (chunk % CHUNKS);
            cp_async16(at, from, live);
            cp_async16(at + panels_bytes<DIM, ROWS>, from + to_values, live);
        }
    }
};

// The work of a thread block: a tile of a sequence, and a KV head.
struct Tile {
    int row0, length, first, kv_head, heads;  // row0: the sequence's first row; first: the tile's first position
    size_t width;                             // heads of a row of qkv

    __device__ __forceinline__ Tile(const uint4 *work, int kv_heads, int group)
        : kv_head(blockIdx.x % kv_heads), heads(kv_heads * group), width(heads + 2 * kv_heads) {
        const uint4 item = work[blockIdx.x / kv_heads];
        row0 = item.x, length = item.y, first = item.z;
    }

    template <int DIM> __device__ __forceinline__ RowKeys<DIM> keys(const bf16 *qkv) const {
        return {qkv + (row0 * width + heads + kv_head) * DIM, width * DIM, int(width - heads) / 2 * DIM};
    }
};

// Forward. DIM: width of a head.
template <int DIM>
__device__ __forceinline__ void forward(const bf16 *qkv, const uint4 *work, int kv_heads, int group, float scale, bf16 *out,
                                        float *lse) {
    pdl_wait();
    pdl_release();
    const Tile tile(work, kv_heads, group);
    const int rows = min(TILE_ROWS / group, tile.length - tile.first) * group;
    attend_tile<DIM>(qkv, tile.row0 + tile.first, tile.first, rows, tile.keys<DIM>(qkv), kv_heads, tile.kv_head, group, scale, out,
                     lse);
}

// ---------------------------------------------------------------- gradients

extern "C" __global__ void __launch_bounds__(256)
    attn_delta(const bf16 *out, const bf16 *dout, int dim, int rows, int lanes, float *delta) {
    pdl_wait();
    pdl_release();
    const int row = blockIdx.x * (256 / lanes) + threadIdx.x / lanes, lane = threadIdx.x % lanes;
    // Multiply.
    float sum = 0.f;
    if (row < rows) {
        out += (size_t)row * dim, dout += (size_t)row * dim;
        if (dim % 8 == 0) {
            if (8 * lane < dim) {
                const uint4 a = ((const uint4 *)out)[lane], b = ((const uint4 *)dout)[lane];
                const bf162 *x = (const bf162 *)&a, *y = (const bf162 *)&b;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float2 u = __bfloat1622float2(x[i]), v = __bfloat1622float2(y[i]);
                    sum += u.x * v.x + u.y * v.y;
                }
            }
        } else {
            for (int d = lane; d < dim; d += lanes) sum += __bfloat162float(out[d]) * __bfloat162float(dout[d]);
        }
    }
    // Reduce over the row's lanes, and store.
    for (int o = lanes / 2; o; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
    if (row < rows && lane == 0) delta[row] = sum;
}

constexpr int DQ_KEYS = 32;  // keys and values of a stage

// Starts the copies of a tile's queries and then of its rows of dout, with zeros from `rows` on.
template <int DIM>
__device__ __forceinline__ void load_query_rows(uint32_t queries_at, const bf16 *qkv, const bf16 *dout, size_t row0, int rows, int heads,
                                                int head0, int group, const Tile &tile) {
    constexpr int CHUNKS = DIM / 8, ROWS_BYTES = panels_bytes<DIM, TILE_ROWS>;
#pragma unroll 4
    for (int i = 0; i < TILE_ROWS * CHUNKS / THREADS; i++) {
        const int chunk = threadIdx.x + THREADS * i, row = chunk / CHUNKS, live = row < rows;
        const int from_row = live ? row : 0, head = head0 + from_row % group;
        const size_t token = row0 + from_row / group;
        const uint32_t at = queries_at + place_panel<TILE_ROWS>(row, chunk % CHUNKS);
        cp_async16(at, qkv + (token * tile.width + head) * DIM + 8 * (chunk % CHUNKS), live);
        cp_async16(at + ROWS_BYTES, dout + (token * heads + head) * DIM + 8 * (chunk % CHUNKS), live);
    }
}

// Turns the scores of 64 query rows for key tile `t` into probabilities, by the rows' log-sum-exp (base 2). `first` numbers the first of
// the 64 rows from the sequence's position 0 on, `group` rows for each position.
template <int TILES>
__device__ __forceinline__ void row_probabilities(float (&s)[TILES][4], const float *log_sum, int t, int first, int group, float scale,
                                                  int warp, int lane) {
    const bool masked = (t * DQ_KEYS + DQ_KEYS - 1) * group > first;
#pragma unroll
    for (int n = 0; n < TILES; n++) {
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const int key = t * DQ_KEYS + 8 * n + 2 * (lane % 4) + c % 2;
            float &x = s[n][c];
            x = ex2(x * scale - log_sum[c / 2]);
            if (masked && first + warp * 16 + c / 2 * 8 + lane / 4 < key * group) x = 0.f;
        }
    }
}

// Gradient of the queries of a tile: dq = scale Σ p (dout·v - delta) k. The tile has two halves of 64 query rows, of which a lane holds
// two each.
//
// DIM: width of a head, 64, 96 or 128.
template <int DIM>
__device__ __forceinline__ void backward_queries(const bf16 *qkv, const bf16 *dout, const float *lse, const float *delta,
                                                 const uint4 *work, int kv_heads, int group, float scale, bf16 *dqkv) {
    constexpr int CHUNKS = DIM / 8, TILES = DQ_KEYS / 8;
    constexpr int ROWS_BYTES = panels_bytes<DIM, TILE_ROWS>, KEY_BYTES = panels_bytes<DIM, DQ_KEYS>;
    // Layout: queries, rows of dout, then two stages of keys and values.
    extern __shared__ __align__(1024) uint8_t shared[];
    const uint32_t queries_at = shared_address(shared), stages_at = queries_at + 2 * ROWS_BYTES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    pdl_wait();
    pdl_release();
    const Tile tile(work, kv_heads, group);
    const int rows = min(TILE_ROWS / group, tile.length - tile.first) * group, count = tile.first + rows / group;
    const int heads = tile.heads, head0 = tile.kv_head * group;
    const size_t row0 = tile.row0 + tile.first;
    const RowKeys<DIM> keys = tile.keys<DIM>(qkv);
    auto load = [&](int t) { keys.template load_rows<DQ_KEYS>(stages_at + t % 2 * 2 * KEY_BYTES, t * DQ_KEYS, count); };

    // Load the first keys and values, the queries and dout, and the statistics of the lane's rows.
    load(0);
    load_query_rows<DIM>(queries_at, qkv, dout, row0, rows, heads, head0, group, tile);
    cp_commit();
    float log_sum[4], dot[4];
#pragma unroll
    for (int r = 0; r < 4; r++) {
        const int row = r / 2 * 64 + warp * 16 + r % 2 * 8 + lane / 4;
        const size_t at = (row0 + row / group) * heads + head0 + row % group;
        log_sum[r] = row < rows ? lse[at] * LOG2_E : 0.f, dot[r] = row < rows ? delta[at] : 0.f;
    }
    float dq[2][DIM / 8][4] = {};
    const int tiles = (count + DQ_KEYS - 1) / DQ_KEYS;
    for (int t = 0; t < tiles; t++) {
        // Wait for this stage, and start loading the next one.
        cp_wait<0>();
        publish_copies();
        __syncthreads();
        if (t + 1 < tiles) {
            load(t + 1);
            cp_commit();
        }
        // Start all products: scores s, and dp = dout V^T.
        const uint32_t keys_at = stages_at + t % 2 * 2 * KEY_BYTES;
        float s[2][TILES][4], dp[2][TILES][4];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            start_products<DIM, TILE_ROWS>(s[half], queries_at + half * 64 * PANEL_ROW, keys_at);
            start_products<DIM, TILE_ROWS>(dp[half], queries_at + ROWS_BYTES + half * 64 * PANEL_ROW, keys_at + KEY_BYTES);
        }
        // For each half: probabilities, gradients of the scores, dq += ds K.
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (half == 0) finish<3>(s[0]);
            else finish<2>(s[1]);
            row_probabilities(s[half], log_sum + 2 * half, t, tile.first * group + half * 64, group, scale, warp, lane);
            if (half == 0) finish<2>(dp[0]);
            else finish<1>(dp[1]);
#pragma unroll
            for (int n = 0; n < TILES; n++)
#pragma unroll
                for (int c = 0; c < 4; c++) dp[half][n][c] = s[half][n][c] * (dp[half][n][c] - dot[2 * half + c / 2]);
            start_accumulate<DIM>(dq[half], dp[half], keys_at);
        }
        finish<0>(dq[0]);
        finish<0>(dq[1]);
    }

    // Store through the place of the queries. A warp reads only what it wrote itself.
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int first = half * 64 + warp * 16;
        store_shared<DIM, TILE_ROWS>(shared + first * PANEL_ROW, dq[half], scale * LN_2, lane);
        __syncwarp();
#pragma unroll 4
        for (int i = 0; i < CHUNKS / 2; i++) {
            const int chunk = lane + 32 * i, row = first + chunk / CHUNKS;
            if (row >= rows) break;
            bf16 *to = dqkv + ((row0 + row / group) * tile.width + head0 + row % group) * DIM + 8 * (chunk % CHUNKS);
            *(uint4 *)to = *(const uint4 *)(shared + place_panel<TILE_ROWS>(row, chunk % CHUNKS));
        }
    }
}

// Division by a divisor known only at launch: exact for dividends below 2^32 / divisor.
struct Divisor {
    uint32_t inverse;  // 0: the divisor is 1

    __device__ __forceinline__ explicit Divisor(uint32_t by) : inverse(by == 1 ? 0 : ~0u / by + 1) {}

    __device__ __forceinline__ uint32_t operator()(uint32_t x) const { return inverse ? __umulhi(x, inverse) : x; }
};

constexpr int DKV_KEYS = CAUSAL_TILE_KEYS;  // a warp has 16
constexpr int DKV_ROWS = 64;  // query rows of a stage

// Turns the scores of 64 query rows into probabilities. `log_sums` are those of the lane's rows (base e).
template <int TILES>
__device__ __forceinline__ void column_probabilities(float (&s)[TILES][4], const float *log_sums, bool masked, int row0, int key0,
                                                     int group, float scale, int lane) {
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        const float2 log_sum = *(const float2 *)(log_sums + 8 * n);
#pragma unroll
        for (int c = 0; c < 4; c++) {
            float &x = s[n][c];
            x = ex2(x * scale - (c % 2 ? log_sum.y : log_sum.x) * LOG2_E);
            // Causal mask: rows of positions before the key's do not see it.
            const int row = row0 + 8 * n + 2 * (lane % 4) + c % 2;
            if (masked && row < (key0 + lane / 4 + c / 2 * 8) * group) x = 0.f;
        }
    }
}

// Gradients of the keys and values of a tile: dv = Σ p dout, dk = scale Σ p (dout·v - delta) q. Products have keys as rows, so that
// probabilities and their gradients stay in registers. The query rows of a sequence and KV head are numbered from its position 0 on: row
// r is head r % group of position r / group.
//
// DIM: width of a head, 64, 96 or 128.
template <int DIM>
__device__ __forceinline__ void backward_keys(const bf16 *qkv, const bf16 *dout, const float *lse, const float *delta,
                                              const uint4 *work, int kv_heads, int group, float scale, bf16 *dqkv) {
    constexpr int CHUNKS = DIM / 8, TILES = DKV_ROWS / 8;
    constexpr int KEY_BYTES = panels_bytes<DIM, DKV_KEYS>, ROWS_BYTES = panels_bytes<DIM, DKV_ROWS>;
    // Layout: keys, values, two stages of queries and rows of dout, then two stages of lse and delta.
    extern __shared__ __align__(1024) uint8_t shared[];
    const uint32_t keys_at = shared_address(shared), stages_at = keys_at + 2 * KEY_BYTES, stats_at = stages_at + 4 * ROWS_BYTES;
    const float *all_stats = (const float *)(shared + 2 * KEY_BYTES + 4 * ROWS_BYTES);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    pdl_wait();
    pdl_release();
    const Tile tile(work, kv_heads, group);
    const int heads = tile.heads, head0 = tile.kv_head * group, rows = tile.length * group;
    const RowKeys<DIM> keys = tile.keys<DIM>(qkv);
    const Divisor by_group(group);
    // Starts the copies of stage t.
    auto load = [&](int t) {
#pragma unroll 4
        for (int i = 0; i < DKV_ROWS * CHUNKS / THREADS; i++) {
            const int chunk = threadIdx.x + THREADS * i, row = t * DKV_ROWS + chunk / CHUNKS, live = row < rows;
            const int position = live ? by_group(row) : 0, head = live ? head0 + row - position * group : head0;
            const size_t token = tile.row0 + position;
            const uint32_t at = stages_at + t % 2 * 2 * ROWS_BYTES + place_panel<DKV_ROWS>(chunk / CHUNKS, chunk % CHUNKS);
            cp_async16(at, qkv + (token * tile.width + head) * DIM + 8 * (chunk % CHUNKS), live);
            cp_async16(at + ROWS_BYTES, dout + (token * heads + head) * DIM + 8 * (chunk % CHUNKS), live);
        }
        // Half of the threads copy lse, half delta. Rows past the end are all zero, so their statistics, zero too, add nothing.
        const int row = t * DKV_ROWS + threadIdx.x % DKV_ROWS, live = row < rows;
        const float *from = threadIdx.x < DKV_ROWS ? lse : delta;
        const int position = live ? by_group(row) : 0;
        from += (size_t)(tile.row0 + position) * heads + head0 + (live ? row - position * group : 0);
        cp_async4(stats_at + 4 * (t % 2 * 2 * DKV_ROWS + threadIdx.x), from, live);
    };
    // Load the keys and values, and the first stage of query rows.
    const int first = tile.first * group / DKV_ROWS, end = (rows + DKV_ROWS - 1) / DKV_ROWS;
    keys.template load_rows<DKV_KEYS>(keys_at, tile.first, tile.length);
    load(first);
    cp_commit();

    const int key0 = tile.first + warp * 16;
    float dk[DIM / 8][4] = {}, dv[DIM / 8][4] = {};
    for (int t = first; t < end; t++) {
        // Wait for this stage.
        cp_wait<0>();
        publish_copies();
        __syncthreads();
        // Start the products: scores s, and dp = V dout^T.
        const uint32_t stage_at = stages_at + t % 2 * 2 * ROWS_BYTES;
        const float *stats = all_stats + t % 2 * 2 * DKV_ROWS + 2 * (lane % 4);
        float s[TILES][4], dp[TILES][4];
        start_products<DIM, DKV_KEYS>(s, keys_at, stage_at);
        start_products<DIM, DKV_KEYS>(dp, keys_at + KEY_BYTES, stage_at + ROWS_BYTES);
        // Start loading the next stage, after the products: its address arithmetic takes long enough to overlap them.
        if (t + 1 < end) {
            load(t + 1);
            cp_commit();
        }
        // Probabilities, and dv += p dout.
        finish<1>(s);
        const bool masked = t * DKV_ROWS < (tile.first + DKV_KEYS - 1) * group;
        column_probabilities(s, stats, masked, t * DKV_ROWS, key0, group, scale, lane);
        start_accumulate<DIM>(dv, s, stage_at + ROWS_BYTES);
        // Gradients of the scores, and dk += ds q.
        finish<1>(dp);
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            const float2 dot = *(const float2 *)(stats + DKV_ROWS + 8 * n);
#pragma unroll
            for (int c = 0; c < 4; c++) dp[n][c] = s[n][c] * (dp[n][c] - (c % 2 ? dot.y : dot.x));
        }
        start_accumulate<DIM>(dk, dp, stage_at);
        finish<0>(dv);
        finish<0>(dk);
    }

    // Store through the place of the warp's own keys and values.
    __syncthreads();
    uint8_t *own_keys = shared + warp * 16 * PANEL_ROW;
    store_shared<DIM, DKV_KEYS>(own_keys, dk, scale * LN_2, lane);
    store_shared<DIM, DKV_KEYS>(own_keys + KEY_BYTES, dv, 1.f, lane);
    __syncwarp();
#pragma unroll 4
    for (int i = 0; i < CHUNKS / 2; i++) {
        const int chunk = lane + 32 * i, key = key0 + chunk / CHUNKS;
        if (key >= tile.length) break;
        bf16 *to = dqkv + ((tile.row0 + key) * tile.width + heads + tile.kv_head) * DIM + 8 * (chunk % CHUNKS);
        const uint8_t *from = own_keys + place_panel<DKV_KEYS>(chunk / CHUNKS, chunk % CHUNKS);
        *(uint4 *)to = *(const uint4 *)from;
        *(uint4 *)(to + keys.to_values) = *(const uint4 *)(from + KEY_BYTES);
    }
}

// DIM: width of a head. BLOCKS: thread blocks of attn_causal_dq that an SM holds at once.
#define CAUSAL(DIM, BLOCKS)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                                     \
        attn_causal_##DIM(const bf16 *qkv, const uint4 *work, int kv_heads, int group, float scale, bf16 *out, float *lse) {     \
        forward<DIM>(qkv, work, kv_heads, group, scale, out, lse);                                                               \
    }                                                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                                \
        attn_causal_dq_##DIM(const bf16 *qkv, const bf16 *dout, const float *lse, const float *delta, const uint4 *work,         \
                             int kv_heads, int group, float scale, bf16 *dqkv) {                                                 \
        backward_queries<DIM>(qkv, dout, lse, delta, work, kv_heads, group, scale, dqkv);                                        \
    }                                                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                                     \
        attn_causal_dkv_##DIM(const bf16 *qkv, const bf16 *dout, const float *lse, const float *delta, const uint4 *work,        \
                              int kv_heads, int group, float scale, bf16 *dqkv) {                                                \
        backward_keys<DIM>(qkv, dout, lse, delta, work, kv_heads, group, scale, dqkv);                                           \
    }
CAUSAL(64, 3)
CAUSAL(96, 2)
CAUSAL(128, 2)

// ---------------------------------------------------------------- any head width

constexpr int PER_LANE = MAX_HEAD_DIM / 32;  // dimensions of a head that a lane holds

// A head's vector, spread over a warp: lane l holds dimensions l, l + 32, ...
struct WarpVector {
    float x[PER_LANE];

    __device__ __forceinline__ WarpVector() {
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) x[i] = 0.f;
    }

    __device__ __forceinline__ WarpVector(const bf16 *from, int dim) {
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const int d = threadIdx.x % 32 + 32 * i;
            x[i] = d < dim ? __bfloat162float(from[d]) : 0.f;
        }
    }

    __device__ __forceinline__ void store(bf16 *to, int dim, float factor) const {
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const int d = threadIdx.x % 32 + 32 * i;
            if (d < dim) to[d] = __float2bfloat16_rn(x[i] * factor);
        }
    }

    __device__ __forceinline__ float dot(const WarpVector &other) const {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) sum += x[i] * other.x[i];
        return warp_sum(sum);
    }

    __device__ __forceinline__ void scale(float by) {
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) x[i] *= by;
    }

    __device__ __forceinline__ void add(float weight, const WarpVector &other) {
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) x[i] += weight * other.x[i];
    }
};

// Access to the heads of a sequence's rows.
struct SequenceRows {
    const bf16 *qkv, *dout;
    int row0, heads, kv_heads, dim;

    __device__ __forceinline__ size_t offset(int position, int head) const {
        return ((size_t)(row0 + position) * (heads + 2 * kv_heads) + head) * dim;
    }
    __device__ __forceinline__ WarpVector query(int position, int head) const { return {qkv + offset(position, head), dim}; }
    __device__ __forceinline__ WarpVector key(int position, int kv_head) const { return {qkv + offset(position, heads + kv_head), dim}; }
    __device__ __forceinline__ WarpVector value(int position, int kv_head) const {
        return {qkv + offset(position, heads + kv_heads + kv_head), dim};
    }
    __device__ __forceinline__ size_t stat(int position, int head) const { return (size_t)(row0 + position) * heads + head; }
    __device__ __forceinline__ WarpVector gradient(int position, int head) const { return {dout + stat(position, head) * dim, dim}; }
};

extern "C" __global__ void __launch_bounds__(THREADS)
    attn_causal_any(const bf16 *qkv, const uint4 *work, int kv_heads, int group, float scale, bf16 *out, float *lse, int dim) {
    pdl_wait();
    pdl_release();
    const int heads = kv_heads * group, head = blockIdx.x % heads;
    const uint4 item = work[blockIdx.x / heads];
    const SequenceRows at = {qkv, nullptr, (int)item.x, heads, kv_heads, dim};
    const int end = min(item.z + CAUSAL_ANY_TILE, item.y);
    for (int position = item.z + threadIdx.x / 32; position < end; position += WARPS) {
        // A warp takes a position: online softmax, a key at a time.
        const WarpVector q = at.query(position, head);
        WarpVector o;
        float m = NONE, l = 0.f;
        for (int key = 0; key <= position; key++) {
            const float s = q.dot(at.key(key, head / group)) * scale, max = fmaxf(m, s), decay = ex2(m - max), p = ex2(s - max);
            m = max, l = l * decay + p;
            o.scale(decay);
            o.add(p, at.value(key, head / group));
        }
        o.store(out + at.stat(position, head) * dim, dim, __fdividef(1.f, l));
        if (threadIdx.x % 32 == 0) lse[at.stat(position, head)] = (m + __log2f(l)) * LN_2;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    attn_causal_dq_any(const bf16 *qkv, const bf16 *dout, const float *lse, const float *delta, const uint4 *work, int kv_heads,
                       int group, float scale, bf16 *dqkv, int dim) {
    pdl_wait();
    pdl_release();
    const int heads = kv_heads * group, head = blockIdx.x % heads;
    const uint4 item = work[blockIdx.x / heads];
    const SequenceRows at = {qkv, dout, (int)item.x, heads, kv_heads, dim};
    const int end = min(item.z + CAUSAL_ANY_TILE, item.y);
    for (int position = item.z + threadIdx.x / 32; position < end; position += WARPS) {
        const WarpVector q = at.query(position, head), g = at.gradient(position, head);
        const float log_sum = lse[at.stat(position, head)] * LOG2_E, dot = delta[at.stat(position, head)];
        WarpVector dq;
        for (int key = 0; key <= position; key++) {
            const WarpVector k = at.key(key, head / group);
            dq.add(ex2(q.dot(k) * scale - log_sum) * (g.dot(at.value(key, head / group)) - dot), k);
        }
        dq.store(dqkv + at.offset(position, head), dim, scale * LN_2);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    attn_causal_dkv_any(const bf16 *qkv, const bf16 *dout, const float *lse, const float *delta, const uint4 *work, int kv_heads,
                        int group, float scale, bf16 *dqkv, int dim) {
    pdl_wait();
    pdl_release();
    const int heads = kv_heads * group, kv_head = blockIdx.x % kv_heads;
    const uint4 item = work[blockIdx.x / kv_heads];
    const SequenceRows at = {qkv, dout, (int)item.x, heads, kv_heads, dim};
    const int end = min(item.z + CAUSAL_ANY_TILE, item.y);
    for (int key = item.z + threadIdx.x / 32; key < end; key += WARPS) {
        const WarpVector k = at.key(key, kv_head), v = at.value(key, kv_head);
        WarpVector dk, dv;
        for (int position = key; position < item.y; position++) {
            for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
                const WarpVector q = at.query(position, head), g = at.gradient(position, head);
                const size_t stat = at.stat(position, head);
                const float p = ex2(q.dot(k) * scale - lse[stat] * LOG2_E);
                dv.add(p, g);
                dk.add(p * (g.dot(v) - delta[stat]), q);
            }
        }
        dk.store(dqkv + at.offset(key, heads + kv_head), dim, scale * LN_2);
        dv.store(dqkv + at.offset(key, heads + kv_heads + kv_head), dim, 1.f);
    }
}
