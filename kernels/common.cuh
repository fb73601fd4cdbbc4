// Shared by all kernels: warp reductions, tensor core products, asynchronous copies, programmatic dependent launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "constants.cuh"

typedef __nv_bfloat16 bf16;
typedef __nv_bfloat162 bf162;

// Sum over the 32 lanes, the same in all lanes, in an order fixed by the lane numbers.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
    return v;
}

// Maximum over the 32 lanes, the same in all lanes.
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
    for (int o = 16; o; o >>= 1) v = fmaxf(v, __shfl_xor_sync(~0u, v, o));
    return v;
}

// c[16x8] += a[16x16] * b[16x8], with bf16 inputs and f32 accumulation. Lane l holds
//   of a: rows l/4 (a0, a2) and l/4 + 8 (a1, a3), columns 2(l%4)..+1 (a0, a1) and 8 more (a2, a3);
//   of b: column l/4, rows 2(l%4)..+1 (b0) and 8 more (b1);
//   of c: rows l/4 (c[0..1]) and l/4 + 8 (c[2..3]), columns 2(l%4)..+1.
__device__ __forceinline__ void mma_m16n8k16(float c[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                             uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The 32-bit address of shared memory that asm instructions take.
__device__ __forceinline__ uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

// Starts a copy of 16 bytes to shared memory; writes zeros if not `live`.
__device__ __forceinline__ void cp_async16(uint32_t to, const void *from, bool live) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(live ? 16 : 0) : "memory");
}

// The same for 4 bytes.
__device__ __forceinline__ void cp_async4(uint32_t to, const void *from, bool live) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(live ? 4 : 0) : "memory");
}

// Closes a group of the copies started since the last group.
__device__ __forceinline__ void cp_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the N youngest groups are still being copied.
template <int N> __device__ __forceinline__ void cp_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Programmatic dependent launch (PDL), on Hopper and later; on older GPUs a kernel starts when the previous one has ended.
//   `pdl_wait` waits until the previous kernels have ended and their results are visible.
//   `pdl_release` lets the next kernel start, up to its own `pdl_wait`.
// A kernel may call `pdl_release` before `pdl_wait`. The next kernel then starts while kernels before this one still run. `lora_shrink_*`
// relies on those having ended, so it must not follow such a kernel.
__device__ __forceinline__ void pdl_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void pdl_release() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Loads of data that is uploaded before each step (worklists, block tables), which may come before `pdl_wait`. Volatile, so that they stay
// in program order, and from L2, since L1 may hold the data of an earlier step.
__device__ __forceinline__ uint4 load_words(const uint4 *from) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}

__device__ __forceinline__ uint32_t load_word(const uint32_t *from) {
    uint32_t v;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(from));
    return v;
}
