// Sampling tokens from rows of logits (launched from src/ops/sample/cuda.rs; src/ops/sample.rs defines the results, and
// src/engine/sampler.rs the order of the steps).
//
// logits: f32 [rows][vocab], vocab <= 2^19.
// A *segment* is 1024 ids of a row, walked by one warp: lane l takes ids 128 i + 4 l + {0..3} of it, i = 0..7. S is the number of segments
//   of a row.
// A *chunk* is one lane's part of a segment, 32 ids.
// A *candidate* is a u64 that packs a logit and its id, with the logit's order-preserving bits above and the inverted id below. Larger is
//   better (at equal logits the lower id), and no two of a row are equal.
//
//   sample_edit  (logits, vocab, tasks)                                grid [tasks], 512: bias, penalties and masks, in place
//   sample_max   (logits, vocab, partials, maxima)                     grid [S / 8 rounded up, rows], 256
//       partials u64 [rows][S]: each segment's best candidate, or ~0 if a logit is NaN or infinite
//       maxima f32 [rows][32 S]: each chunk's maximum; may be null
//   sample_best  (partials, vocab, rows, best)                         grid [rows / 8 rounded up], 256
//       best u32 [rows][2]: id and f32 bits of the largest logit; NaN if any logit is NaN or infinite
//   sample_sum   (logits, vocab, tasks, best, sums)                    grid [S / 8 rounded up, tasks], 256
//       sums f64 [tasks][2][S]: for each segment, the sum of exp(logit - max), and that of the draw's weights
//   sample_pick  (logits, vocab, tasks, best, maxima, sums, out, stride)  grid [tasks], 512
//       out u32 [tasks][stride]: id, rank, f32 bits of its logit, 0, f64 sum of exp(logit - max), then (id, f32 bits of the logit) of the
//       most likely tokens
//
// tasks: `Task` records, then the lists that they point to, in u32 words from the start of the buffer. No two tasks have the same row.
//
// Determinism. Weights are computed bit for bit like on the CPU. They are summed in f64, in an order fixed by the vocabulary, and all
// atomics are on integers. So a row's result depends on nothing but the row.
#include "common.cuh"

typedef unsigned long long u64;

constexpr int SEGMENT = SAMPLE_SEGMENT, MAX_SEGMENTS = SAMPLE_MAX_SEGMENTS, MAX_TOP = SAMPLE_MAX_TOP;
constexpr int THREADS = SAMPLE_THREADS, WARPS = THREADS / 32;
constexpr int POOL = 4096;  // candidates that can be sorted
constexpr int PER_THREAD = POOL / THREADS;  // candidates of a thread
constexpr int BINS = 256, COPIES = 8;  // of a histogram; lanes add to different copies
constexpr unsigned ALL = ~0u;
constexpr float FIXED = 17592186044416.0f;  // fixed-point unit, 2^44: 2^19 weights of 1 fit into 64 bits

constexpr int DRAW = 1, REPORT = 2;  // flags of a task

struct Task {
    double uniform;       // the random number of the draw, in [0, 1)
    int row;
    int flags;            // DRAW: draw, instead of taking the best token or `target`. REPORT: write rank, sum and `top`
    float temperature;
    float min_p;
    float top_p;
    int top_k;            // 0: no limit
    unsigned target;      // the id to report; ~0: the chosen one
    int top;              // the number of most likely tokens to report, at most MAX_TOP
    // Where the task's lists start: (id, f32 bits of the bias) sorted by id; (id, count), each id once; masked ids. `end`: of the last.
    int bias, seen, masked, end;
    float repetition, frequency, presence;
    int allowed;          // where a bit for each id starts, set if the token is allowed; 0: all are allowed
};

static_assert(sizeof(Task) == 4 * SAMPLE_TASK_WORDS, "as in Rust");

