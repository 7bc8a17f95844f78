#include "model.h"

#include "gguf.h"

#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>

namespace prosparse {
namespace {

struct gguf_deleter {
    void operator()(gguf_context * gguf) const { gguf_free(gguf); }
};
struct ggml_deleter {
    void operator()(ggml_context * context) const { ggml_free(context); }
};

// The header of one GGUF file; `meta` holds the tensors' types and shapes.
struct gguf_file {
    std::unique_ptr<gguf_context, gguf_deleter> gguf;
    std::unique_ptr<ggml_context, ggml_deleter> meta;
};

// Thrown inside this file only, and turned into the one line that the caller gets.
struct open_error {
    std::string text;
};

gguf_file read_header(const std::string& path) {
    std::error_code code;
    const auto      file_size = std::filesystem::file_size(path, code);
    if (code) {
        throw open_error{path + " cannot be opened: " + code.message()};
    }
    ggml_context *   meta   = nullptr;
    gguf_init_params params = {/* .no_alloc = */ true, /* .ctx = */ &meta};
    gguf_file        file;
    file.gguf.reset(gguf_init_from_file(path.c_str(), params));
    file.meta.reset(meta);
    if (!file.gguf) {
        throw open_error{path + " is not a GGUF file, or its header is damaged"};
    }
    const size_t  data = gguf_get_data_offset(file.gguf.get());
    const int64_t n    = gguf_get_n_tensors(file.gguf.get());
    for (int64_t i = 0; i < n; ++i) {
        if (data + gguf_get_tensor_offset(file.gguf.get(), i) + gguf_get_tensor_size(file.gguf.get(), i) > file_size) {
            throw open_error{path + " is truncated: the data of " + gguf_get_tensor_name(file.gguf.get(), i) +
                             " lies beyond its end"};
        }
    }
    return file;
}

// Key `name` if the file has it with the type wanted, else -1.
int64_t find_key(const gguf_context * gguf, const std::string& name, gguf_type type) {
    const int64_t key = gguf_find_key(gguf, name.c_str());
    return key >= 0 && gguf_get_kv_type(gguf, key) == type ? key : -1;
}

int64_t require_key(const gguf_context * gguf, const std::string& path, const char * name, gguf_type type) {
    const int64_t key = find_key(gguf, name, type);
    if (key < 0) {
        throw open_error{path + ": the key " + name + " is missing or not of type " + gguf_type_name(type)};
    }
    return key;
}

// Names of all shards of a split file, of which `path` is the first.
std::vector<std::string> shard_paths(const gguf_context * gguf, const std::string& path) {
    const int64_t key   = find_key(gguf, "split.count", GGUF_TYPE_UINT16);
    const int     count = key >= 0 ? gguf_get_val_u16(gguf, key) : 1;
    if (count <= 1) {
        return {path};
    }
    char suffix[40];
    snprintf(suffix, sizeof(suffix), "-%05d-of-%05d.gguf", 1, count);
    const size_t stem = path.size() > strlen(suffix) ? path.size() - strlen(suffix) : 0;
    if (path.compare(stem, std::string::npos, suffix) != 0) {
        throw open_error{path + " is one of " + std::to_string(count) + " shards: give the first, NAME" + suffix};
    }
    std::vector<std::string> paths;
    for (int i = 1; i <= count; ++i) {
        snprintf(suffix, sizeof(suffix), "-%05d-of-%05d.gguf", i, count);
        paths.push_back(path.substr(0, stem) + suffix);
    }
    return paths;
}

// "blk.7.ffn_up.weight" -> layer and role; false for any other name
bool parse_name(const char * name, int& layer, weight_role& role) {
    char part[8], kind[8];
    int  length = 0;
    if (sscanf(name, "blk.%d.ffn_%7[a-z].%7[a-z]%n", &layer, part, kind, &length) != 3 || name[length] != '\0') {
        return false;
    }
    const bool scale = strcmp(kind, "scale") == 0;
    if (!scale && strcmp(kind, "weight") != 0) {
        return false;
    }
    if (strcmp(part, "gate") == 0) {
        role = scale ? weight_role::scale : weight_role::gate;
    } else if (strcmp(part, "up") == 0) {
        role = scale ? weight_role::scale : weight_role::up;
    } else if (strcmp(part, "down") == 0) {
        role = scale ? weight_role::scale : weight_role::down;
    } else {
        return false;
    }
    return true;
}

void read_keys(const gguf_context * gguf, const std::string& path, sparse_model& model) {
    const int64_t  key     = require_key(gguf, path, "prosparse.version", GGUF_TYPE_UINT32);
    const uint32_t version = gguf_get_val_u32(gguf, key);
    if (version != 1) {
        throw open_error{path + " has the format prosparse.version " + std::to_string(version) +
                         ", this build reads version 1: update prosparse-pipe"};
    }
    const std::string activation =
        gguf_get_val_str(gguf, require_key(gguf, path, "prosparse.activation", GGUF_TYPE_STRING));
    if (activation != "relu" && activation != "fatrelu") {
        throw open_error{path + ": prosparse.activation is '" + activation + "', known are relu and fatrelu"};
    }
    model.threshold = gguf_get_val_f32(gguf, require_key(gguf, path, "prosparse.threshold", GGUF_TYPE_FLOAT32));
    if (!std::isfinite(model.threshold) || model.threshold < 0.0f) {
        throw open_error{path + ": prosparse.threshold must be 0 or a positive number"};
    }
    const char * architecture =
        gguf_get_val_str(gguf, require_key(gguf, path, "general.architecture", GGUF_TYPE_STRING));
    const std::string block_count = std::string(architecture) + ".block_count";
    model.n_layer = (int) gguf_get_val_u32(gguf, require_key(gguf, path, block_count.c_str(), GGUF_TYPE_UINT32));
}

void read_tensors(const gguf_file& file, size_t shard, sparse_model& model) {
    const int64_t n = gguf_get_n_tensors(file.gguf.get());
    for (int64_t i = 0; i < n; ++i) {
        const char * name = gguf_get_tensor_name(file.gguf.get(), i);
        file_tensor  tensor;
        if (!parse_name(name, tensor.layer, tensor.role) || tensor.layer < 0 || tensor.layer >= model.n_layer) {
            continue;
        }
        const ggml_tensor * meta = ggml_get_tensor(file.meta.get(), name);
        tensor.type              = meta->type;
        tensor.ne[0]             = meta->ne[0];
        tensor.ne[1]             = meta->ne[1];
        tensor.shard             = shard;
        tensor.offset            = gguf_get_data_offset(file.gguf.get()) + gguf_get_tensor_offset(file.gguf.get(), i);
        tensor.size              = gguf_get_tensor_size(file.gguf.get(), i);
        model.tensors[name]      = tensor;
    }
}

void check_layers(const std::string& path, sparse_model& model) {
    auto require = [&](int il, const char * what) -> const file_tensor& {
        const std::string name = "blk." + std::to_string(il) + ".ffn_" + what;
        const auto        it   = model.tensors.find(name);
        if (it == model.tensors.end()) {
            throw open_error{path + " lacks the tensor " + name + ": export it again"};
        }
        return it->second;
    };
    for (int il = 0; il < model.n_layer; ++il) {
        const file_tensor& gate = require(il, "gate.weight");
        const file_tensor& up   = require(il, "up.weight");
        const file_tensor& down = require(il, "down.weight");
        for (const char * name : {"gate.scale", "up.scale"}) {
            const file_tensor& scale = require(il, name);
            if (scale.type != GGML_TYPE_F32 || scale.ne[0] != 1 || scale.ne[1] != 1) {
                throw open_error{path + ": blk." + std::to_string(il) + ".ffn_" + name +
                                 " must be one F32 value: export it again"};
            }
        }
        if (up.ne[0] != gate.ne[0] || up.ne[1] != gate.ne[1] || down.ne[0] != gate.ne[1] || down.ne[1] != gate.ne[0]) {
            throw open_error{path + ": the FFN tensors of layer " + std::to_string(il) + " do not fit each other"};
        }
        model.n_ff.push_back(gate.ne[1]);
    }
}

} // namespace

std::shared_ptr<sparse_model> open_model(const std::string& path, std::string& error, bool& is_dense) {
    is_dense = false;
    try {
        auto      model = std::make_shared<sparse_model>();
        gguf_file first = read_header(path);
        if (gguf_find_key(first.gguf.get(), "prosparse.version") < 0) {
            is_dense = true;
            throw open_error{path + " has no prosparse keys: it is a dense model"};
        }
        read_keys(first.gguf.get(), path, *model);
        model->shards = shard_paths(first.gguf.get(), path);
        read_tensors(first, 0, *model);
        for (size_t shard = 1; shard < model->shards.size(); ++shard) {
            read_tensors(read_header(model->shards[shard]), shard, *model);
        }
        check_layers(path, *model);
        model->counters = std::make_unique<layer_counters[]>(model->n_layer);
        return model;
    } catch (const open_error& e) {
        error = e.text;
    } catch (const std::exception& e) {
        error = path + " cannot be read: " + e.what();
    }
    return nullptr;
}

bool read_tensor(const sparse_model& model, const file_tensor& tensor, void * data, size_t offset, size_t size) {
    std::ifstream file(model.shards[tensor.shard], std::ios::binary);
    file.seekg((std::streamoff) (tensor.offset + offset));
    file.read((char *) data, (std::streamsize) size);
    return file.good();
}

} // namespace prosparse
