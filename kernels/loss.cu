// Cross-entropy over a chunk of rows of logits, and copies of rows to and from chunks (launched from src/ops/loss/cuda.rs).
//
//   copy_rows_16 / _2 (from, to, rows u32 [count], pieces, scatter)
//     Copies `count` rows of `pieces` pieces of 16 (2) bytes. Gather: row i of `to` becomes row rows[i] of `from`. Scatter: row rows[i] of
//     `to` becomes row i of `from`. Grid: count, 256 threads.
//   cross_entropy_4 / _1 (logits f32 [count, vocab], targets, vocab, gradient, results)
//     targets u32 [count]{row, id, scale as f32 bits, 0}.
//     results [count]{nll f32, correct u32}: -log softmax of the target's id, and whether that id is the first of the largest logits.
//     gradient: if not 0, the first half of each row of logits becomes (softmax - one-hot) scale in bf16. The row stride stays that of
//     logits, 2 vocab bf16 values.
//     One thread block of 1024 threads per row. _4: vocab is a multiple of 4.
//
// The sums over a row have an order fixed by vocab.

#include "common.cuh"

// Piece: uint4 or bf16.
template <class Piece>
__device__ __forceinline__ void copy_rows(const Piece *from, Piece *to, const uint32_t *rows, int pieces, int scatter) {
    pdl_wait();
    pdl_release();
    const size_t packed = blockIdx.x, indexed = rows[blockIdx.x];
    from += (scatter ? packed : indexed) * pieces, to += (scatter ? indexed : packed) * pieces;
    for (int i = threadIdx.x; i < pieces; i += 256) to[i] = from[i];
}

extern "C" __global__ void __launch_bounds__(256)
    copy_rows_16(const uint4 *from, uint4 *to, const uint32_t *rows, int pieces, int scatter) {
    copy_rows(from, to, rows, pieces, scatter);
}
extern "C" __global__ void __launch_bounds__(256)
    copy_rows_2(const bf16 *from, bf16 *to, const uint32_t *rows, int pieces, int scatter) {
    copy_rows(from, to, rows, pieces, scatter);
}

constexpr int THREADS = LOSS_THREADS;
constexpr float LOG2_E = 1.44269504f;

// Softmax statistics of a part of a row: its maximum, the first id that has it, and the sum of exp(x - maximum).
struct SoftmaxStats {
    float max, sum;
    int id;

    // Merges the statistics of two parts.
    __device__ __forceinline__ void merge(const SoftmaxStats &other) {
        const float top = fmaxf(max, other.max);
        sum = sum * weight(max, top) + other.sum * weight(other.max, top);
        if (other.max > max || other.max == max && other.id < id) id = other.id;
        max = top;
    }

    static __device__ __forceinline__ float weight(float max, float top) { return max == top ? 1.f : exp2f((max - top) * LOG2_E); }

    __device__ __forceinline__ SoftmaxStats from(int lanes) const {
        return {__shfl_xor_sync(~0u, max, lanes), __shfl_xor_sync(~0u, sum, lanes), __shfl_xor_sync(~0u, id, lanes)};
    }
};

// VALUES: values of a load, 4 or 1.
template <int VALUES>
__device__ __forceinline__ void cross_entropy(float *logits, const uint4 *targets, int vocab, int gradient, float2 *results) {
    float *row = logits + (size_t)blockIdx.x * vocab;
    pdl_wait();
    pdl_release();
    const uint4 target = targets[blockIdx.x];
    const int id = target.y;
    const float scale = __uint_as_float(target.z);
    const auto load = [&](float (&x)[VALUES], int i) {
        if constexpr (VALUES == 4) *(float4 *)x = *(const float4 *)(row + i);
        else x[0] = row[i];
    };
    // Online softmax of the thread's values.
    SoftmaxStats all = {-INFINITY, 0.f, 0};
    for (int i = VALUES * threadIdx.x; i < vocab; i += VALUES * THREADS) {
        __align__(16) float x[VALUES];
        load(x, i);
        float top = all.max;
#pragma unroll
        for (int v = 0; v < VALUES; v++) {
            if (x[v] > top) top = x[v], all.id = i + v;
        }
        if (top > all.max) all.sum *= exp2f((all.max - top) * LOG2_E), all.max = top;
#pragma unroll
        for (int v = 0; v < VALUES; v++) all.sum += exp2f((x[v] - all.max) * LOG2_E);
    }
    // Reduce over the warp, then over the thread block.
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) all.merge(all.from(lanes));
    __shared__ SoftmaxStats parts[THREADS / 32];
    __shared__ float chosen;
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = all;
    if (threadIdx.x == 0) chosen = row[id];
    __syncthreads();
    all = parts[threadIdx.x % 32];
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) all.merge(all.from(lanes));
    if (threadIdx.x == 0)
        results[blockIdx.x] = make_float2(all.max - chosen + logf(all.sum), __uint_as_float(all.id == id));
    if (!gradient) return;
    // Gradient. It overwrites logits in place: a gradient lies where the thread block has read all logits already.
    const float factor = scale / all.sum;
    bf16 *to = (bf16 *)row;
    for (int first = 0; first < vocab; first += VALUES * THREADS) {
        const int i = first + VALUES * threadIdx.x;
        __align__(16) float x[VALUES];
        if (i < vocab) load(x, i);
        __syncthreads();
        if (i < vocab) {
#pragma unroll
            for (int v = 0; v < VALUES; v++) x[v] = exp2f((x[v] - all.max) * LOG2_E) * factor - (i + v == id ? scale : 0.f);
            if constexpr (VALUES == 4) {
                const bf162 lo = __floats2bfloat162_rn(x[0], x[1]), hi = __floats2bfloat162_rn(x[2], x[3]);
                *(uint2 *)(to + i) = make_uint2(*(const uint32_t *)&lo, *(const uint32_t *)&hi);
            } else {
                to[i] = __float2bfloat16_rn(x[0]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    cross_entropy_4(float *logits, const uint4 *targets, int vocab, int gradient, float2 *results) {
    cross_entropy<4>(logits, targets, vocab, gradient, results);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    cross_entropy_1(float *logits, const uint4 *targets, int vocab, int gradient, float2 *results) {
    cross_entropy<1>(logits, targets, vocab, gradient, results);
}
