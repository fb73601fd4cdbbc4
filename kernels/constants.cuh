// Constants that Rust and the kernels share, each of which exists only here: build.rs writes the same constants for Rust
// (`gpu::constants`). A constant is one line, `constexpr int NAME = VALUE;` or `constexpr int NAME[] = {VALUE, ...};`, and a value is an
// expression of integers and of constants above it.
#pragma once

// ---------------------------------------------------------------- attention

constexpr int KV_BLOCK = 16;                  // tokens of a KV block
constexpr int ATTENTION_WARPS = 4;            // of a thread block, in all attention kernels
constexpr int MAX_HEAD_DIM = 256;             // widest head
constexpr int MAX_SPLITS = 32;                // KV splits of a decode row
constexpr int DECODE_HEADS = 8;               // query heads of a work unit of the decode kernels
constexpr int DECODE_BLOCKS_PER_SM = 5;       // thread blocks of a decode kernel that an SM holds
constexpr int ATTENTION_TILE_ROWS = 128;      // query rows of a tile: positions times the query heads of a KV head
constexpr int CAUSAL_TILE_KEYS = 64;          // keys of a thread block that computes their gradients
constexpr int CAUSAL_ANY_TILE = 64;           // positions of a thread block of the causal kernels for any width
constexpr int ROPE_THREADS = 128;             // of a thread block

// ---------------------------------------------------------------- quantised matrices

constexpr int MATRIX_TILE_ROWS = 16;          // rows of a tile
constexpr int MATRIX_TILE_INPUTS = 64;        // inputs of a tile
constexpr int CODEBOOK_TABLE_BYTES = 32768;   // the table of a codebook's pairs in shared memory
constexpr int WIDE_PRODUCT_WARPS = 16;        // of a thread block of a wide product
constexpr int WIDE_STAGE_ROWS = 256;          // rows of activations, over the tiles of a stage and the teams
constexpr int WIDE_STAGES = 3;                // of a team's pipeline of activations

// By format: S16, SM16, K4, LUT, S8, SM8, DENSE.
constexpr int CHUNK_TILES[] = {4, 4, 4, 4, 2, 2, 2};          // tiles of a chunk
constexpr int CODE_WORDS[] = {4, 4, 4, 4, 8, 8, 16};          // words of codes, per lane and tile
constexpr int SCALE_WORDS[] = {2, 4, 2, 2, 8, 16, 0};         // words of scales, per row pair and tile
constexpr int SUPER_WORDS[] = {0, 0, 16, 0, 0, 0, 0};         // words of super-scales, per chunk
constexpr int SUM_GROUP[] = {0, 32, 32, 0, 0, 16, 0};         // inputs of a group with a min; 0: the format has no mins
constexpr int SMALL_RING_STAGES[] = {3, 3, 3, 2, 3, 3, 2};    // chunks of a warp's ring of weights in small products
constexpr int WIDE_RING_STAGES[] = {3, 3, 3, 2, 3, 2, 2};     // the same in wide products

// ---------------------------------------------------------------- LoRA

constexpr int LORA_WARPS = 4;                              // of a thread block
constexpr int LORA_LIST_WORDS = 16;                        // a List
constexpr int LORA_TERM_WORDS = 8;                         // a Term
constexpr int LORA_CHUNK_WORDS = 4;                        // a Chunk
constexpr int LORA_H_ADDRESS_WORD = 2 * LORA_LIST_WORDS;   // where the address of h is in the worklist, behind both lists
constexpr int LORA_HEADER_WORDS = LORA_H_ADDRESS_WORD + 4; // before the arrays that the lists point to
constexpr int SLOT_ENTRY_BYTES = 32;                       // a SlotEntry
constexpr int SHRINK_RANKS = 16;                           // ranks of a unit of shrink
constexpr int SHRINK_SMALL_ROWS = 8;                       // rows of a unit of shrink
constexpr int SHRINK_LARGE_ROWS = 64;
constexpr int EXPAND_SMALL_ROWS = 8;                       // rows of a chunk
constexpr int EXPAND_LARGE_ROWS = 32;
constexpr int LORA_SMALL_BLOCKS_PER_SM = 5;                // thread blocks of shrink that an SM holds
constexpr int LORA_LARGE_BLOCKS_PER_SM = 4;
constexpr int GAIN_COLUMNS = 512;                          // columns of an item of gain

// ---------------------------------------------------------------- sampling

constexpr int SAMPLE_SEGMENT = 1024;          // ids of a segment, which a warp takes
constexpr int SAMPLE_MAX_SEGMENTS = 512;      // of a row
constexpr int SAMPLE_THREADS = 512;           // of a thread block of sample_edit and sample_pick
constexpr int SAMPLE_MAX_TOP = 1024;          // tokens that can be asked for in sorted order
constexpr int SAMPLE_TASK_WORDS = 18;         // a Task

// ---------------------------------------------------------------- other ops

constexpr int NORM_VALUES_PER_THREAD = 16;    // values of a row that a thread keeps in registers
constexpr int LOSS_THREADS = 1024;            // of a thread block
constexpr int ADAMW_BLOCK = 256;              // values of a block of 8-bit moments, which share a scale
