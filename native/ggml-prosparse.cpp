// The backend's tables: buffer type, backend, device, registry, and the C API. The work is in ffn.cpp.
#include "ggml-prosparse.h"

#include "ffn.h"
#include "model.h"

#include "ggml-cpu.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <algorithm>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

using namespace prosparse;

namespace {

ggml_backend_dev_t prosparse_device();

// ---- buffer: the FFN weights of one model

struct weights_buffer {
    std::shared_ptr<sparse_model>            model; // keeps the buffer type alive, too
    void *                                   data = nullptr;
    size_t                                   size = 0;
    std::vector<std::unique_ptr<ffn_weight>> weights;

    ~weights_buffer() { free(data); }
};

sparse_model& model_of(ggml_backend_buffer_type_t buft) {
    return *(sparse_model *) buft->context;
}

// The file's tensor that `tensor` is, or nullptr (LoRA weights come to this buffer type as well).
const file_tensor * find_tensor(const sparse_model& model, const ggml_tensor * tensor) {
    const auto it = model.tensors.find(tensor->name);
    return it != model.tensors.end() && it->second.type == tensor->type && it->second.ne[0] == tensor->ne[0] &&
                   it->second.ne[1] == tensor->ne[1]
               ? &it->second
               : nullptr;
}

const down_codec * codec_of(const file_tensor * tensor) {
    return tensor != nullptr && tensor->role == weight_role::down ? find_down_codec(tensor->type) : nullptr;
}

void buffer_free(ggml_backend_buffer_t buffer) {
    delete (weights_buffer *) buffer->context;
}

void * buffer_get_base(ggml_backend_buffer_t buffer) {
    return ((weights_buffer *) buffer->context)->data;
}

ggml_status buffer_init_tensor(ggml_backend_buffer_t buffer, ggml_tensor * tensor) {
    auto&               weights = *(weights_buffer *) buffer->context;
    const file_tensor * file    = find_tensor(*weights.model, tensor);
    if (file == nullptr) {
        return GGML_STATUS_SUCCESS;
    }
    auto       weight = std::make_unique<ffn_weight>();
    const bool down   = file->role == weight_role::down;
    weight->model     = weights.model.get();
    weight->layer     = file->layer;
    weight->role      = file->role;
    weight->n_ff      = file->ne[down ? 0 : 1];
    weight->n_embd    = file->ne[down ? 1 : 0];
    weight->file      = file;
    weight->codec     = codec_of(file);
    if (weight->codec != nullptr) {
        weight->view = view_down(*weight->codec, weight->n_ff, weight->n_embd, tensor->data);
    }
    tensor->extra = weight.get();
    weights.weights.push_back(std::move(weight));
    return GGML_STATUS_SUCCESS;
}

void buffer_set_tensor(ggml_backend_buffer_t buffer, ggml_tensor * tensor, const void * data, size_t offset,
                       size_t size) {
    auto * weight = (ffn_weight *) tensor->extra;
    if (weight == nullptr || weight->codec == nullptr) {
        memcpy((char *) tensor->data + offset, data, size);
        return;
    }
    const size_t whole = ggml_nbytes(tensor);
    if (size != whole) { // in pieces: transposing needs all rows
        weight->staging.resize(whole);
        memcpy(weight->staging.data() + offset, data, size);
        weight->staged += size;
        if (weight->staged < whole) {
            return;
        }
        data = weight->staging.data();
    }
    pack_down(tensor->type, weight->n_ff, weight->n_embd, data, tensor->data);
    weight->staged = 0;
    weight->staging.clear();
    weight->staging.shrink_to_fit();
}

void buffer_get_tensor(ggml_backend_buffer_t buffer, const ggml_tensor * tensor, void * data, size_t offset,
                       size_t size) {
    const auto * weight = (const ffn_weight *) tensor->extra;
    if (weight == nullptr || weight->codec == nullptr) {
        memcpy(data, (const char *) tensor->data + offset, size);
    } else if (!read_tensor(*weight->model, *weight->file, data, offset, size)) {
        fprintf(stderr, "prosparse: %s cannot be read again from %s\n", tensor->name,
                weight->model->shards[weight->file->shard].c_str());
        memset(data, 0, size);
    }
}

void buffer_memset_tensor(ggml_backend_buffer_t buffer, ggml_tensor * tensor, uint8_t value, size_t offset,
                          size_t size) {
    memset((char *) tensor->data + offset, value, size);
}

void buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) {
    const auto& weights = *(weights_buffer *) buffer->context;
    memset(weights.data, value, weights.size);
}