// Bits of a logit that compare like the logit.
__device__ __forceinline__ unsigned order_key(float x) {
    // Adding 0 turns -0 into 0, which it equals.
    unsigned bits = __float_as_uint(__fadd_rn(x, 0.0f));
    return bits ^ ((int)bits < 0 ? ~0u : 0x80000000u);
}

// The inverse of order_key.
__device__ __forceinline__ float key_logit(unsigned key) {
    return __uint_as_float(key ^ ((int)key < 0 ? 0x80000000u : ~0u));
}

__device__ __forceinline__ u64 candidate_of(unsigned key, unsigned id) { return (u64)key << 32 | (unsigned)~id; }

__device__ __forceinline__ unsigned candidate_id(u64 candidate) { return ~(unsigned)candidate; }

__device__ __forceinline__ float candidate_logit(u64 candidate) { return key_logit((unsigned)(candidate >> 32)); }

__device__ __forceinline__ int segments_of(int vocab) { return (vocab + SEGMENT - 1) / SEGMENT; }

// Calls f(logit, id) for this lane's chunk of a segment, ids ascending. LOADS: loads in flight.
template <int LOADS = 2, class F>
__device__ __forceinline__ void for_chunk(const float* x, int vocab, int segment, int lane, F f) {
    int first = segment * SEGMENT + 4 * lane;
    bool vectors = vocab % 4 == 0 && ((size_t)x & 15) == 0;
#pragma unroll 1
    for (int begin = 0; begin < SEGMENT / 128; begin += LOADS, first += 128 * LOADS) {
        float v[LOADS][4];
        if (vectors) {
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                int id = first + 128 * i;
                if (id < vocab) *(float4*)v[i] = *(const float4*)(x + id);
            }
        } else {
#pragma unroll
            for (int i = 0; i < 4 * LOADS; i++) {
                int id = first + 128 * (i / 4) + i % 4;
                if (id < vocab) v[i / 4][i % 4] = x[id];
            }
        }
#pragma unroll
        for (int i = 0; i < 4 * LOADS; i++) {
            int id = first + 128 * (i / 4) + i % 4;
            if (id < vocab) f(v[i / 4][i % 4], id);
        }
    }
}

// exp(x) for x <= 0, the same bits as `exp` of src/engine/sampler.rs: no fused multiply-adds.
__device__ __forceinline__ float exp_negative(float x) {
    float clamped = x < -87.0f ? -87.0f : x;
    float shifted = __fadd_rn(__fmul_rn(clamped, 1.44269504088896340736f), 12582912.0f);
    unsigned exponent = (__float_as_uint(shifted) << 23) + 0x3f800000u;
    float n = __fsub_rn(shifted, 12582912.0f);
    float r = __fadd_rn(__fsub_rn(clamped, __fmul_rn(n, 0.6933594f)), __fmul_rn(n, 2.1219444e-4f));
    float p = 1.9875691e-4f;
    p = __fadd_rn(__fmul_rn(p, r), 1.3981999e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 8.333452e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 4.1665796e-2f);
    p = __fadd_rn(__fmul_rn(p, r), 1.6666665e-1f);
    p = __fadd_rn(__fmul_rn(p, r), 0.5f);
    float e = __fadd_rn(__fadd_rn(__fmul_rn(__fmul_rn(p, r), r), r), 1.0f);
    return x < -87.0f ? 0.0f : __fmul_rn(e, __uint_as_float(exponent));
}

// The weight of a logit in a draw.
struct DrawWeight {
    float max, temperature, min_p;
    __device__ __forceinline__ float operator()(float logit) const {
        float w = exp_negative(__fdiv_rn(__fsub_rn(logit, max), temperature));
        return w < min_p ? 0.0f : w;
    }
};

// Inclusive prefix sum over lanes.
template <class T>
__device__ __forceinline__ T warp_scan(T v, int lane) {
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
        T below = __shfl_up_sync(ALL, v, o);
        if (lane >= o) v += below;
    }
    return v;
}

