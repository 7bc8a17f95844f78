// Dot products of weight rows in ggml's own layouts with the input of an FFN: gate and up. Compiled once for each level
// of the processor, like cpu-kernels.h.
#pragma once

#include "ggml.h"

#include <cstddef>
#include <cstdint>

namespace prosparse {

// Elements are handled in chunks of 256: one block of a k-quant, eight of the others.
constexpr int64_t row_chunk = 256;

// One token's input, as the kernels of one type want it. Integers: x[i] = d[i / 32] * q[i]; 32 elements share d and s.
struct row_input {
    const int8_t *  q;    // [n_pad]
    const float *   d;    // [n_pad / 32]
    const float *   s;    // [n_pad / 32] d times the sum of its q, for types with a minimum
    const int32_t * init; // [n_pad / 4] -zero times the sums of four q, where codes start at `zero`
    const float *   f;    // [n_pad] the values themselves, for float types
};

inline int64_t padded_row(int64_t n) {
    return (n + row_chunk - 1) / row_chunk * row_chunk;
}

// Bytes that prepare() writes for one token.
inline size_t row_input_bytes(int64_t n) {
    return (size_t) padded_row(n) * 7; // f, or q, d, s and init
}

// Bytes of scratch that dot_tokens() needs.
inline size_t row_scratch_bytes(int64_t n) {
    return (size_t) padded_row(n) * 5;
}

struct row_kernels {
    const char * name;

    bool (*supports)(ggml_type type);

    // Writes the input of one token to `memory` (row_input_bytes, 64-byte aligned) and returns where things are.
    row_input (*prepare)(ggml_type type, const float * x, int64_t n, void * memory);

    // out[r] = row r . x for r in [r0, r1)
    void (*dot_range)(ggml_type type, const void * rows, size_t row_bytes, int64_t n, int64_t r0, int64_t r1,
                      const row_input& x, float * out);

    // out[k] = row list[k] . x; the next row is prefetched
    void (*dot_list)(ggml_type type, const void * rows, size_t row_bytes, int64_t n, const int32_t * list,
                     int64_t count, const row_input& x, float * out);

    // out[k] = row . x[tokens[k]]; tokens nullptr: the first `count`. The row is decoded once. scratch: 64-byte
    // aligned.
    void (*dot_tokens)(ggml_type type, const void * row, int64_t n, const row_input * x, const int32_t * tokens,
                       int64_t count, void * scratch, float * out);
};

// The best kernels that this processor runs.
const row_kernels& select_row_kernels();

// All kernels in this binary that this processor runs, worst first (for tests); returns how many.
int available_row_kernels(const row_kernels ** list, int capacity);

} // namespace prosparse
