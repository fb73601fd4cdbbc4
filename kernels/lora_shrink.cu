// h = weight · scale · x·Aᵀ (lora_shrink_*). Contract: `lora.cuh`.

#include "lora.cuh"

// Finds which of `n` terms a unit belongs to, given starts [n + 1] (ascending; the last one is the end of the last term). `begin` and `end`
// become those of the term. Called by whole warps.
__device__ __forceinline__ uint32_t find(const uint32_t* starts, uint32_t n, uint32_t unit, uint32_t& begin, uint32_t& end) {
    const uint32_t lane = threadIdx.x % 32;
    uint32_t first = 0;
    // Narrow down by a factor of 32 at a time.
    while (n > 31) {
        const uint32_t step = (n + 31) / 32, at = lane * step;
        const bool below = at < n && starts[first + at] <= unit;
        const uint32_t skip = (31 - __clz(__ballot_sync(~0u, below))) * step;
        first += skip;
        n = min(step, n - skip);
    }
    const uint32_t start = lane <= n ? starts[first + lane] : ~0u;
    const uint32_t last = 31 - __clz(__ballot_sync(~0u, lane < n && start <= unit));
    begin = __shfl_sync(~0u, start, last);
    end = __shfl_sync(~0u, start, last + 1);
    return first + last;
}

// Iterates over the items of a thread block. An item is ROWS rows and 16 ranks of a term and, in lists with split planes, one split of k.
template <int ROWS>
struct ShrinkItems {
    const uint32_t* const work;
    const SlotEntry* const table;
    const List list;
    const uint32_t* const starts;
    const int entries, entry, splits;
    uint32_t item, to;
    Term term;
    SlotEntry weights;
    uint32_t begin = 0, end = 0, tiles = 1, ranks = 0;  // the term's units, its tiles of 16 ranks, its ranks
    uint32_t first_row, first_rank;
    int split, last_split;

    __device__ __forceinline__ ShrinkItems(const uint32_t* work, const SlotEntry* table, const List& list, uint32_t units, int entries,
                                           int entry, int splits, int kind)
        : work(work), table(table), list(list), starts(work + list.starts_at + kind * (list.terms + 1)), entries(entries),
          entry(entry), splits(splits) {
        own_items(units * (list.split_planes ? splits : 1), item, to);
        item--;
    }

    // Advances to the next item; false if there is none.
    __device__ __forceinline__ bool next() {
        const uint32_t each = list.split_planes ? splits : 1;
        while (++item < to) {
            const uint32_t unit = item / each;
            if (unit >= end) {
                const uint32_t i = find(starts, list.terms, unit, begin, end);
                term = load_record<Term>(work + list.term_at + i * (sizeof(Term) / 4));
                weights = load_record<SlotEntry>(table + size_t(term.slot) * entries + entry);
                tiles = (end - begin) / ((term.rows + ROWS - 1) / ROWS);
                ranks = weights.ranks[0] + weights.ranks[1] + weights.ranks[2];
            }
            first_row = (unit - begin) / tiles * ROWS, first_rank = (unit - begin) % tiles * 16;
            split = list.split_planes ? item % each : 0, last_split = list.split_planes ? split + 1 : splits;
            if (first_rank < ranks) return true;  // Units are counted for the layer of the highest rank.
        }
        item = to;
        return false;
    }
};

// Byte offset of a 16-byte chunk of a row of A in a stage, with rows of WIDTH inputs: the same chunk of eight rows lies in different banks.
template <int WIDTH> __device__ __forceinline__ int place(int row, int chunk) {
    return row * WIDTH * 2 + (chunk ^ (WIDTH == 64 ? row % 2 * 4 : 0)) * 16;
}

// c += A·xᵀ for a step, A in shared memory.
template <int BLOCKS, int NT>
__device__ __forceinline__ void multiply(float (&c)[NT][4], const unsigned char* a, const uint4 (&v)[BLOCKS][NT], int rows, int g, int t) {
    constexpr int WIDTH = 32 * BLOCKS;
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) {
        const uint4 low = *reinterpret_cast<const uint4*>(&a[place<WIDTH>(g, 4 * i + t)]);
        const uint4 high = *reinterpret_cast<const uint4*>(&a[place<WIDTH>(g + 8, 4 * i + t)]);
#pragma unroll
        for (int n = 0; n < NT; n++) {
            if (8 * n >= rows) break;
            mma_m16n8k16(c[n], low.x, high.x, low.y, high.y, v[i][n].x, v[i][n].y);
            mma_m16n8k16(c[n], low.z, high.z, low.w, high.w, v[i][n].z, v[i][n].w);
        }
    }
}

