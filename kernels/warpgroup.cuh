// Products of matrices in shared memory, with sums in registers, by a thread block of four warps: on Hopper as one warpgroup (wgmma),
// elsewhere by each warp (mma.sync).
//
// Shared memory layout. A matrix lies in panels of 64 columns. A row of a panel is 128 bytes, eight chunks of 16 bytes, which are permuted
// by the row's number so that the same chunk of eight rows lies in different banks. This is wgmma's 128-byte swizzle. Matrices are aligned
// to 1024 bytes.
//
// Register layout. Of 64 rows of sums, warp w has rows 16 w to 16 w + 15. Of these, lane l has rows l/4 and l/4 + 8, and of each 8 columns
// 2(l%4)..+1.
//
// On Hopper products are asynchronous: `start_*` starts them, and `finish` waits for them.
#pragma once

#include "common.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define WARPGROUPS
#endif

// Two values as a pair of bf16.
__device__ __forceinline__ uint32_t pack(float low, float high) {
    const bf162 v = __floats2bfloat162_rn(low, high);
    return *(const uint32_t *)&v;
}

// Loads four 8x8 matrices of 16-bit values. Each lane passes the address of one row.
__device__ __forceinline__ void ldmatrix(uint32_t r[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

// The same, transposed.
__device__ __forceinline__ void ldmatrix_trans(uint32_t r[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

constexpr int PANEL_ROW = 128;  // bytes of a row of a panel

// Bytes of a matrix of ROWS rows and DIM columns.
template <int DIM, int ROWS> constexpr int panels_bytes = (DIM + 63) / 64 * ROWS * PANEL_ROW;

// Byte offset of a row's chunk in a matrix of ROWS rows.
template <int ROWS> __device__ __forceinline__ uint32_t place_panel(int row, int chunk) {
    return chunk / 8 * ROWS * PANEL_ROW + row * PANEL_ROW + ((chunk ^ row) & 7) * 16;
}

// The address of columns 16 k to 16 k + 15, given that of columns 0 to 15, in a matrix of ROWS rows.
template <int ROWS> __device__ __forceinline__ uint32_t step(uint32_t at, int k) {
    return (at ^ 32 * (k % 4)) + k / 4 * ROWS * PANEL_ROW;
}

// Writes a warp's 16 rows of sums, times `factor`, as bf16 to a shared matrix of ROWS rows and DIM columns.
template <int DIM, int ROWS>
__device__ __forceinline__ void store_shared(uint8_t *to, const float (&o)[DIM / 8][4], float factor, int lane) {
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int d = 0; d < DIM / 8; d++)
            *(uint32_t *)(to + place_panel<ROWS>(r * 8 + lane / 4, d) + 4 * (lane % 4)) =
                pack(o[d][2 * r] * factor, o[d][2 * r + 1] * factor);
}

#ifdef WARPGROUPS

// A wgmma descriptor: 128-byte swizzle, 1024 bytes between groups of eight rows, `panel` bytes between panels (only used for transposed
// matrices).
__device__ __forceinline__ uint64_t descriptor(uint32_t at, uint32_t panel) {
    return (uint64_t)(at >> 4) | (uint64_t)(panel >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 | 1ull << 62;
}

#define S4(i) "+f"(s[i][0]), "+f"(s[i][1]), "+f"(s[i][2]), "+f"(s[i][3])
#define S16(i) S4(i), S4(i + 1), S4(i + 2), S4(i + 3)

// s (+)= a b^T over 16 columns, for 64 rows of `a` and 32 or 64 rows of `b`.
__device__ __forceinline__ void wgmma_columns(float (&s)[4][4], uint64_t a, uint64_t b, bool add) {
    asm volatile("{ .reg .pred add; setp.ne.b32 add, %18, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
                 "%16, %17, add, 1, 1, 0, 0; }"
                 : S16(0) : "l"(a), "l"(b), "r"((int)add));
}

__device__ __forceinline__ void wgmma_columns(float (&s)[8][4], uint64_t a, uint64_t b, bool add) {
    asm volatile("{ .reg .pred add; setp.ne.b32 add, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "%32, %33, add, 1, 1, 0, 0; }"
                 : S16(0), S16(4) : "l"(a), "l"(b), "r"((int)add));
}

// s += a b for 64 rows of `a` in registers and 16 rows of `b`, which has 64, 96 or 128 columns.
__device__ __forceinline__ void wgmma_rows(float (&s)[8][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                 : S16(0), S16(4) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ void wgmma_rows(float (&s)[12][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, "
                 "{%48, %49, %50, %51}, %52, 1, 1, 1, 1;"
                 : S16(0), S16(4), S16(8) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ void wgmma_rows(float (&s)[16][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                 "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : S16(0), S16(4), S16(8), S16(12) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef S16
#undef S4

#endif

// Makes this thread's completed copies to shared memory visible to wgmma, for products after the next barrier.
__device__ __forceinline__ void publish_copies() {
#ifdef WARPGROUPS
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Starts s = a b^T. a: 64 rows at `a_at`, in a matrix of A_ROWS rows. b: a matrix of 8 TILES rows at `b_at`. Both have DIM columns.
template <int DIM, int A_ROWS, int TILES>
__device__ __forceinline__ void start_products(float (&s)[TILES][4], uint32_t a_at, uint32_t b_at) {
#ifdef WARPGROUPS
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < DIM / 16; k++)
        wgmma_columns(s, descriptor(step<A_ROWS>(a_at, k), 0), descriptor(step<8 * TILES>(b_at, k), 0), k > 0);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    a_at += warp * 16 * PANEL_ROW + place_panel<A_ROWS>(lane % 16, lane / 16);
    b_at += place_panel<8 * TILES>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int c = 0; c < 4; c++) s[n][c] = 0.f;
#pragma unroll
    for (int k = 0; k < DIM / 16; k++) {
        uint32_t a[4], b[4];
        ldmatrix(a, step<A_ROWS>(a_at, k));
#pragma unroll
        for (int n = 0; n < TILES / 2; n++) {
            ldmatrix(b, step<8 * TILES>(b_at, k) + n * 16 * PANEL_ROW);
            mma_m16n8k16(s[2 * n], a[0], a[1], a[2], a[3], b[0], b[1]);
            mma_m16n8k16(s[2 * n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
        }
    }
#endif
}

// Starts o += s b. s: 64 rows, rounded to bf16. b: a matrix of 8 TILES rows and DIM columns at `b_at`.
template <int DIM, int TILES>
__device__ __forceinline__ void start_accumulate(float (&o)[DIM / 8][4], const float (&s)[TILES][4], uint32_t b_at) {
    uint32_t a[TILES / 2][4];
#pragma unroll
    for (int k = 0; k < TILES / 2; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) a[k][i] = pack(s[2 * k + i / 2][i % 2 * 2], s[2 * k + i / 2][i % 2 * 2 + 1]);
#ifdef WARPGROUPS
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < TILES / 2; k++) wgmma_rows(o, a[k], descriptor(b_at + k * 16 * PANEL_ROW, 8 * TILES * PANEL_ROW));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
    const int lane = threadIdx.x % 32;
    b_at += place_panel<8 * TILES>(lane % 16, lane / 16);
#pragma unroll
    for (int k = 0; k < TILES / 2; k++) {
#pragma unroll
        for (int d = 0; d < DIM / 16; d++) {
            uint32_t b[4];
            ldmatrix_trans(b, step<8 * TILES>(b_at, d) + k * 16 * PANEL_ROW);
            mma_m16n8k16(o[2 * d], a[k][0], a[k][1], a[k][2], a[k][3], b[0], b[1]);
            mma_m16n8k16(o[2 * d + 1], a[k][0], a[k][1], a[k][2], a[k][3], b[2], b[3]);
        }
    }
#endif
}

// Waits until at most the LEFT youngest products are still running. `s`: the sums that the caller uses next.
template <int LEFT, int TILES> __device__ __forceinline__ void finish(float (&s)[TILES][4]) {
#ifdef WARPGROUPS
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
    // Keeps the compiler from using the sums earlier.
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int c = 0; c < 4; c++) asm volatile("" : "+f"(s[n][c])::"memory");
#endif
}