constexpr ggml_backend_buffer_i buffer_interface = {
    /* .free_buffer   = */ buffer_free,
    /* .get_base      = */ buffer_get_base,
    /* .init_tensor   = */ buffer_init_tensor,
    /* .memset_tensor = */ buffer_memset_tensor,
    /* .set_tensor    = */ buffer_set_tensor,
    /* .get_tensor    = */ buffer_get_tensor,
    /* .set_tensor_2d = */ nullptr,
    /* .get_tensor_2d = */ nullptr,
    /* .cpy_tensor    = */ nullptr,
    /* .clear         = */ buffer_clear,
    /* .reset         = */ nullptr,
};

// ---- buffer type: one for each model. Not a host type, so that the loader hands every tensor to set_tensor.

constexpr size_t alignment = 64;
constexpr size_t huge_page = 2u << 20;

const char * buft_get_name(ggml_backend_buffer_type_t buft) {
    return "ProSparse";
}

ggml_backend_buffer_t buft_alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    auto         weights = std::make_unique<weights_buffer>();
    const size_t rounded = (size + huge_page - 1) / huge_page * huge_page;
    weights->model       = model_of(buft).shared_from_this();
    weights->size        = size;
    if (posix_memalign(&weights->data, huge_page, rounded) != 0) {
        fprintf(stderr, "prosparse: no memory for %zu MiB of FFN weights\n", size >> 20);
        return nullptr;
    }
#ifdef __linux__
    madvise(weights->data, rounded, MADV_HUGEPAGE);
#endif
    return ggml_backend_buffer_init(buft, buffer_interface, weights.release(), size);
}

size_t buft_get_alignment(ggml_backend_buffer_type_t buft) {
    return alignment;
}

size_t buft_get_alloc_size(ggml_backend_buffer_type_t buft, const ggml_tensor * tensor) {
    const file_tensor * file  = find_tensor(model_of(buft), tensor);
    const down_codec *  codec = codec_of(file);
    const size_t        size  = ggml_nbytes(tensor);
    return codec != nullptr ? std::max(size, down_size(*codec, file->ne[0], file->ne[1])) : size;
}

bool buft_is_host(ggml_backend_buffer_type_t buft) {
    return false;
}

constexpr ggml_backend_buffer_type_i buft_interface = {
    /* .get_name       = */ buft_get_name,
    /* .alloc_buffer   = */ buft_alloc_buffer,
    /* .get_alignment  = */ buft_get_alignment,
    /* .get_max_size   = */ nullptr,
    /* .get_alloc_size = */ buft_get_alloc_size,
    /* .is_host        = */ buft_is_host,
};

// ---- backend

const char * backend_get_name(ggml_backend_t backend) {
    return "ProSparse";
}

void backend_free(ggml_backend_t backend) {
    delete (ffn_context *) backend->context;
    delete backend;
}

ggml_status backend_graph_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    try {
        return compute_graph(*(ffn_context *) backend->context, graph);
    } catch (const std::bad_alloc&) {
        fprintf(stderr, "prosparse: out of memory while computing\n");
        return GGML_STATUS_ALLOC_FAILED;
    }
}

void backend_set_n_threads(ggml_backend_t backend, int n_threads) {
    ((ffn_context *) backend->context)->n_threads = std::max(1, n_threads);
}

constexpr ggml_backend_i backend_interface = {
    /* .get_name            = */ backend_get_name,
    /* .free                = */ backend_free,
    /* .set_tensor_async    = */ nullptr,
    /* .get_tensor_async    = */ nullptr,
    /* .set_tensor_2d_async = */ nullptr,
    /* .get_tensor_2d_async = */ nullptr,
    /* .cpy_tensor_async    = */ nullptr,
    /* .synchronize         = */ nullptr,
    /* .graph_plan_create   = */ nullptr,
    /* .graph_plan_free     = */ nullptr,
    /* .graph_plan_update   = */ nullptr,
    /* .graph_plan_compute  = */ nullptr,
    /* .graph_compute       = */ backend_graph_compute,
    /* .event_record        = */ nullptr,
    /* .event_wait          = */ nullptr,
    /* .graph_optimize      = */ nullptr,
};

