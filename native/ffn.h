// Computes the parts of a graph that the scheduler gives to our backend: feed-forward networks whose weights lie in our
// buffers, sparsely where the whole FFN is there, node by node where something (LoRA, an eval callback) is in between.
#pragma once

#include "model.h"

#include <vector>

namespace prosparse {

// State of one backend instance; grows to what the largest layer needs and is then reused, token after token.
struct ffn_context {
    int                        n_threads = 4;
    std::vector<ggml_tensor *> pending; // nodes seen and not computed yet: perhaps the front part of an FFN

    std::vector<uint8_t> graph_memory; // of the small graphs given to ggml-cpu
    std::vector<uint8_t> graph_work;   // ggml-cpu's own scratch
    std::vector<uint8_t> inputs;       // x as the row kernels want it, for each thread or token
    std::vector<uint8_t> decoded;      // [n_threads] a decoded row
    std::vector<float>   values;       // [n_tokens][n_ff] gate, or gate * up
    std::vector<int32_t> candidates;   // [n_ff] active neurons, in the part of the thread that found them
    std::vector<int32_t> neurons;      // [n_tokens][n_ff] active neurons
    std::vector<float>   activations;  // [n_tokens][n_ff] their values
    std::vector<int64_t> counts;       // per thread or token
    std::vector<float>   sums;         // padded results
    std::vector<float>   tiles;        // [n_threads] dequantized tiles
    std::vector<float>   packed;       // [n_threads][n_tokens] activations of a tile's rows
};

// Whether our backend computes `op`: everything that reads a weight in our buffers, and the GLU between.
bool supports_op(const ggml_tensor * op);

ggml_status compute_graph(ffn_context& context, ggml_cgraph * graph);

// Our buffer types, of any model.
bool is_prosparse_buffer_type(ggml_backend_buffer_type_t buft);

} // namespace prosparse
