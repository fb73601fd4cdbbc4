// Choosing tokens from rows of logits (src/ops/sample.rs says what, src/engine/sampler.rs in which order).
//
// logits: f32 [rows][vocab], vocab <= 2^19. A *segment* is 1024 ids in a row, walked by one warp: lane l takes ids
// 128 i + 4 l + {0..3} of it, i = 0..7. A *chunk* is what one lane has of a segment, 32 ids. S = segments of a row.
// A *place* is a u64 that orders a row: the logit above, the inverted id below, so larger is better and no two are equal.
//
//   sample_edit  (logits, vocab, tasks)                                grid [tasks], 512: bias, penalties, masks, in place
//   sample_max   (logits, vocab, partials, maxima)                     grid [S / 8 up, rows], 256
//       partials u64 [rows][S]: the best place, ~0 where a logit is NaN or infinite
//       maxima f32 [rows][32 S]: of every chunk; null: not wanted
//   sample_best  (partials, vocab, rows, best)                         grid [rows / 8 up], 256
//       best u32 [rows][2]: id and f32 bits of the largest logit; NaN where one is NaN or infinite
//   sample_sum   (logits, vocab, tasks, best, sums)                    grid [S / 8 up, tasks], 256
//       sums f64 [tasks][2][S]: of exp(logit - max), and of the weights of a draw
//   sample_pick  (logits, vocab, tasks, best, maxima, sums, out, stride)  grid [tasks], 512
//       out u32 [tasks][stride]: id, rank, f32 bits of its logit, 0, f64 sum of exp(logit - max), then (id, f32 bits of
//       the logit) of the most likely ones
//
// tasks: records of `Task`, then the lists they point to, in u32 words from the start of the buffer.
// No two tasks have the same row. Weights are computed as the CPU does, bit by bit; they are summed in f64, in an
// order fixed by the vocabulary; all atomics are on integers. So a row's result depends on nothing but the row.
#include "common.cuh"

typedef unsigned long long u64;

constexpr int SEGMENT = 1024;
constexpr int MAX_SEGMENTS = 512;
constexpr int THREADS = 512;       // of sample_edit and sample_pick
constexpr int WARPS = THREADS / 32;
constexpr int SMALL = 1024;        // the most that is asked best first
constexpr int CANDIDATES = 4096;   // the most that is sorted
constexpr int EACH = CANDIDATES / THREADS;
constexpr int BINS = 256, COPIES = 8;
constexpr unsigned ALL = ~0u;
constexpr float FIXED = 17592186044416.0f;  // 2^44: 2^19 weights of 1 fit into 64 bits

constexpr int DRAW = 1, REPORT = 2;

struct Task {
    double uniform;       // decides the draw
    int row;
    int flags;            // DRAW: not the best or `target`; REPORT: rank, sum and `top`
    float temperature;
    float min_p;
    float top_p;
    int top_k;            // 0: all
    unsigned target;      // the id to report; ~0: the one chosen
    int top;              // <= SMALL
    int bias, seen, masked, end;  // starts of (id, f32 bits) sorted by id, (id, count) each id once, id
    float repetition, frequency, presence;
    int unused;
};

__device__ __forceinline__ unsigned order_key(float x) {
    // Adding 0 makes -0 the 0 that it equals.
    unsigned bits = __float_as_uint(__fadd_rn(x, 0.0f));
    return bits ^ ((int)bits < 0 ? ~0u : 0x80000000u);
}

__device__ __forceinline__ float key_value(unsigned key) {
    return __uint_as_float(key ^ ((int)key < 0 ? 0x80000000u : ~0u));
}

__device__ __forceinline__ u64 place_of(unsigned key, unsigned id) { return (u64)key << 32 | (unsigned)~id; }

__device__ __forceinline__ unsigned place_id(u64 place) { return ~(unsigned)place; }

__device__ __forceinline__ float place_value(u64 place) { return key_value((unsigned)(place >> 32)); }

__device__ __forceinline__ int segments_of(int vocab) { return (vocab + SEGMENT - 1) / SEGMENT; }

