// Kernels of the sparse FFN that are compiled once for each level of the processor.
#pragma once

#include <cstddef>
#include <cstdint>

namespace prosparse {

// Embedding elements are handled in chunks: the codes of one neuron for one chunk lie together.
constexpr int chunk_size = 32;

// How the elements of a transposed down matrix are coded: value = scale * level(code) + offset, where
//   level(code) = code - zero, or table[code]
//   scale       = d                                      (one factor per block of neurons)
//               = d * sub_scale                          (k-quants)
//   offset      = m, or -(dmin * sub_min), or none
struct down_codec {
    enum class scales : uint8_t { none, d, d_m, d_sc, d_sc4_dmin_mn4, d_sc_dmin_mn };

    int            low_bits;  // 32 and 16 (floats), 8, 4 or 2
    int            high_bits; // further bits in a plane of their own: 0, 1 or 2
    int            zero;      // subtracted from the code
    bool           is_signed; // an 8-bit code is int8
    bool           is_bf16;   // of 16-bit floats
    scales         kind;      //
    int            group;     // neurons that share one scale (sub-scale of k-quants)
    int            super;     // neurons that share one d
    int            zero_sc;   // subtracted from the sub-scale
    const int8_t * table;     // 16 levels, or nullptr

    bool   is_float() const { return kind == scales::none; }
    size_t low_bytes() const { return (size_t) chunk_size * low_bits / 8; }   // of one chunk
    size_t high_bytes() const { return (size_t) chunk_size * high_bits / 8; } // of one chunk
};

// A down matrix, neuron-major. All arrays are padded to n_chunks * chunk_size embedding elements (n_pad).
struct down_view {
    const down_codec * codec;
    int64_t            n_ff;
    int64_t            n_embd;
    int64_t            n_chunks;
    const uint8_t *    low;  // [n_ff][n_chunks][low_bytes]
    const uint8_t *    high; // [n_ff][n_chunks][high_bytes]
    const uint16_t *   d;    // f16 [n_ff / super][n_pad]
    const uint16_t *   m;    // f16 [n_ff / super][n_pad]: m or dmin
    const uint8_t *    sc;   // [n_ff / group][n_pad]
    const uint8_t *    mn;   // [n_ff / group][n_pad]
};

struct cpu_kernels {
    const char * name;

    // y[e] += sum over the n given neurons of h[k] * W[neuron[k]][e], e in the chunks [c0, c1).
    // neurons: ascending. y: f32, n_pad elements from chunk 0.
    void (*accumulate)(const down_view& view, const int32_t * neurons, const float * h, int64_t n, float * y,
                       int64_t c0, int64_t c1);

    // out[k][e - c0 * chunk_size] = W[neuron0 + k][e] for n neurons of one group, e in the chunks [c0, c1), f32.
    void (*dequantize)(const down_view& view, int64_t neuron0, int64_t n, float * out, int64_t c0, int64_t c1);

    // y[t][i] += sum over k of h[t][k] * tile[k][i], skipping zeros of h. tile: n_rows x n; strides in elements.
    void (*multiply_tile)(const float * tile, int64_t n_rows, int64_t n, const float * h, size_t h_stride, float * y,
                          size_t y_stride, int64_t n_tokens);
};

// The best kernels that this processor runs.
const cpu_kernels& select_kernels();

// All kernels in this binary that this processor runs, worst first (for tests); returns how many.
int available_kernels(const cpu_kernels ** list, int capacity);

} // namespace prosparse
