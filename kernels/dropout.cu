// Dropout (launched from src/ops/dropout/cuda.rs).
//
//   dropout(x bf16 [n], n, seed, threshold, scale, y bf16 [n])
//     y = x scale, or 0 where 32 random bits are below the threshold. A pair of values takes the 64 bits of SplitMix64(seed) at the pair's
//     index: the low half for the first value, the high half for the second. Grid: n / 512 rounded up, 256 threads.

#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256)
    dropout(const bf16 *x, int n, unsigned long long seed, unsigned threshold, float scale, bf16 *y) {
    const int pair = blockIdx.x * 256 + threadIdx.x;
    pdl_wait();
    pdl_release();
    // SplitMix64.
    unsigned long long z = seed + (pair + 1ull) * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    z ^= z >> 31;
    for (int i = 0; i < 2 && 2 * pair + i < n; i++) {
        const bool drop = (unsigned)(z >> (32 * i)) < threshold;
        y[2 * pair + i] = drop ? __float2bfloat16(0.f) : __float2bfloat16(__bfloat162float(x[2 * pair + i]) * scale);
    }
}