__device__ __forceinline__ double warp_sum_f64(double v) {
#pragma unroll
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(ALL, v, o);
    return v;
}

// Bias, then penalties, then masks.
extern "C" __global__ void __launch_bounds__(THREADS) sample_edit(float* logits, int vocab, const unsigned* words) {
    pdl_wait();
    pdl_release();
    const Task& task = ((const Task*)words)[blockIdx.x];
    if (task.bias == task.end && task.allowed == 0) return;
    float* x = logits + (size_t)task.row * vocab;
    // Biases. An id may have several: the thread of its first entry adds them all, in order.
    for (int i = task.bias + 2 * threadIdx.x; i < task.seen; i += 2 * THREADS) {
        unsigned id = words[i];
        if (id >= (unsigned)vocab || (i > task.bias && words[i - 2] == id)) continue;
        float v = x[id];
        for (int j = i; j < task.seen && words[j] == id; j += 2) v = __fadd_rn(v, __uint_as_float(words[j + 1]));
        x[id] = v;
    }
    __syncthreads();
    // Penalties.
    for (int i = task.seen + 2 * threadIdx.x; i < task.masked; i += 2 * THREADS) {
        unsigned id = words[i], count = words[i + 1];
        if (id >= (unsigned)vocab) continue;
        float v = x[id];
        v = v > 0.0f ? __fdiv_rn(v, task.repetition) : __fmul_rn(v, task.repetition);
        if (count) v = __fsub_rn(v, __fadd_rn(__fmul_rn(task.frequency, (float)count), task.presence));
        x[id] = v;
    }
    __syncthreads();
    // Masks.
    for (int i = task.masked + threadIdx.x; i < task.end; i += THREADS) {
        unsigned id = words[i];
        if (id < (unsigned)vocab) x[id] = -INFINITY;
    }
    if (task.allowed == 0) return;
    // A warp takes the ids of one word at a time.
    for (int id = threadIdx.x; id < vocab; id += THREADS) {
        if (!(words[task.allowed + id / 32] >> id % 32 & 1)) x[id] = -INFINITY;
    }
}

extern "C" __global__ void __launch_bounds__(256) sample_max(const float* logits, int vocab, u64* partials, float* maxima) {
    pdl_wait();
    pdl_release();
    int lane = threadIdx.x % 32, segment = blockIdx.x * 8 + threadIdx.x / 32, segments = segments_of(vocab);
    if (segment >= segments) return;
    float best = -INFINITY;
    unsigned at = 0;
    bool valid = true;
    for_chunk<8>(logits + (size_t)blockIdx.y * vocab, vocab, segment, lane, [&](float v, int id) {
        valid &= v < INFINITY;
        if (v > best) best = v, at = id;
    });
    // Reduce over the warp, and store.
    size_t out = (size_t)blockIdx.y * segments + segment;
    if (maxima) maxima[out * 32 + lane] = best;
    unsigned key = order_key(best), highest = __reduce_max_sync(ALL, key);
    unsigned id = __reduce_min_sync(ALL, key == highest ? at : ALL);
    valid = __all_sync(ALL, valid);
    if (lane == 0) partials[out] = valid ? candidate_of(highest, id) : ~0ull;
}

extern "C" __global__ void __launch_bounds__(256) sample_best(const u64* partials, int vocab, int rows, uint2* best) {
    pdl_wait();
    pdl_release();
    int lane = threadIdx.x % 32, row = blockIdx.x * 8 + threadIdx.x / 32, segments = segments_of(vocab);
    if (row >= rows) return;
    u64 top = 0;
    for (int i = lane; i < segments; i += 32) top = max(top, partials[(size_t)row * segments + i]);
#pragma unroll
    for (int o = 16; o; o >>= 1) top = max(top, (u64)__shfl_xor_sync(ALL, top, o));
    float value = top == ~0ull ? NAN : candidate_logit(top);
    if (lane == 0) best[row] = make_uint2(candidate_id(top), __float_as_uint(value));
}

