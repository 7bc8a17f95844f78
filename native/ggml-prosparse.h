// C API of libggml-prosparse: a ggml backend that computes ReLU-sparse feed-forward networks.
//
// Load it with ggml_backend_load(), open a model file, and send the FFN tensors of that file to the model's buffer type
// (llama_model_params.tensor_buft_overrides). Everything else of llama.cpp stays as it is. See docs/backend.md.
#pragma once

#include "ggml-backend.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PROSPARSE_API __attribute__((visibility("default")))

// Version of this header's functions and structs; the Python binding refuses another one.
#define PROSPARSE_API_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif

struct prosparse_model;

// Neurons that were active while computing one layer, since the last reset.
struct prosparse_layer_stats {
    uint64_t n_tokens; // tokens computed
    uint64_t n_active; // sum over those tokens of the active neurons
    uint64_t n_ff;     // neurons of the layer
};

PROSPARSE_API int prosparse_api_version(void);

// Version of ggml that this library was built against, e.g. "0.25.3".
PROSPARSE_API const char * prosparse_built_for_ggml(void);

// Name of the kernels chosen for this processor: "x86-64-v4", "x86-64-v3", "baseline".
PROSPARSE_API const char * prosparse_kernels(void);

// Why this library must not be used with the ggml of this process, or NULL if it may.
PROSPARSE_API const char * prosparse_abi_error(void);

// Reads the prosparse.* keys and the FFN tensors' shapes of a GGUF file (the first shard of a split one).
// Returns NULL and writes one line to `error` if the file is missing, truncated, dense or not understood.
// `*is_dense` tells a valid GGUF without our keys from a broken one; it may be NULL.
PROSPARSE_API struct prosparse_model * prosparse_model_open(const char * path, char * error, size_t error_size,
                                                            bool * is_dense);

// Drops the handle. Buffers that are still allocated keep what they need alive.
PROSPARSE_API void prosparse_model_free(struct prosparse_model * model);

// Where the tensors named blk.N.ffn_{gate,up,down}.{weight,scale} of this file go.
PROSPARSE_API ggml_backend_buffer_type_t prosparse_model_buffer_type(struct prosparse_model * model);

// false: compute every neuron, for comparison. Default true.
PROSPARSE_API void prosparse_model_set_sparse(struct prosparse_model * model, bool sparse);

PROSPARSE_API int prosparse_model_n_layer(const struct prosparse_model * model);

// Writes the counters of all layers to `stats` (n_layer entries) and sets them to zero if `reset`.
PROSPARSE_API void prosparse_model_stats(struct prosparse_model * model, struct prosparse_layer_stats * stats,
                                         bool reset);

#ifdef __cplusplus
}
#endif
