// prosparse_model_open: what it accepts, what it refuses and how it says so, and damaged files at every length.
#include "ggml-prosparse.h"

#include "gguf.h"

#include "check.h"

#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <string>

namespace {

struct file_options {
    std::function<void(gguf_context *)> keys = [](gguf_context *) {}; // changes after the right keys are set
    std::string                         without;                      // a tensor to leave out
    int64_t                             n_ff_down = 64;
    ggml_type                           scale     = GGML_TYPE_F32;
    int64_t                             n_scale   = 1;
};

void write_file(const std::string& path, const file_options& options) {
    ggml_context * context = ggml_init({1 << 20, nullptr, false});
    gguf_context * gguf    = gguf_init_empty();
    gguf_set_val_str(gguf, "general.architecture", "llama");
    gguf_set_val_u32(gguf, "llama.block_count", 2);
    gguf_set_val_u32(gguf, "prosparse.version", 1);
    gguf_set_val_str(gguf, "prosparse.activation", "fatrelu");
    gguf_set_val_f32(gguf, "prosparse.threshold", 0.5f);
    options.keys(gguf);
    for (int il = 0; il < 2; ++il) {
        auto add = [&](const char * name, ggml_type type, int64_t ne0, int64_t ne1) {
            ggml_tensor * tensor = ggml_new_tensor_2d(context, type, ne0, ne1);
            ggml_format_name(tensor, "blk.%d.ffn_%s", il, name);
            memset(tensor->data, 0, ggml_nbytes(tensor));
            if (options.without != tensor->name) {
                gguf_add_tensor(gguf, tensor);
            }
        };
        add("gate.weight", GGML_TYPE_F16, 32, 64);
        add("up.weight", GGML_TYPE_F16, 32, 64);
        add("down.weight", GGML_TYPE_F16, options.n_ff_down, 32);
        add("gate.scale", options.scale, options.n_scale, 1);
        add("up.scale", options.scale, options.n_scale, 1);
        add("norm.weight", GGML_TYPE_F32, 32, 1); // not ours
    }
    CHECK(gguf_write_to_file(gguf, path.c_str(), false), "%s", path.c_str());
    gguf_free(gguf);
    ggml_free(context);
}

// Opens and closes; returns the error, "" if there is none.
std::string open_error(const std::string& path, bool * is_dense = nullptr) {
    char              error[512] = "";
    bool              dense      = false;
    prosparse_model * model      = prosparse_model_open(path.c_str(), error, sizeof(error), &dense);
    CHECK((model == nullptr) == (error[0] != '\0'), "%s", error);
    CHECK(strchr(error, '\n') == nullptr, "%s", error);
    if (model != nullptr) {
        CHECK(prosparse_model_n_layer(model) == 2, "layers");
        CHECK(!ggml_backend_buft_is_host(prosparse_model_buffer_type(model)), "set_tensor would be skipped");
        prosparse_layer_stats stats[2];
        prosparse_model_stats(model, stats, true);
        CHECK(stats[1].n_ff == 64 && stats[1].n_tokens == 0 && stats[1].n_active == 0, "stats");
        prosparse_model_free(model);
    }
    if (is_dense != nullptr) {
        *is_dense = dense;
    }
    return error;
}

void expect(const std::string& path, const file_options& options, const char * text) {
    write_file(path, options);
    const std::string error = open_error(path);
    CHECK(error.find(text) != std::string::npos, "expected '%s', got '%s'", text, error.c_str());
}

void test_truncated(const std::string& path) {
    write_file(path, {});
    std::ifstream     in(path, std::ios::binary);
    const std::string content((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
    const size_t      step = content.size() / 40;
    for (size_t size = 0; size + 64 < content.size(); size += step) { // the last bytes are padding
        std::ofstream(path, std::ios::binary).write(content.data(), (std::streamsize) size);
        CHECK(open_error(path) != "", "%zu of %zu bytes are accepted", size, content.size());
    }
}

} // namespace

int main(int argc, char ** argv) {
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr); // gguf's own complaints about damaged files
    const std::string path = std::string(argc > 0 ? argv[0] : "test-model") + ".gguf";
    expect(path, {}, "");
    CHECK(open_error(path) == "", "the right file is refused");
    bool         is_dense;
    file_options o;

    o.keys = [](gguf_context * g) { gguf_remove_key(g, "prosparse.version"); };
    expect(path, o, "no prosparse keys");
    open_error(path, &is_dense);
    CHECK(is_dense, "a GGUF without our keys is a dense model");
    o.keys = [](gguf_context * g) { gguf_set_val_u32(g, "prosparse.version", 7); };
    expect(path, o, "version 7");
    open_error(path, &is_dense);
    CHECK(!is_dense, "a newer format is no dense model");
    o.keys = [](gguf_context * g) { gguf_set_val_str(g, "prosparse.version", "1"); };
    expect(path, o, "prosparse.version");
    o.keys = [](gguf_context * g) { gguf_set_val_str(g, "prosparse.activation", "gelu"); };
    expect(path, o, "gelu");
    o.keys = [](gguf_context * g) { gguf_set_val_f32(g, "prosparse.threshold", -1.0f); };
    expect(path, o, "prosparse.threshold");
    o.keys = [](gguf_context * g) { gguf_remove_key(g, "prosparse.threshold"); };
    expect(path, o, "prosparse.threshold");
    o.keys = [](gguf_context * g) { gguf_set_val_u32(g, "llama.block_count", 3); };
    expect(path, o, "blk.2.ffn_gate.weight");
    o.keys = [](gguf_context * g) { gguf_remove_key(g, "general.architecture"); };
    expect(path, o, "general.architecture");

    o = {};
    for (const char * name : {"blk.1.ffn_gate.weight", "blk.0.ffn_up.weight", "blk.1.ffn_down.weight",
                              "blk.0.ffn_gate.scale", "blk.1.ffn_up.scale"}) {
        o.without = name;
        expect(path, o, name);
    }
    o           = {};
    o.n_ff_down = 96;
    expect(path, o, "layer 0");
    o       = {};
    o.scale = GGML_TYPE_F16;
    expect(path, o, "one F32 value");
    o         = {};
    o.n_scale = 2;
    expect(path, o, "one F32 value");

    test_truncated(path);
    remove(path.c_str());
    CHECK(open_error(path).find("cannot be opened") != std::string::npos, "a missing file");
    CHECK(open_error(".") != "", "a folder");
    return report("test-model");
}