extern "C" __global__ void __launch_bounds__(256)
    sample_sum(const float* logits, int vocab, const Task* tasks, const uint2* best, double* sums) {
    pdl_wait();
    pdl_release();
    int lane = threadIdx.x % 32, segment = blockIdx.x * 8 + threadIdx.x / 32, segments = segments_of(vocab);
    const Task& task = tasks[blockIdx.y];
    bool report = task.flags & REPORT;
    bool draw = (task.flags & DRAW) && task.top_k == 0;
    float max = __uint_as_float(best[task.row].y);
    if (segment >= segments || !(report || draw) || !(max > -INFINITY)) return;
    DrawWeight weigh = {max, task.temperature, task.min_p};
    double total = 0, weights = 0;
    for_chunk(logits + (size_t)task.row * vocab, vocab, segment, lane, [&](float v, int) {
        if (report) total += exp_negative(__fsub_rn(v, max));
        if (draw) weights += weigh(v);
    });
    total = warp_sum_f64(total);
    weights = warp_sum_f64(weights);
    if (lane == 0) {
        double* out = sums + (size_t)blockIdx.y * 2 * segments + segment;
        out[0] = total;
        out[segments] = weights;
    }
}

// The row of a thread block of sample_pick.
struct Pick {
    const float* x;       // logits
    const float* maxima;  // of chunks
    int vocab, segments, lane, warp, thread;
};

struct Shared {
    u64 pool[POOL];              // candidates; or low and high words of a histogram [BINS][COPIES]; or a segment's logits
    double sums[MAX_SEGMENTS];   // one for each segment
    double scan_f64[WARPS];
    u64 scan_u64[WARPS];
    u64 goal, amount;            // results of radix_select
    double kept;                 // a total that one thread shares with all
    unsigned prefix;
    int count, first, last, id;
};

// Calls f(logit, id) for the whole row, by all warps.
template <class F>
__device__ __forceinline__ void for_row(const Pick& p, F f) {
    for (int segment = p.warp; segment < p.segments; segment += WARPS) for_chunk(p.x, p.vocab, segment, p.lane, f);
}

// Inclusive prefix sum over threads; the last thread has the total. Ends with a barrier.
template <class T>
__device__ T block_scan(T v, T* warps, const Pick& p) {
    v = warp_scan(v, p.lane);
    if (p.lane == 31) warps[p.warp] = v;
    __syncthreads();
    T before = 0;
    for (int w = 0; w < p.warp; w++) before += warps[w];
    __syncthreads();
    return before + v;
}

// Sums f over each segment. Ends with a barrier.
template <class F>
__device__ void segment_sums(Shared& sh, const Pick& p, F f) {
    for (int segment = p.warp; segment < p.segments; segment += WARPS) {
        double sum = 0;
        for_chunk(p.x, p.vocab, segment, p.lane, [&](float v, int id) { sum += f(v, id); });
        sum = warp_sum_f64(sum);
        if (p.lane == 0) sh.sums[segment] = sum;
    }
    __syncthreads();
}

// Picks from a segment, whose logits are in shared memory: the first id where the running sum of f exceeds `left`, or the last id with a
// weight. By one warp, 128 ids at a time; the result is the same in all lanes.
template <class F>
__device__ __forceinline__ int pick_in_segment(const float* values, const Pick& p, int segment, double left, F f) {
    double before = 0;
    int chosen = 0;
    for (int i = 4 * p.lane; i < SEGMENT; i += 128) {
        int first = segment * SEGMENT + i;
        double w[4], sum = 0;
        for (int j = 0; j < 4; j++) sum += w[j] = first + j < p.vocab ? f(values[i + j], first + j) : 0;
        double reached = warp_scan(sum, p.lane);
        double running = before + (reached - sum);
        int found = -1, last = -1;  // of the lane's ids: the one to pick, and the last with a weight
        for (int j = 0; j < 4; j++) {
            if (!(w[j] > 0)) continue;
            running += w[j];
            last = first + j;
            if (found < 0 && running > left) found = last;
        }
        unsigned lanes = __ballot_sync(ALL, found >= 0);
        if (lanes) {
            chosen = __shfl_sync(ALL, found, __ffs(lanes) - 1);
            break;
        }
        chosen = max(chosen, __reduce_max_sync(ALL, last));
        before += __shfl_sync(ALL, reached, 31);
    }
    return chosen;
}

