// What the attention kernels share: a tile of query rows on tensor cores.
#pragma once

#include "warpgroup.cuh"

constexpr int WARPS = 4;  // of all attention kernels
constexpr int THREADS = 32 * WARPS;
constexpr float NONE = -INFINITY, LN_2 = 0.69314718f, LOG2_E = 1.44269504f;

__device__ __forceinline__ float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

constexpr int TILE_ROWS = 128;  // query rows of a block: positions, and within one the heads of a group
constexpr int TILE_KEYS = 64;   // keys and values of a stage in shared memory

// Attention of `rows` query rows, the first of which are those of token `row0` at `position` of its sequence, to the keys up to
// their own positions. `keys.load(to, t, count)` starts the copies of keys and then values 64 t to 64 t + 63, zeros from `count` on.
// lse may be null.
template <int DIM, class Keys>
__device__ __forceinline__ void attend_tile(const bf16 *qkv, int row0, int position, int rows, const Keys &keys, int kv_heads,
                                            int kv_head, int group, float scale, bf16 *out, float *lse) {
    constexpr int CHUNKS = DIM / 8, TILES = TILE_KEYS / 8;
    constexpr int QUERY_BYTES = panels_bytes<DIM, TILE_ROWS>, KEY_BYTES = panels_bytes<DIM, TILE_KEYS>;
    // Queries, then two stages of keys and values.
    extern __shared__ __align__(1024) uint8_t shared[];
    const uint32_t queries_at = shared_address(shared), stages_at = queries_at + QUERY_BYTES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, heads = kv_heads * group;
    const int count = position + rows / group;

    keys.load(stages_at, 0, count);
#pragma unroll 4
    for (int i = 0; i < TILE_ROWS * CHUNKS / THREADS; i++) {
        const int chunk = threadIdx.x + THREADS * i, row = chunk / CHUNKS, live = row < rows;
        const int from_row = live ? row : 0, token = row0 + from_row / group, head = kv_head * group + from_row % group;
        const bf16 *from = qkv + ((size_t)token * (heads + 2 * kv_heads) + head) * DIM + 8 * (chunk % CHUNKS);
        cp_async16(queries_at + place_panel<TILE_ROWS>(row, chunk % CHUNKS), from, live);
    }
    cp_commit();

    // Of two 64 rows each: those of the lane are number 0 and 1, and 2 and 3.
    float o[2][DIM / 8][4] = {}, m[4] = {NONE, NONE, NONE, NONE}, l[4] = {};
    auto softmax = [&](float (&s)[TILES][4], int half, int t) {
        // Rows are numbered from position 0 on: a key sees those from its own position's on.
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
            for (int d = 0; d < DIM / 8; d++) o[half][d][c] *= decay, o[half][d][c + 1] *= decay;
        }
    };
    const int tiles = (count + TILE_KEYS - 1) / TILE_KEYS;
    for (int t = 0; t < tiles; t++) {
        cp_wait<0>();
        publish_copies();
        __syncthreads();
        if (t + 1 < tiles) {
            keys.load(stages_at + (t + 1) % 2 * 2 * KEY_BYTES, t + 1, count);
            cp_commit();
        }
        const uint32_t keys_at = stages_at + t % 2 * 2 * KEY_BYTES, values_at = keys_at + KEY_BYTES;
        float s[2][TILES][4];
        start_products<DIM, TILE_ROWS>(s[0], queries_at, keys_at);
        start_products<DIM, TILE_ROWS>(s[1], queries_at + 64 * PANEL_ROW, keys_at);
        finish<1>(s[0]);
        softmax(s[0], 0, t);
        start_accumulate<DIM>(o[0], s[0], values_at);
        finish<1>(s[1]);
        softmax(s[1], 1, t);
        start_accumulate<DIM>(o[1], s[1], values_at);
        finish<0>(o[0]);
        finish<0>(o[1]);
    }

    // Through the place of the queries, so that 16 bytes are written at once; a warp reads what it has written.
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; half++) {
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
