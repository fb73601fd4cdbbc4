// swiglu(x bf16 [T, 2 n], n, y bf16 [T, n]): y = silu(gate) up, x = [gate | up]. Pairs of values; grid (n / 512 up, T), 256 threads.

#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256) swiglu(const bf16 *x, int n, bf16 *y) {
    const int i = 2 * (blockIdx.x * 256 + threadIdx.x);
    pdl_wait();
    pdl_release();
    if (i >= n) return;
    const bf16 *gate = x + (size_t)blockIdx.y * 2 * n + i, *up = gate + n;
    const float2 g = __bfloat1622float2(*(const bf162 *)gate), u = __bfloat1622float2(*(const bf162 *)up);
    *(bf162 *)(y + (size_t)blockIdx.y * n + i) =
        __floats2bfloat162_rn(g.x / (1.f + __expf(-g.x)) * u.x, g.y / (1.f + __expf(-g.y)) * u.y);
}
