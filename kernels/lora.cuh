// LoRA on a step's rows, for whatever mix of adapters and ranks it has: h = weight · scale · x·Aᵀ (shrink), then
// y += Σ h·Bᵀ + weight · scale · bias (expand). One launch of each does all modules of a site (q, k, v; o; gate, up; down;
// head). Steps with DoRA's adapters have a third, y *= gains (gain). No launch depends on adapters: blocks take items from the step's worklist and ranks from the slot table.
//
// work: 32-bit words at a 16-byte address, written by src/ops/lora/cuda.rs: two List headers, one of the segments taken 8
//   rows at a time and one of those taken 64 (shrink) and 32 (expand) at a time; the address of the h workspace (words 32
//   and 33); then what the headers point to.
// table: Entry [slot][entries]; this launch reads entry `entry` of each slot. Blocks of weights at Entry::base: A bf16
//   [Σ rank, k], the modules stacked; per module B bf16 [n, rank]; per module with a bias, f32 [n], up to 16 bytes each;
//   if Entry::gains, 16 times that many bytes from the base, f32 [n0 + n1 + n2], 1 for columns of other modules.
//   Ranks are multiples of 8, padded by zero rows of A and columns of B; 0 for a module that is not there.
// x: bf16 [rows, k], k a multiple of 8. y: bf16 or f32 [rows, n0 + n1 + n2], the modules' outputs side by side.
// h: f32, at Term::hidden [row of the segment][Term::stride], the modules' ranks stacked; if List::apart, one such plane,
//   List::plane values apart, for each split of k, else their sum.
//
// A row's bits depend on its own x, y and terms alone: k is cut into `splits` of `width`, and those into the warps' parts,
// by k alone; parts and splits are summed in order, whether by the shrinking block or by the expanding one. Both sizes of
// chunks, and any grid, give the same bits. Blocks are 128 threads; a grid of any size does all items.

#pragma once

#include "common.cuh"

constexpr int WARPS = 4;
constexpr int STAGES = 4;  // of weights that a warp works on or has asked for

struct alignas(16) List {
    uint32_t terms;      // How many there are.
    uint32_t chunks;     // What the expanding kernel takes.
    uint32_t apart;      // Whether each split of k has its own item and plane of h.
    uint32_t plane;      // Values between planes of h.
    uint32_t term_at;    // Word of the first Term.
    uint32_t chunk_at;   // Word of the first Chunk.
    uint32_t starts_at;  // Word of [kind of site][terms + 1]: units before each term. A unit is a chunk and 16 ranks.
    uint32_t unused;
    uint32_t units[8];   // By kind of site: 0 to 4 for qkv, o, gate and up, down, head.
};

// An adapter under a segment.
struct alignas(16) Term {
    uint32_t row, rows;  // The segment's.
    uint32_t slot;
    float weight;
    uint32_t hidden;     // Where its h starts, in values.
    uint32_t stride;     // Values between rows of h.
    uint32_t unused[2];
};

// Some rows of a segment.
struct alignas(16) Chunk {
    uint32_t row, rows;
    uint32_t term, terms;  // Its segment's terms follow one another.
};

struct alignas(16) Entry {
    uint64_t base;
    uint16_t ranks[3];
    uint16_t biases;  // Bit i: module i has one.
    float scales[3];
    uint32_t gains;  // Where they are, in 16 bytes; 0: none.
};

static_assert(sizeof(List) == 64 && sizeof(Term) == 32 && sizeof(Chunk) == 16 && sizeof(Entry) == 32, "as in Rust");

// By 16-byte loads.
template <typename T>
__device__ __forceinline__ T load_record(const void* p) {
    T value;
#pragma unroll
    for (int i = 0; i < sizeof(T) / 16; i++) reinterpret_cast<uint4*>(&value)[i] = static_cast<const uint4*>(p)[i];
    return value;
}

__device__ __forceinline__ List load_list(const uint32_t* work, int list) {
    return load_record<List>(work + list * (sizeof(List) / 4));
}

__device__ __forceinline__ float* hidden_values(const uint32_t* work) {
    return reinterpret_cast<float*>(work[32] | static_cast<uint64_t>(work[33]) << 32);
}

// This block's run of the items: neighbours share a term or a chunk.
__device__ __forceinline__ void own_items(uint32_t items, uint32_t& from, uint32_t& to) {
    const uint32_t each = items / gridDim.x, more = items % gridDim.x;
    from = blockIdx.x * each + min(blockIdx.x, more);
    to = from + each + (blockIdx.x < more);
}
