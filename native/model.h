// What the backend knows of one GGUF file: its prosparse.* keys, its FFN tensors, and the counters of active neurons.
#pragma once

#include "down-matrix.h"

#include "ggml-backend-impl.h"

#include <atomic>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace prosparse {

enum class weight_role : uint8_t { gate, up, down, scale };

// An FFN tensor as the file describes it.
struct file_tensor {
    int         layer;
    weight_role role;
    ggml_type   type;
    int64_t     ne[2];
    size_t      shard;  // index into sparse_model::shards
    size_t      offset; // bytes from the start of the shard
    size_t      size;   // bytes
};

// Hangs on ggml_tensor::extra of an FFN weight in one of our buffers.
struct ffn_weight {
    struct sparse_model * model;
    int                   layer;
    weight_role           role;
    int64_t               n_ff;
    int64_t               n_embd;
    const file_tensor *   file;
    const down_codec *    codec = nullptr; // of a transposed down matrix
    down_view             view  = {};      // likewise
    std::vector<uint8_t>  staging;         // a down matrix that arrives in pieces
    size_t                staged = 0;      // bytes
};

struct layer_counters {
    std::atomic<uint64_t> n_tokens{0};
    std::atomic<uint64_t> n_active{0};
};

struct sparse_model : std::enable_shared_from_this<sparse_model> {
    std::vector<std::string>                     shards;           // paths
    float                                        threshold = 0.0f; // FATReLU: active if gate > 0 and gate >= threshold
    int                                          n_layer   = 0;
    std::unordered_map<std::string, file_tensor> tensors;
    std::vector<int64_t>                         n_ff; // of each layer
    std::unique_ptr<layer_counters[]>            counters;
    std::atomic<bool>                            sparse{true};
    ggml_backend_buffer_type                     buft = {};
};

// Reads the header of `path`, or explains in one line why not. `is_dense`: a valid GGUF without prosparse keys.
std::shared_ptr<sparse_model> open_model(const std::string& path, std::string& error, bool& is_dense);

// Reads a tensor's bytes again from its file; false if that fails.
bool read_tensor(const sparse_model& model, const file_tensor& tensor, void * data, size_t offset, size_t size);

} // namespace prosparse