// Picks in the order of ids: the first id where the running sum of f exceeds `fraction` of the total, given segment_sums of f; or, where
// rounding leads past the end, the last id with a weight. Uses the pool. Ends with a barrier.
template <class F>
__device__ int pick_by_id(Shared& sh, const Pick& p, double fraction, F f) {
    // Find the segment. `own` is the sum of this thread's segment, `until` that of all segments up to it.
    double own = p.thread < p.segments ? sh.sums[p.thread] : 0;
    double until = block_scan(own, sh.scan_f64, p);
    if (p.thread == THREADS - 1) sh.kept = until;
    if (p.thread == 0) sh.first = INT_MAX, sh.last = 0;
    __syncthreads();
    double left = fraction * sh.kept;
    if (own > 0) {
        atomicMax(&sh.last, p.thread);
        if (until > left) atomicMin(&sh.first, p.thread);
    }
    __syncthreads();
    int segment = sh.first;
    bool past = segment == INT_MAX;
    if (past) segment = sh.last;
    if (p.thread == segment) sh.kept = past ? INFINITY : left - (until - own);
    // Load the segment's logits, and let one warp find the id.
    float* values = (float*)sh.pool;
    for (int i = p.thread; i < SEGMENT; i += THREADS) {
        int id = segment * SEGMENT + i;
        values[i] = id < p.vocab ? p.x[id] : 0;
    }
    __syncthreads();
    if (p.warp == 0) {
        int id = pick_in_segment(values, p, segment, sh.kept, f);
        if (p.lane == 0) sh.id = id;
    }
    __syncthreads();
    return sh.id;
}

// Radix selection. Of the logits that `visit` gives: the largest key such that the amounts of all keys from it up reach a goal, which is
// `goal`, or `fraction` of all amounts if that is not negative. Afterwards `sh.goal` is what remains to be taken of that key, and
// `sh.amount` the amount that it has. Takes eight bits at a time, by a histogram. Ends with a barrier.
template <class Visit, class Amount>
__device__ unsigned radix_select(Shared& sh, const Pick& p, Visit visit, Amount amount, u64 goal, double fraction) {
    unsigned* low = (unsigned*)sh.pool;
    unsigned* high = low + BINS * COPIES;
    unsigned prefix = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        // Build the histogram of the next eight bits, of keys that begin with the prefix.
        for (int i = p.thread; i < 2 * BINS * COPIES; i += THREADS) low[i] = 0;
        __syncthreads();
        visit([&](float v, int id) {
            unsigned key = order_key(v);
            if (shift < 24 && key >> (shift + 8) != prefix) return;
            u64 more = amount(v, id);
            if (more == 0) return;
            int at = (key >> shift) % BINS * COPIES + p.lane % COPIES;
            unsigned old = atomicAdd(low + at, (unsigned)more);
            unsigned carry = (unsigned)(more >> 32) + (old + (unsigned)more < old);
            if (carry) atomicAdd(high + at, carry);
        });
        __syncthreads();
        // Find the bin where the sum from the largest bin down reaches the goal: a bin a thread.
        u64 own = 0;
        int bin = BINS - 1 - p.thread;
        for (int i = 0; i < COPIES && bin >= 0; i++) own += low[bin * COPIES + i] | (u64)high[bin * COPIES + i] << 32;
        u64 until = block_scan(own, sh.scan_u64, p);
        if (shift == 24 && fraction >= 0) {
            if (p.thread == THREADS - 1) sh.goal = max(1ull, (u64)ceil(fraction * (double)until));
            __syncthreads();
            goal = sh.goal;
            __syncthreads();
        }
        if (until >= goal && until - own < goal) {
            sh.prefix = prefix << 8 | bin;
            sh.goal = goal - (until - own);
            sh.amount = own;
        }
        __syncthreads();
        prefix = sh.prefix;
        goal = sh.goal;
        __syncthreads();
    }
    return prefix;
}

