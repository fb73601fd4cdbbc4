// LoRA over the rows of a step, for any mix of adapters and ranks (launched from src/lora/delta/cuda.rs).
//   shrink: h = weight · scale · x·Aᵀ
//   expand: y += Σ h·Bᵀ + weight · scale · bias, over the adapters of a row
//   gain:   y *= gains, in steps with DoRA adapters
// One launch of each does all modules of a site (q, k, v; o; gate, up; down; head). No launch depends on the adapters: thread blocks take
// items from the step's worklist, and ranks from the slot table. A grid of any size does all items; thread blocks have 128 threads.
//
//   lora_shrink_small / _large (work, table, x, entries, entry, k, splits, width, kind)
//   lora_expand_small / _large [_f32] (work, table, y, entries, entry, k, splits, n0, n1, n2)
//   lora_gain [_f32] (work, table, y, entries, entry, n)
//     _small takes the first list of the worklist, _large the second one, lora_gain both. _f32: y is f32, else bf16.
//
// Words of the worklist.
//   worklist
//   └── list            the small one for short segments, the large one for long ones
//       ├── term        one adapter of one segment
//       │   └── unit    8 (small) or 64 (large) rows and 16 ranks of a term; an item of shrink is a unit, or one split of k of it
//       └── chunk       8 (small) or 32 (large) rows of a segment, with all its terms; an item of expand is a chunk and 4 column tiles
//   A segment is consecutive rows with the same weighted adapters. An item is the work that a thread block takes at a time.
//
// Arguments.
//   work: the worklist, 32-bit words at a 16-byte address, written by src/lora/delta/cuda.rs. It starts with the List headers of the small
//     list and the large one. Then the address of the h workspace (words 32 and 33), then the arrays that the headers point to.
//   table: SlotEntry [slots][entries]. A launch reads entry `entry` of each slot, which is of one layer and site.
//   x: bf16 [rows, k], k a multiple of 8. y: bf16 or f32 [rows, n0 + n1 + n2], the modules' outputs side by side.
//   splits, width: k is cut into `splits` of `width` inputs. kind: the site, as in List::units. n: n0 + n1 + n2.
//
// Weights of a slot at SlotEntry::base, for this layer and site: A bf16 [Σ rank, k], the modules stacked; per module B bf16 [n, rank]; per
// module with a bias, f32 [n], padded to 16 bytes. If SlotEntry::gains is not 0, f32 [n0 + n1 + n2] lie 16 · gains bytes after base, 1 for
// columns of modules without gains. Ranks are multiples of 8 (padded by zero rows of A and columns of B), and 0 for a module that the
// adapter does not target.
//
// h: f32 at Term::h_offset, [row of the segment][Term::h_stride], the modules' ranks stacked. If List::split_planes, each split of k has
// such a plane, List::plane values apart, and expand adds them up; else shrink does.
//
// Determinism. A row's bits depend on its own x, y and terms alone. k is cut into splits, and these into one part for each warp, by k
// alone. Parts and splits are summed in order, whether by shrink or by expand. So small and large kernels, and any grid, give the same
// bits.

#pragma once

#include "common.cuh"

constexpr int WARPS = LORA_WARPS;
constexpr int STAGES = 4;  // of a warp's pipeline of weights

// A list of the worklist: its terms and chunks.
struct alignas(16) List {
    uint32_t terms;         // The number of terms.
    uint32_t chunks;        // The number of chunks.
    uint32_t split_planes;  // Whether each split of k has its own item of shrink and plane of h.
    uint32_t plane;         // Values between planes of h.
    uint32_t term_at;       // Word of the first Term.
    uint32_t chunk_at;      // Word of the first Chunk.
    uint32_t starts_at;     // Word of [site][terms + 1]: the number of units before each term.
    uint32_t unused;
    uint32_t units[8];      // Units by site: 0 to 4 for qkv, o, gate_up, down, head.
};

// One adapter of a segment.
struct alignas(16) Term {
    uint32_t row, rows;  // The segment's rows.
    uint32_t slot;
    float weight;
    uint32_t h_offset;   // Offset of its h, in values.
    uint32_t h_stride;   // Values between rows of h.
    uint32_t unused[2];
};

// Some rows of a segment, at most 8 in the small list and 32 in the large one.
struct alignas(16) Chunk {
    uint32_t row, rows;
    uint32_t term, terms;  // The segment's terms, one after another.
};

// The weights of one layer and site of a slot.
struct alignas(16) SlotEntry {
    uint64_t base;
    uint16_t ranks[3];
    uint16_t biases;  // Bit i: module i has a bias.
    float scales[3];
    uint32_t gains;  // Offset of the gains from base, in units of 16 bytes; 0: none.
};

static_assert(sizeof(List) == 4 * LORA_LIST_WORDS && sizeof(Term) == 4 * LORA_TERM_WORDS && sizeof(Chunk) == 4 * LORA_CHUNK_WORDS &&
                  sizeof(SlotEntry) == SLOT_ENTRY_BYTES,
              "as in Rust");

// Loads a record by 16-byte loads.
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

// The h workspace.
__device__ __forceinline__ float* h_values(const uint32_t* work) {
    return reinterpret_cast<float*>(work[LORA_H_ADDRESS_WORD] | static_cast<uint64_t>(work[LORA_H_ADDRESS_WORD + 1]) << 32);
}

// This thread block's items, a contiguous range, since neighbouring items share a term or a chunk.
__device__ __forceinline__ void own_items(uint32_t items, uint32_t& from, uint32_t& to) {
    const uint32_t each = items / gridDim.x, more = items % gridDim.x;
    from = blockIdx.x * each + min(blockIdx.x, more);
    to = from + each + (blockIdx.x < more);
}