ggml_guid_t backend_guid() {
    static ggml_guid guid = {0x70, 0x72, 0x6f, 0x73, 0x70, 0x61, 0x72, 0x73,
                             0x65, 0x2d, 0x66, 0x66, 0x6e, 0x2d, 0x30, 0x31};
    return &guid;
}

// ---- device: an accelerator, so that every llama_context makes a backend of ours. Its own buffer type is the CPU's:
// activations stay where they are, and no model's weights come here unless they are sent.

const char * device_get_name(ggml_backend_dev_t device) {
    return "ProSparse";
}

const char * device_get_description(ggml_backend_dev_t device) {
    return "ReLU-sparse feed-forward networks";
}

void device_get_memory(ggml_backend_dev_t device, size_t * free, size_t * total) {
    *free  = 0;
    *total = 0;
}

enum ggml_backend_dev_type device_get_type(ggml_backend_dev_t device) {
    return GGML_BACKEND_DEVICE_TYPE_ACCEL;
}

void device_get_props(ggml_backend_dev_t device, ggml_backend_dev_props * props) {
    memset(props, 0, sizeof(*props));
    props->name        = device_get_name(device);
    props->description = device_get_description(device);
    props->type        = device_get_type(device);
}

ggml_backend_t device_init_backend(ggml_backend_dev_t device, const char * params) {
    return new (std::nothrow) ggml_backend{
        /* .guid    = */ backend_guid(),
        /* .iface   = */ backend_interface,
        /* .device  = */ device,
        /* .context = */ new ffn_context,
    };
}

ggml_backend_buffer_type_t device_get_buffer_type(ggml_backend_dev_t device) {
    return ggml_backend_cpu_buffer_type();
}

bool device_supports_op(ggml_backend_dev_t device, const ggml_tensor * op) {
    return supports_op(op);
}

bool device_supports_buft(ggml_backend_dev_t device, ggml_backend_buffer_type_t buft) {
    return is_prosparse_buffer_type(buft) || ggml_backend_buft_is_host(buft);
}

constexpr ggml_backend_device_i device_interface = {
    /* .get_name             = */ device_get_name,
    /* .get_description      = */ device_get_description,
    /* .get_memory           = */ device_get_memory,
    /* .get_type             = */ device_get_type,
    /* .get_props            = */ device_get_props,
    /* .init_backend         = */ device_init_backend,
    /* .get_buffer_type      = */ device_get_buffer_type,
    /* .get_host_buffer_type = */ nullptr,
    /* .buffer_from_host_ptr = */ nullptr,
    /* .supports_op          = */ device_supports_op,
    /* .supports_buft        = */ device_supports_buft,
    /* .offload_op           = */ nullptr,
    /* .event_new            = */ nullptr,
    /* .event_free           = */ nullptr,
    /* .event_synchronize    = */ nullptr,
};

// ---- registry

const char * reg_get_name(ggml_backend_reg_t reg) {
    return "ProSparse";
}

size_t reg_get_device_count(ggml_backend_reg_t reg) {
    return 1;
}

ggml_backend_dev_t reg_get_device(ggml_backend_reg_t reg, size_t index) {
    return prosparse_device();
}

void * reg_get_proc_address(ggml_backend_reg_t reg, const char * name) {
    return strcmp(name, "ggml_backend_set_n_threads") == 0 ? (void *) backend_set_n_threads : nullptr;
}

ggml_backend_reg_t prosparse_reg() {
    static ggml_backend_reg reg = {
        /* .api_version = */ GGML_BACKEND_API_VERSION,
        /* .iface       = */ {reg_get_name, reg_get_device_count, reg_get_device, reg_get_proc_address},
        /* .context     = */ nullptr,
    };
    return &reg;
}