// The last candidate that top_p (if `mass`) or else top_k keeps, of those that are `limit` or better. Ends with a barrier.
__device__ __noinline__ u64 lowest_kept(Shared& sh, const Pick& p, u64 limit, bool mass, int top_k, float top_p,
                                       DrawWeight weigh) {
    // Probability mass is summed in fixed point, because the order of integer sums does not matter.
    auto amount = [&](float v) { return mass ? (u64)(weigh(v) * FIXED) : 1ull; };
    auto row = [&](auto f) { for_row(p, f); };
    auto within = [&](float v, int id) { return candidate_of(order_key(v), id) >= limit ? amount(v) : 0ull; };
    unsigned key = radix_select(sh, p, row, within, top_k, mass ? top_p : -1.0);
    // Ties, all with this key, have the same amount: the lowest ids are kept.
    u64 one = amount(key_logit(key)), ties = sh.amount / one, take = (sh.goal + one - 1) / one;
    unsigned id = ALL;
    if (take < ties) {
        auto tie = [&](float v, int id) { return order_key(v) == key && candidate_of(key, id) >= limit ? 1.0 : 0.0; };
        segment_sums(sh, p, tie);
        id = pick_by_id(sh, p, ((double)take - 0.5) / (double)ties, tie);
    }
    return max(limit, candidate_of(key, id));
}

// Bitonic sort of the first `count` candidates of the pool, best first. Zeros, which are not candidates, pad to a power of two.
__device__ void sort_pool(Shared& sh, const Pick& p, int count) {
    int n = 2;
    while (n < count) n *= 2;
    for (int i = count + p.thread; i < n; i += THREADS) sh.pool[i] = 0;
    __syncthreads();
    // With strides up to 32 a warp stays in its own 64 elements, and needs no barrier of the thread block.
    bool wide = false;
    for (int size = 2; size <= n; size *= 2) {
        for (int stride = size / 2; stride; stride /= 2) {
            if (wide || stride > 32) __syncthreads();
            else __syncwarp();
            wide = stride > 32;
            for (int pair = p.thread; pair < n / 2; pair += THREADS) {
                int i = 2 * pair - (pair & (stride - 1)), j = i + stride;
                u64 a = sh.pool[i], b = sh.pool[j];
                if ((a < b) == ((i & size) == 0)) sh.pool[i] = b, sh.pool[j] = a;
            }
        }
    }
    __syncthreads();
}

// Fills the pool with at least the k best candidates of the row (k <= MAX_TOP, k <= vocab), best first. Returns how many there are.
__device__ int gather(Shared& sh, const Pick& p, int k) {
    auto one = [](float, int) { return 1ull; };
    int chunks = 32 * p.segments;
    // Find a floor: the k-th largest of the chunks' maxima. At least k logits reach it, so the k best all do.
    unsigned floor = 0;
    if (k <= chunks) {
        auto visit = [&](auto f) {
            for (int i = p.thread; i < chunks; i += THREADS) f(p.maxima[i], i);
        };
        floor = radix_select(sh, p, visit, one, k, -1.0);
    }
    // Collect all logits that reach it.
    if (p.thread == 0) sh.count = 0;
    __syncthreads();
    auto add = [&](float v, int id) {
        int at = atomicAdd(&sh.count, 1);
        if (at < POOL) sh.pool[at] = candidate_of(order_key(v), id);
    };
    for (int i = p.thread; i < chunks; i += THREADS) {
        if (order_key(p.maxima[i]) < floor) continue;
        for_chunk(p.x, p.vocab, i / 32, i % 32, [&](float v, int id) {
            if (order_key(v) >= floor) add(v, id);
        });
    }
    __syncthreads();
    int count = sh.count;
    // If the pool overflowed, collect exactly the k best.
    if (count > POOL) {
        u64 limit = lowest_kept(sh, p, 0, false, k, 1.0f, DrawWeight());
        if (p.thread == 0) sh.count = 0;
        __syncthreads();
        for_row(p, [&](float v, int id) {
            if (candidate_of(order_key(v), id) >= limit) add(v, id);
        });
        count = k;
    }
    sort_pool(sh, p, count);
    return count;
}

