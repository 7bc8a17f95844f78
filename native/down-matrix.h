// The down matrix of an FFN, transposed without loss.
//
// A sparse token needs columns of W_down, and GGUF stores rows, quantized in blocks along n_ff. Quantizing again along
// the other axis would ruin it, so the original codes are kept, neuron-major, and the original block scales become
// vectors over the embedding that the neurons of a block share. Every value stays what ggml's to_float gives.
#pragma once

#include "cpu-kernels.h"

#include "ggml.h"

namespace prosparse {

// The codec of a type, or nullptr for types that keep their layout and are computed densely (IQ1, IQ2, IQ3, TQ, MXFP4
// ...).
const down_codec * find_down_codec(ggml_type type);

// Bytes that a transposed matrix takes.
size_t down_size(const down_codec& codec, int64_t n_ff, int64_t n_embd);

// The arrays inside `data`, which holds down_size bytes and is 64-byte aligned.
down_view view_down(const down_codec& codec, int64_t n_ff, int64_t n_embd, const void * data);

// Transposes `rows`: n_embd rows of n_ff elements as GGUF stores them, into `data`. Uses all OpenMP threads.
void pack_down(ggml_type type, int64_t n_ff, int64_t n_embd, const void * rows, void * data);

} // namespace prosparse