// h for items of 8·NT rows. Ranks are the 16 rows of a tensor core tile, so that one row of x needs no more bytes of A than eight. Both
// operands permute k alike: lane l holds inputs 8(l%4)..+8 of every 32, which are sixteen contiguous bytes of row-major A and x. Each warp
// takes a quarter of a split of k; its part of A comes through a pipeline in shared memory, which runs on across items.
//
// PDL. This kernel runs at the same time as the gemm kernel before it, on SMs that the gemm leaves free. A gemm releases the next kernel
// only once all kernels before itself have ended, so x is complete (and in L2, from where it is read), and no kernel reads h any more. The
// kernel after this one waits for both, because this one waits for the gemm at its end.
//
// NT: rows of an item in units of 8, 1 (small) or 8 (large).
template <int NT>
__device__ __forceinline__ void shrink(const uint32_t* work, const SlotEntry* table, const bf16* x, int entries, int entry,
                                       int k, int splits, int width, int kind) {
    constexpr int ROWS = 8 * NT, BLOCKS = NT > 1 ? 1 : 2, WIDTH = 32 * BLOCKS;  // inputs of a step: BLOCKS of 32
    __shared__ float part[WARPS][16][ROWS + 8];
    __shared__ __align__(128) unsigned char stages[WARPS][STAGES][16 * WIDTH * 2];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int own_rank = threadIdx.x % 16, own_row = threadIdx.x / 16;
    pdl_release();
    const List list = load_list(work, NT > 1);
    const uint32_t units = reinterpret_cast<const List*>(work)[NT > 1].units[kind];
    ShrinkItems<ROWS> items(work, table, list, units, entries, entry, splits, kind);

    // The warp's part of a split.
    auto from = [&](int split) { return split * width + warp * (width / WARPS); };
    auto until = [&](int split) { return min(from(split) + width / WARPS, k); };

    // Producer: `start` loads the next step of A into a stage. It runs ahead, at input `at_ahead` of item `ahead`.
    ShrinkItems<ROWS> ahead = items;
    bool more = ahead.next();
    int at_ahead = more ? from(ahead.split) : 0;
    auto start = [&](int stage) {
        while (more && at_ahead >= until(ahead.split)) {
            if (++ahead.split == ahead.last_split) more = ahead.next();
            at_ahead = from(ahead.split);
        }
        if (more) {
            const int stop = until(ahead.split);
            const bf16* const a = reinterpret_cast<const bf16*>(ahead.weights.base) + size_t(ahead.first_rank) * k + at_ahead;
#pragma unroll
            for (int i = 0; i < 2 * BLOCKS; i++) {
                const int row = (lane + 32 * i) / (4 * BLOCKS), chunk = (lane + 32 * i) % (4 * BLOCKS);
                const bool live = at_ahead + 8 * chunk < stop && (row < 8 || ahead.first_rank + 8 < ahead.ranks);
                cp_async16(shared_address(&stages[warp][stage][place<WIDTH>(row, chunk)]), live ? a + size_t(row) * k + 8 * chunk : a,
                           live);
            }
            at_ahead += WIDTH;
        }
        cp_commit();
    };
    for (int i = 0; i < STAGES - 1; i++) start(i);

    int stage = 0;
    while (items.next()) {
        const int rows = min(items.term.rows - items.first_row, ROWS);
        const bf16* const b = x + size_t(items.term.row + items.first_row + g) * k + 8 * t;
        // For the reduction, a thread has one rank, and every eighth row.
        const uint32_t rank = items.first_rank + own_rank, r0 = items.weights.ranks[0], r1 = items.weights.ranks[1];
        const float scale =
            items.term.weight * (rank < r0 ? items.weights.scales[0] : rank < r0 + r1 ? items.weights.scales[1] : items.weights.scales[2]);
        float* const h = h_values(work) + (list.split_planes ? size_t(items.split) * list.plane : 0) + items.term.h_offset + rank;
        float sum[NT] = {};
        for (int split = items.split; split < items.last_split; split++) {
            // Compute the warp's part of the split.
            const int stop = until(split);
            float c[NT][4] = {};
            for (int at = from(split); at < stop; at += WIDTH) {
                // Load x, zeros past the rows and the part; wait for A; multiply; load a later step of A into the previous stage.
                uint4 v[BLOCKS][NT];
#pragma unroll
                for (int i = 0; i < BLOCKS; i++)
#pragma unroll
                    for (int n = 0; n < NT; n++) {
                        v[i][n] = make_uint4(0, 0, 0, 0);
                        if (8 * n + g < rows && at + 32 * i + 8 * t < stop)
                            v[i][n] = __ldcg(reinterpret_cast<const uint4*>(b + size_t(8 * n) * k + at + 32 * i));
                    }
                cp_wait<STAGES - 2>();
                __syncwarp();
                multiply<BLOCKS, NT>(c, stages[warp][stage], v, rows, g, t);
                start((stage + STAGES - 1) % STAGES);
                stage = (stage + 1) % STAGES;
            }
            // Reduce over the warps, in order.
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
                // No fused multiply-add: split planes are rounded before they are summed.
                sum[n] = __fadd_rn(sum[n], __fmul_rn(v, scale));
            }
            __syncthreads();
        }
        // Store.
        if (rank >= items.ranks) continue;
#pragma unroll
        for (int n = 0; n < NT; n++)
            if (8 * n + own_row < rows) h[size_t(items.first_row + 8 * n + own_row) * items.term.h_stride] = sum[n];
    }
    pdl_wait();
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, LORA_SMALL_BLOCKS_PER_SM)
    lora_shrink_small(const uint32_t* work, const SlotEntry* table, const bf16* x, int entries, int entry, int k, int splits,
                      int width, int kind) {
    shrink<SHRINK_SMALL_ROWS / 8>(work, table, x, entries, entry, k, splits, width, kind);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, LORA_LARGE_BLOCKS_PER_SM)
    lora_shrink_large(const uint32_t* work, const SlotEntry* table, const bf16* x, int entries, int entry, int k, int splits,
                      int width, int kind) {
    shrink<SHRINK_LARGE_ROWS / 8>(work, table, x, entries, entry, k, splits, width, kind);
}