// f(logit, id) for what this lane has of a segment, ids ascending, with LOADS loads in flight.
template <int LOADS = 2, class F>
__device__ __forceinline__ void each(const float* x, int vocab, int segment, int lane, F f) {
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

// e to the x for x <= 0: `exp` of src/engine/sampler.rs, without contractions.
__device__ __forceinline__ float exp_below(float x) {
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
struct Weigh {
    float max, temperature, min_p;
    __device__ __forceinline__ float operator()(float logit) const {
        float w = exp_below(__fdiv_rn(__fsub_rn(logit, max), temperature));
        return w < min_p ? 0.0f : w;
    }
};

// Sums up to and with this lane.
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

extern "C" __global__ void __launch_bounds__(THREADS) sample_edit(float* logits, int vocab, const unsigned* words) {
    pdl_wait();
    pdl_release();
    const Task& task = ((const Task*)words)[blockIdx.x];
    if (task.bias == task.end) return;
    float* x = logits + (size_t)task.row * vocab;
    // An id may have several biases: its first entry adds them all, in order.
    for (int i = task.bias + 2 * threadIdx.x; i < task.seen; i += 2 * THREADS) {
        unsigned id = words[i];
        if (id >= (unsigned)vocab || (i > task.bias && words[i - 2] == id)) continue;
        float v = x[id];
        for (int j = i; j < task.seen && words[j] == id; j += 2) v = __fadd_rn(v, __uint_as_float(words[j + 1]));
        x[id] = v;
    }
    __syncthreads();
    for (int i = task.seen + 2 * threadIdx.x; i < task.masked; i += 2 * THREADS) {
        unsigned id = words[i], count = words[i + 1];
        if (id >= (unsigned)vocab) continue;
        float v = x[id];
        v = v > 0.0f ? __fdiv_rn(v, task.repetition) : __fmul_rn(v, task.repetition);
        if (count) v = __fsub_rn(v, __fadd_rn(__fmul_rn(task.frequency, (float)count), task.presence));
        x[id] = v;
    }
    __syncthreads();
    for (int i = task.masked + threadIdx.x; i < task.end; i += THREADS) {
        unsigned id = words[i];
        if (id < (unsigned)vocab) x[id] = -INFINITY;
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
    each<8>(logits + (size_t)blockIdx.y * vocab, vocab, segment, lane, [&](float v, int id) {
        valid &= v < INFINITY;
        if (v > best) best = v, at = id;
    });
    size_t out = (size_t)blockIdx.y * segments + segment;
    if (maxima) maxima[out * 32 + lane] = best;
    unsigned key = order_key(best), highest = __reduce_max_sync(ALL, key);
    unsigned id = __reduce_min_sync(ALL, key == highest ? at : ALL);
    valid = __all_sync(ALL, valid);
    if (lane == 0) partials[out] = valid ? place_of(highest, id) : ~0ull;
}

extern "C" __global__ void __launch_bounds__(256) sample_best(const u64* partials, int vocab, int rows, uint2* best) {
    pdl_wait();
    pdl_release();
    int lane = threadIdx.x % 32, row = blockIdx.x * 8 + threadIdx.x / 32, segments = segments_of(vocab);
    if (row >= rows) return;
    u64 place = 0;
    for (int i = lane; i < segments; i += 32) place = max(place, partials[(size_t)row * segments + i]);
#pragma unroll
    for (int o = 16; o; o >>= 1) place = max(place, (u64)__shfl_xor_sync(ALL, place, o));
    float value = place == ~0ull ? NAN : place_value(place);
    if (lane == 0) best[row] = make_uint2(place_id(place), __float_as_uint(value));
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
    Weigh weigh = {max, task.temperature, task.min_p};
    double total = 0, weights = 0;
    each(logits + (size_t)task.row * vocab, vocab, segment, lane, [&](float v, int) {
        if (report) total += exp_below(__fsub_rn(v, max));
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

// One block's work on one row.
struct Pick {
    const float* x;
    const float* maxima;
    int vocab, segments, lane, warp, thread;
};

struct Shared {
    u64 pool[CANDIDATES];        // candidates, or the two halves of a histogram [BINS][COPIES], or a segment's logits
    double sums[MAX_SEGMENTS];   // of segments
    double scan_f64[WARPS];
    u64 scan_u64[WARPS];
    u64 goal, amount;
    double kept;
    unsigned prefix;
    int count, first, last, id;
};

// f(logit, id) for the whole row, by all warps.
template <class F>
__device__ __forceinline__ void walk(const Pick& p, F f) {
    for (int segment = p.warp; segment < p.segments; segment += WARPS) each(p.x, p.vocab, segment, p.lane, f);
}

// Sums up to and with this thread; the last one has the total. Ends with a barrier.
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
        each(p.x, p.vocab, segment, p.lane, [&](float v, int id) { sum += f(v, id); });
        sum = warp_sum_f64(sum);
        if (p.lane == 0) sh.sums[segment] = sum;
    }
    __syncthreads();
}

// In the order of ids: the first where the running sum of f passes `share` of the total, which segment_sums has prepared; the
// last with a weight where rounding leads past it. Uses the pool. Ends with a barrier.
template <class F>
__device__ int pick_by_id(Shared& sh, const Pick& p, double share, F f) {
    double own = p.thread < p.segments ? sh.sums[p.thread] : 0;
    double until = block_scan(own, sh.scan_f64, p);
    if (p.thread == THREADS - 1) sh.kept = until;
    if (p.thread == 0) sh.first = INT_MAX, sh.last = 0;
    __syncthreads();
    double left = share * sh.kept;
    if (own > 0) {
        atomicMax(&sh.last, p.thread);
        if (until > left) atomicMin(&sh.first, p.thread);
    }
    __syncthreads();
    int segment = sh.first;
    bool past = segment == INT_MAX;
    if (past) segment = sh.last;
    if (p.thread == segment) sh.kept = past ? INFINITY : left - (until - own);
    // One warp goes through the segment, of which all bring a part.
    float* values = (float*)sh.pool;
    for (int i = p.thread; i < SEGMENT; i += THREADS) {
        int id = segment * SEGMENT + i;
        values[i] = id < p.vocab ? p.x[id] : 0;
    }
    __syncthreads();
    if (p.warp == 0) {
        left = sh.kept;
        double before = 0;
        int chosen = 0;
        for (int i = 4 * p.lane; i < SEGMENT; i += 128) {
            int first = segment * SEGMENT + i;
            double w[4], sum = 0;
            for (int j = 0; j < 4; j++) sum += w[j] = first + j < p.vocab ? f(values[i + j], first + j) : 0;
            double reached = warp_scan(sum, p.lane);
            double running = before + (reached - sum);
            int found = -1, weighty = -1;
            for (int j = 0; j < 4; j++) {
                if (!(w[j] > 0)) continue;
                running += w[j];
                weighty = first + j;
                if (found < 0 && running > left) found = weighty;
            }
            unsigned lanes = __ballot_sync(ALL, found >= 0);
            if (lanes) {
                chosen = __shfl_sync(ALL, found, __ffs(lanes) - 1);
                break;
            }
            chosen = max(chosen, __reduce_max_sync(ALL, weighty));
            before += __shfl_sync(ALL, reached, 31);
        }
        if (p.lane == 0) sh.id = chosen;
    }
    __syncthreads();
    return sh.id;
}

// Of the values that `visit` gives: the largest key such that the amounts of the keys from it up reach the goal, which is `goal`,
// or `share` of all amounts if that is not negative. `sh.goal` is then what is left to take of that key, `sh.amount` what it
// has. Eight bits at a time, from a histogram whose copies keep lanes apart. Ends with a barrier.
template <class Visit, class Amount>
__device__ unsigned radix(Shared& sh, const Pick& p, Visit visit, Amount amount, u64 goal, double share) {
    unsigned* low = (unsigned*)sh.pool;
    unsigned* high = low + BINS * COPIES;
    unsigned prefix = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
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
        u64 own = 0;
        int bin = BINS - 1 - p.thread;
        for (int i = 0; i < COPIES && bin >= 0; i++) own += low[bin * COPIES + i] | (u64)high[bin * COPIES + i] << 32;
        u64 until = block_scan(own, sh.scan_u64, p);
        if (shift == 24 && share >= 0) {
            if (p.thread == THREADS - 1) sh.goal = max(1ull, (u64)ceil(share * (double)until));
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

// The place of the last token that top_p (`mass`) or else top_k keeps of those at `limit` or better. Ends with a barrier.
__device__ __noinline__ u64 last_place(Shared& sh, const Pick& p, u64 limit, bool mass, int top_k, float top_p,
                                       Weigh weigh) {
    // Masses are in fixed point, because integers sum to the same in any order.
    auto amount = [&](float v) { return mass ? (u64)(weigh(v) * FIXED) : 1ull; };
    auto row = [&](auto f) { walk(p, f); };
    auto within = [&](float v, int id) { return place_of(order_key(v), id) >= limit ? amount(v) : 0ull; };
    unsigned key = radix(sh, p, row, within, top_k, mass ? top_p : -1.0);
    // All with this key have the same amount: the lowest ids go first.
    u64 one = amount(key_value(key)), ties = sh.amount / one, take = (sh.goal + one - 1) / one;
    unsigned id = ALL;
    if (take < ties) {
        auto tie = [&](float v, int id) { return order_key(v) == key && place_of(key, id) >= limit ? 1.0 : 0.0; };
        segment_sums(sh, p, tie);
        id = pick_by_id(sh, p, ((double)take - 0.5) / (double)ties, tie);
    }
    return max(limit, place_of(key, id));
}

// Sorts the first `count` of the pool, best first; zeros, which are no places, fill up to a power of two.
__device__ void sort_pool(Shared& sh, const Pick& p, int count) {
    int n = 2;
    while (n < count) n *= 2;
    for (int i = count + p.thread; i < n; i += THREADS) sh.pool[i] = 0;
    __syncthreads();
    // With strides up to 32, a warp works on its own 64 elements.
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

// Fills the pool with the best of the row, best first: at least k of them (k <= SMALL, k <= vocab). Returns how many.
__device__ int gather(Shared& sh, const Pick& p, int k) {
    auto one = [](float, int) { return 1ull; };
    int chunks = 32 * p.segments;
    // k chunks have a logit at or above the k-th largest of the chunks' maxima, so the k best are all there.
    unsigned floor = 0;
    if (k <= chunks) {
        auto visit = [&](auto f) {
            for (int i = p.thread; i < chunks; i += THREADS) f(p.maxima[i], i);
        };
        floor = radix(sh, p, visit, one, k, -1.0);
    }
    if (p.thread == 0) sh.count = 0;
    __syncthreads();
    auto add = [&](float v, int id) {
        int at = atomicAdd(&sh.count, 1);
        if (at < CANDIDATES) sh.pool[at] = place_of(order_key(v), id);
    };
    for (int i = p.thread; i < chunks; i += THREADS) {
        if (order_key(p.maxima[i]) < floor) continue;
        each(p.x, p.vocab, i / 32, i % 32, [&](float v, int id) {
            if (order_key(v) >= floor) add(v, id);
        });
    }
    __syncthreads();
    int count = sh.count;
    if (count > CANDIDATES) {
        u64 limit = last_place(sh, p, 0, false, k, 1.0f, Weigh());
        if (p.thread == 0) sh.count = 0;
        __syncthreads();
        walk(p, [&](float v, int id) {
            if (place_of(order_key(v), id) >= limit) add(v, id);
        });
        count = k;
    }
    sort_pool(sh, p, count);
    return count;
}

// Draws from the first `count` of the sorted pool, cut where their weight reaches `top_p` of `total` (of their own if that is
// negative). -1 if it does not reach that and there are `more`.
__device__ __noinline__ int pick_sorted(Shared& sh, const Pick& p, int count, bool more, const Task& task, double total,
                                        Weigh weigh) {
    double w[EACH], own = 0;
    for (int j = 0; j < EACH; j++) {
        int i = p.thread * EACH + j;
        w[j] = i < count ? weigh(place_value(sh.pool[i])) : 0;
        own += w[j];
    }
    double until = block_scan(own, sh.scan_f64, p), before = until - own;
    if (p.thread == THREADS - 1) sh.kept = until;
    if (p.thread == 0) sh.first = INT_MAX, sh.last = 0;
    __syncthreads();
    double goal = task.top_p * (total < 0 ? sh.kept : total), reached = before;
    for (int j = 0; j < EACH; j++) {
        int i = p.thread * EACH + j;
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
    for (int j = 0; j < EACH; j++) {
        reached += w[j];
        if (p.thread * EACH + j == cut) sh.kept = reached;
    }
    __syncthreads();
    if (p.thread == 0) sh.first = INT_MAX;
    double left = task.uniform * sh.kept;
    __syncthreads();
    reached = before;
    for (int j = 0; j < EACH; j++) {
        int i = p.thread * EACH + j;
        reached += w[j];
        if (i > cut || !(w[j] > 0)) continue;
        atomicMax(&sh.last, i);
        if (reached > left) atomicMin(&sh.first, i);
    }
    __syncthreads();
    return place_id(sh.pool[min(sh.first, sh.last)]);
}

// Draws a token. `limit` is the place of the last that top_k keeps, where that is more than SMALL; the pool has the best
// `count` where top_k or top_p asks for it; `weights` are the sums of all weights by segment.
__device__ int draw(Shared& sh, const Pick& p, const Task& task, float max, u64 limit, int count, const double* weights) {
    Weigh weigh = {max, task.temperature, task.min_p};
    if (task.top_k > 0 && task.top_k <= SMALL) return pick_sorted(sh, p, task.top_k, false, task, -1.0, weigh);
    auto kept = [&](float v, int id) { return place_of(order_key(v), id) >= limit ? (double)weigh(v) : 0.0; };
    if (task.top_k > 0) {
        segment_sums(sh, p, kept);
    } else {
        for (int i = p.thread; i < p.segments; i += THREADS) sh.sums[i] = weights[i];
        __syncthreads();
    }
    if (task.top_p < 1.0f) {
        double until = block_scan(p.thread < p.segments ? sh.sums[p.thread] : 0.0, sh.scan_f64, p);
        if (p.thread == THREADS - 1) sh.kept = until;
        __syncthreads();
        double total = sh.kept;
        __syncthreads();
        int all = task.top_k > 0 ? task.top_k : p.vocab;
        int id = pick_sorted(sh, p, min(count, all), count < all, task, total, weigh);
        if (id >= 0) return id;
        limit = last_place(sh, p, limit, true, 0, task.top_p, weigh);
        segment_sums(sh, p, kept);
    }
    return pick_by_id(sh, p, task.uniform, kept);
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

    u64 limit = 0;
    int asked = 0;
    if (drawn && task.top_k > SMALL) limit = last_place(sh, p, 0, false, task.top_k, 1.0f, Weigh());
    if (drawn && task.top_k > 0 && task.top_k <= SMALL) asked = task.top_k;
    else if (drawn && task.top_p < 1.0f) asked = min(SMALL, vocab);
    if (report) asked = asked > task.top ? asked : task.top;
    int count = asked > 0 ? gather(sh, p, asked) : 0;
    if (report) {
        for (int i = thread; i < task.top; i += THREADS) {
            out[6 + 2 * i] = place_id(sh.pool[i]);
            out[7 + 2 * i] = __float_as_uint(place_value(sh.pool[i]));
        }
        // The pool may be used for something else.
        __syncthreads();
    }
    unsigned id = task.target != ~0u ? task.target : most.x;
    if (drawn) id = draw(sh, p, task, max, limit, count, sums + segments);
    if (thread == 0) out[0] = id;
    if (!report) return;

    float own = p.x[id];
    __syncthreads();
    if (thread == 0) sh.count = 0;
    __syncthreads();
    if (own < max) {
        unsigned larger = 0;
        walk(p, [&](float v, int) { larger += v > own; });
        larger = __reduce_add_sync(ALL, larger);
        if (p.lane == 0) atomicAdd(&sh.count, (int)larger);
    }
    double total = block_scan(thread < segments ? sums[thread] : 0.0, sh.scan_f64, p);
    if (thread == THREADS - 1) {
        out[1] = 1 + sh.count;
        out[2] = __float_as_uint(own);
        out[3] = 0;
        *(double*)(out + 4) = total;
    }
}