// Draws from the first `count` candidates of the sorted pool, cut where their weights reach `top_p` of `total` (of their own total if that
// is negative). Returns -1 if they do not reach it and there are `more` candidates outside the pool.
__device__ __noinline__ int pick_sorted(Shared& sh, const Pick& p, int count, bool more, const Task& task, double total,
                                        DrawWeight weigh) {
    // Weights of the thread's candidates.
    double w[PER_THREAD], own = 0;
    for (int j = 0; j < PER_THREAD; j++) {
        int i = p.thread * PER_THREAD + j;
        w[j] = i < count ? weigh(candidate_logit(sh.pool[i])) : 0;
        own += w[j];
    }
    double until = block_scan(own, sh.scan_f64, p), before = until - own;
    if (p.thread == THREADS - 1) sh.kept = until;
    if (p.thread == 0) sh.first = INT_MAX, sh.last = 0;
    __syncthreads();
    // Cut: the first candidate where the running sum reaches top_p.
    double goal = task.top_p * (total < 0 ? sh.kept : total), reached = before;
    for (int j = 0; j < PER_THREAD; j++) {
        int i = p.thread * PER_THREAD + j;
        reached += w[j];
        if (i < count && reached >= goal) {
            atomicMin(&sh.first, i);
            break;
        }
    }
    __syncthreads();
    int cut = sh.first;
    if (cut == INT_MAX && more) return -1;
    cut = min(cut, count - 1);
    reached = before;
    for (int j = 0; j < PER_THREAD; j++) {
        reached += w[j];
        if (p.thread * PER_THREAD + j == cut) sh.kept = reached;
    }
    __syncthreads();
    // Draw: the first candidate up to the cut where the running sum exceeds the random share of what is kept.
    if (p.thread == 0) sh.first = INT_MAX;
    double left = task.uniform * sh.kept;
    __syncthreads();
    reached = before;
    for (int j = 0; j < PER_THREAD; j++) {
        int i = p.thread * PER_THREAD + j;
        reached += w[j];
        if (i > cut || !(w[j] > 0)) continue;
        atomicMax(&sh.last, i);
        if (reached > left) atomicMin(&sh.first, i);
    }
    __syncthreads();
    return candidate_id(sh.pool[min(sh.first, sh.last)]);
}

