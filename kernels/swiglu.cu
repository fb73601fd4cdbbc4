// SwiGLU and its gradient, with x = [gate | up] (launched from src/ops/swiglu/cuda.rs). A thread takes VALUES values, 8 or 2; n is a
// multiple of VALUES. Grid: (T, n / (256 VALUES) rounded up), 256 threads.
//
//   swiglu_8 / _2 (x bf16 [T, 2 n], n, y bf16 [T, n])
//     y = silu(gate) up.
//   swiglu_backward_8 / _2 (x bf16 [T, 2 n], dy bf16 [T, n], n, dx bf16 [T, 2 n])
//     dx = [dy up silu'(gate) | dy silu(gate)].

#include "common.cuh"

// VALUES neighbouring values of a row, in f32.
template <int VALUES> struct Values {
    static constexpr int PAIRS = VALUES / 2;
    float2 v[PAIRS];

    __device__ __forceinline__ Values() {}

    __device__ __forceinline__ explicit Values(const bf16 *from) {
        __align__(16) bf162 x[PAIRS];
        if constexpr (VALUES == 8) *(uint4 *)x = *(const uint4 *)from;
        else x[0] = *(const bf162 *)from;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) v[i] = __bfloat1622float2(x[i]);
    }

    __device__ __forceinline__ void store(bf16 *to) const {
        __align__(16) bf162 x[PAIRS];
#pragma unroll
        for (int i = 0; i < PAIRS; i++) x[i] = __float22bfloat162_rn(v[i]);
        if constexpr (VALUES == 8) *(uint4 *)to = *(const uint4 *)x;
        else *(bf162 *)to = x[0];
    }
};

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + __expf(-x)); }

template <int VALUES> __device__ __forceinline__ void forward(const bf16 *x, int n, bf16 *y) {
    const int i = VALUES * (blockIdx.y * 256 + threadIdx.x);
    pdl_release();
    pdl_wait();
    if (i >= n) return;
    x += (size_t)blockIdx.x * 2 * n + i;
    const Values<VALUES> gate(x), up(x + n);
    Values<VALUES> h;
#pragma unroll
    for (int p = 0; p < VALUES / 2; p++) {
        const float2 g = gate.v[p], u = up.v[p];
        h.v[p] = make_float2(g.x / (1.f + __expf(-g.x)) * u.x, g.y / (1.f + __expf(-g.y)) * u.y);
    }
    h.store(y + (size_t)blockIdx.x * n + i);
}

// The gradients of gate (x) and up (y).
__device__ __forceinline__ float2 gradients(float gate, float up, float dy) {
    const float s = sigmoid(gate);
    return make_float2(dy * up * s * (1.f + gate * (1.f - s)), dy * gate * s);
}

template <int VALUES> __device__ __forceinline__ void backward(const bf16 *x, const bf16 *dy, int n, bf16 *dx) {
    const int i = VALUES * (blockIdx.y * 256 + threadIdx.x);
    pdl_wait();
    pdl_release();
    if (i >= n) return;
    const size_t at = (size_t)blockIdx.x * 2 * n + i;
    const Values<VALUES> gate(x + at), up(x + at + n), d(dy + (size_t)blockIdx.x * n + i);
    Values<VALUES> dgate, dup;
#pragma unroll
    for (int p = 0; p < VALUES / 2; p++) {
        const float2 a = gradients(gate.v[p].x, up.v[p].x, d.v[p].x), b = gradients(gate.v[p].y, up.v[p].y, d.v[p].y);
        dgate.v[p] = make_float2(a.x, b.x), dup.v[p] = make_float2(a.y, b.y);
    }
    dgate.store(dx + at);
    dup.store(dx + at + n);
}

#define SWIGLU(VALUES)                                                                                                          \
    extern "C" __global__ void __launch_bounds__(256) swiglu_##VALUES(const bf16 *x, int n, bf16 *y) { forward<VALUES>(x, n, y); } \
    extern "C" __global__ void __launch_bounds__(256)                                                                           \
        swiglu_backward_##VALUES(const bf16 *x, const bf16 *dy, int n, bf16 *dx) {                                              \
        backward<VALUES>(x, dy, n, dx);                                                                                         \
    }
SWIGLU(8)
SWIGLU(2)