ggml_backend_dev_t prosparse_device() {
    static ggml_backend_device device = {
        /* .iface   = */ device_interface,
        /* .reg     = */ prosparse_reg(),
        /* .context = */ nullptr,
    };
    return &device;
}

} // namespace

bool prosparse::is_prosparse_buffer_type(ggml_backend_buffer_type_t buft) {
    return buft != nullptr && buft->iface.alloc_buffer == buft_alloc_buffer;
}

// ---- C API

struct prosparse_model {
    std::shared_ptr<sparse_model> model;
};

extern "C" {

int prosparse_api_version(void) {
    return PROSPARSE_API_VERSION;
}

const char * prosparse_built_for_ggml(void) {
    return PROSPARSE_GGML_VERSION;
}

const char * prosparse_kernels(void) {
    return select_kernels().name;
}

const char * prosparse_abi_error(void) {
    static const std::string error = []() -> std::string {
        const std::string built = "this library was built for ggml " PROSPARSE_GGML_VERSION
                                  " of llama-cpp-python " PROSPARSE_LLAMA_CPP_PYTHON_VERSION;
        if (strcmp(ggml_version(), PROSPARSE_GGML_VERSION) != 0) {
            return built + ", and ggml " + ggml_version() + " is loaded";
        }
        // the same version with other numbers: a build with patches
        const bool same_numbers =
            strcmp(ggml_op_name(GGML_OP_MUL_MAT), "MUL_MAT") == 0 && strcmp(ggml_op_name(GGML_OP_MUL), "MUL") == 0 &&
            strcmp(ggml_op_name(GGML_OP_GLU), "GLU") == 0 && strcmp(ggml_type_name(GGML_TYPE_Q4_0), "q4_0") == 0 &&
            strcmp(ggml_type_name(GGML_TYPE_Q6_K), "q6_K") == 0 &&
            strcmp(ggml_type_name(GGML_TYPE_BF16), "bf16") == 0 && ggml_tensor_overhead() >= sizeof(ggml_tensor) &&
            ggml_tensor_overhead() <= sizeof(ggml_tensor) + 64;
        return same_numbers ? "" : built + ", and the loaded ggml of the same version differs from it";
    }();
    return error.empty() ? nullptr : error.c_str();
}

struct prosparse_model * prosparse_model_open(const char * path, char * error, size_t error_size, bool * is_dense) {
    std::string text;
    bool        dense = false;
    auto        model = open_model(path, text, dense);
    if (is_dense != nullptr) {
        *is_dense = dense;
    }
    if (model == nullptr) {
        snprintf(error, error_size, "%s", text.c_str());
        return nullptr;
    }
    model->buft = {buft_interface, prosparse_device(), model.get()};
    return new prosparse_model{model};
}

void prosparse_model_free(struct prosparse_model * model) {
    delete model;
}

ggml_backend_buffer_type_t prosparse_model_buffer_type(struct prosparse_model * model) {
    return &model->model->buft;
}

void prosparse_model_set_sparse(struct prosparse_model * model, bool sparse) {
    model->model->sparse.store(sparse, std::memory_order_relaxed);
}

int prosparse_model_n_layer(const struct prosparse_model * model) {
    return model->model->n_layer;
}

void prosparse_model_stats(struct prosparse_model * model, struct prosparse_layer_stats * stats, bool reset) {
    for (int il = 0; il < model->model->n_layer; ++il) {
        layer_counters& counters = model->model->counters[il];
        stats[il] = {counters.n_tokens.load(), counters.n_active.load(), (uint64_t) model->model->n_ff[il]};
        if (reset) {
            counters.n_tokens.store(0);
            counters.n_active.store(0);
        }
    }
}

// What ggml_backend_load() calls. NULL refuses: structs and operation numbers of another ggml would be read wrongly.
PROSPARSE_API ggml_backend_reg_t ggml_backend_init(void);

ggml_backend_reg_t ggml_backend_init(void) {
    const char * error = prosparse_abi_error();
    if (error != nullptr) {
        fprintf(stderr, "prosparse: %s: reinstall prosparse-pipe\n", error);
        return nullptr;
    }
    return prosparse_reg();
}

} // extern "C"