// Draws a token. `limit`: the last candidate that top_k keeps, if top_k is more than MAX_TOP. The pool holds the best `count` candidates
// if top_k or top_p needs them. `weights`: the sums of all weights by segment.
__device__ int draw(Shared& sh, const Pick& p, const Task& task, float max, u64 limit, int count, const double* weights) {
    DrawWeight weigh = {max, task.temperature, task.min_p};
    // A small top_k: all kept candidates are in the pool.
    if (task.top_k > 0 && task.top_k <= MAX_TOP) return pick_sorted(sh, p, task.top_k, false, task, -1.0, weigh);
    auto kept = [&](float v, int id) { return candidate_of(order_key(v), id) >= limit ? (double)weigh(v) : 0.0; };
    // Sums of the weights that top_k keeps.
    if (task.top_k > 0) {
        segment_sums(sh, p, kept);
    } else {
        for (int i = p.thread; i < p.segments; i += THREADS) sh.sums[i] = weights[i];
        __syncthreads();
    }
    // top_p: from the pool if its candidates reach that mass, else find the last candidate and draw by id.
    if (task.top_p < 1.0f) {
        double until = block_scan(p.thread < p.segments ? sh.sums[p.thread] : 0.0, sh.scan_f64, p);
        if (p.thread == THREADS - 1) sh.kept = until;
        __syncthreads();
        double total = sh.kept;
        __syncthreads();
        int all = task.top_k > 0 ? task.top_k : p.vocab;
        int id = pick_sorted(sh, p, min(count, all), count < all, task, total, weigh);
        if (id >= 0) return id;
        limit = lowest_kept(sh, p, limit, true, 0, task.top_p, weigh);
        segment_sums(sh, p, kept);
    }
    return pick_by_id(sh, p, task.uniform, kept);
}

// Writes the rank and logit of token `id`, and the sum of exponentials.
__device__ __forceinline__ void write_report(Shared& sh, const Pick& p, unsigned id, float max, const double* sums, unsigned* out) {
    float own = p.x[id];
    __syncthreads();
    if (p.thread == 0) sh.count = 0;
    __syncthreads();
    if (own < max) {
        unsigned larger = 0;
        for_row(p, [&](float v, int) { larger += v > own; });
        larger = __reduce_add_sync(ALL, larger);
        if (p.lane == 0) atomicAdd(&sh.count, (int)larger);
    }
    double total = block_scan(p.thread < p.segments ? sums[p.thread] : 0.0, sh.scan_f64, p);
    if (p.thread == THREADS - 1) {
        out[1] = 1 + sh.count;
        out[2] = __float_as_uint(own);
        out[3] = 0;
        *(double*)(out + 4) = total;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    sample_pick(const float* logits, int vocab, const Task* tasks, const uint2* best, const float* maxima, const double* sums,
                unsigned* out, int stride) {
    __shared__ Shared sh;
    pdl_wait();
    pdl_release();
    const Task& task = tasks[blockIdx.x];
    uint2 most = best[task.row];
    float max = __uint_as_float(most.y);
    if (task.flags == 0 || !(max > -INFINITY)) return;
    int segments = segments_of(vocab), thread = threadIdx.x;
    Pick p = {logits + (size_t)task.row * vocab, maxima + (size_t)task.row * segments * 32, vocab, segments, thread % 32,
              thread / 32, thread};
    sums += (size_t)blockIdx.x * 2 * segments;
    out += (size_t)blockIdx.x * stride;
    bool drawn = task.flags & DRAW, report = task.flags & REPORT;

    // Gather the best candidates, as many as the draw and the report need.
    u64 limit = 0;
    int asked = 0;
    if (drawn && task.top_k > MAX_TOP) limit = lowest_kept(sh, p, 0, false, task.top_k, 1.0f, DrawWeight());
    if (drawn && task.top_k > 0 && task.top_k <= MAX_TOP) asked = task.top_k;
    else if (drawn && task.top_p < 1.0f) asked = min(MAX_TOP, vocab);
    if (report) asked = asked > task.top ? asked : task.top;
    int count = asked > 0 ? gather(sh, p, asked) : 0;
    // Report the most likely tokens, before the draw uses the pool for something else.
    if (report) {
        for (int i = thread; i < task.top; i += THREADS) {
            out[6 + 2 * i] = candidate_id(sh.pool[i]);
            out[7 + 2 * i] = __float_as_uint(candidate_logit(sh.pool[i]));
        }
        __syncthreads();
    }
    // Choose.
    unsigned id = task.target != ~0u ? task.target : most.x;
    if (drawn) id = draw(sh, p, task, max, limit, count, sums + segments);
    if (thread == 0) out[0] = id;
    if (report) write_report(sh, p, id, max, sums, out);
}
