// The whole FFN as a ggml graph in our backend, against a reference in double: every type, sparse and node by node,
// odd numbers of tokens and threads, thresholds, NaN, and a down matrix of another type.
#include "ggml-prosparse.h"

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "gguf.h"

#include "check.h"
#include "row-kernels.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

extern "C" ggml_backend_reg_t ggml_backend_init(void);

using namespace prosparse;

namespace {

constexpr float relu_scale = 65536.0f; // K

struct context_deleter {
    void operator()(ggml_context * c) const { ggml_free(c); }
};
struct buffer_deleter {
    void operator()(ggml_backend_buffer_t b) const { ggml_backend_buffer_free(b); }
};
struct model_deleter {
    void operator()(prosparse_model * m) const { prosparse_model_free(m); }
};
using context_ptr = std::unique_ptr<ggml_context, context_deleter>;
using buffer_ptr  = std::unique_ptr<ggml_backend_buffer, buffer_deleter>;
using model_ptr   = std::unique_ptr<prosparse_model, model_deleter>;

context_ptr make_context() {
    return context_ptr(ggml_init({64 * ggml_tensor_overhead() + 16 * ggml_graph_overhead(), nullptr, true}));
}

// One row of a type as doubles; also the formats that only dot products read, which have no to_float.
void decode_row(ggml_type type, const uint8_t * row, double * out, int64_t n) {
    if (type == GGML_TYPE_Q8_K) { // f32 d, 256 int8, 16 int16
        for (int64_t i = 0; i < n; ++i) {
            const uint8_t * block = row + i / 256 * 292;
            float           d;
            memcpy(&d, block, 4);
            out[i] = (double) d * (int8_t) block[4 + i % 256];
        }
    } else if (type == GGML_TYPE_Q8_1) { // f16 d, f16 sum, 32 int8
        for (int64_t i = 0; i < n; ++i) {
            const uint8_t * block = row + i / 32 * 36;
            ggml_fp16_t     d;
            memcpy(&d, block, 2);
            out[i] = (double) ggml_fp16_to_fp32(d) * (int8_t) block[4 + i % 32];
        }
    } else if (type == GGML_TYPE_F32) {
        for (int64_t i = 0; i < n; ++i) {
            out[i] = ((const float *) row)[i];
        }
    } else {
        std::vector<float> values(n);
        ggml_get_type_traits(type)->to_float(row, values.data(), n);
        std::copy(values.begin(), values.end(), out);
    }
}

struct weight_data {
    ggml_type            type;
    int64_t              n_in, n_out;
    std::vector<uint8_t> rows;
    std::vector<double>  values; // [n_out][n_in]

    weight_data(ggml_type type, int64_t n_in, int64_t n_out, unsigned seed, float bias)
        : type(type), n_in(n_in), n_out(n_out) {
        std::vector<float> source = random_normal(n_in * n_out, seed, 1.0f / std::sqrt((float) n_in));
        for (int64_t o = 0; o < n_out; ++o) {
            source[o * n_in] += bias; // x[0] is 1: makes gates mostly negative
        }
        const std::vector<float> importance(n_in, 1.0f);
        rows.resize(ggml_row_size(type, n_in) * n_out);
        ggml_quantize_chunk(type, source.data(), rows.data(), 0, n_out, n_in, importance.data());
        values.resize(n_in * n_out);
        for (int64_t o = 0; o < n_out; ++o) {
            decode_row(type, rows.data() + o * ggml_row_size(type, n_in), &values[o * n_in], n_in);
        }
    }

    // W x, with x rounded as our row kernels round it (ours), or as ggml's dot product does
    std::vector<double> product(const std::vector<float>& x, bool ours) const {
        const ggml_type      x_type = ggml_get_type_traits_cpu(type)->vec_dot_type;
        std::vector<double>  rounded(x.begin(), x.end()), y(n_out);
        std::vector<uint8_t> coded(std::max(ggml_row_size(x_type, n_in), row_input_bytes(n_in) + 64));
        if (ours && select_row_kernels().supports(type)) {
            void *          place = (void *) (((uintptr_t) coded.data() + 63) & ~(uintptr_t) 63);
            const row_input in    = select_row_kernels().prepare(type, x.data(), n_in, place);
            for (int64_t i = 0; i < n_in && in.q != nullptr; ++i) {
                rounded[i] = (double) in.d[i / 32] * in.q[i];
            }
        } else if (x_type != GGML_TYPE_F32) {
            ggml_get_type_traits_cpu(x_type)->from_float(x.data(), coded.data(), n_in);
            decode_row(x_type, coded.data(), rounded.data(), n_in);
        }
        for (int64_t o = 0; o < n_out; ++o) {
            for (int64_t i = 0; i < n_in; ++i) {
                y[o] += values[o * n_in + i] * rounded[i];
            }
        }
        return y;
    }
};

struct layer {
    weight_data   gate, up, down;
    float         threshold;
    model_ptr     model;
    context_ptr   context = make_context();
    buffer_ptr    buffer;
    ggml_tensor * tensors[5]; // gate, up, down, the two scales

    layer(const std::string& path, ggml_type type, ggml_type down_type, int64_t n_embd, int64_t n_ff, float threshold)
        : gate(type, n_embd, n_ff, 1, -0.7f), up(type, n_embd, n_ff, 2, 0.0f), down(down_type, n_ff, n_embd, 3, 0.0f),
          threshold(threshold) {
        const weight_data * data[]   = {&gate, &up, &down};
        const char *        names[]  = {"blk.0.ffn_gate.weight", "blk.0.ffn_up.weight", "blk.0.ffn_down.weight",
                                        "blk.0.ffn_gate.scale", "blk.0.ffn_up.scale"};
        const float         scales[] = {relu_scale, 1.0f / relu_scale};
        for (int i = 0; i < 5; ++i) {
            tensors[i] = i < 3 ? ggml_new_tensor_2d(context.get(), data[i]->type, data[i]->n_in, data[i]->n_out)
                               : ggml_new_tensor_1d(context.get(), GGML_TYPE_F32, 1);
            ggml_set_name(tensors[i], names[i]);
        }
        write_file(path, data, scales);
        char error[512];
        model.reset(prosparse_model_open(path.c_str(), error, sizeof(error), nullptr));
        remove(path.c_str());
        if (model == nullptr) {
            CHECK(false, "%s", error);
            exit(1);
        }
        buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(context.get(), prosparse_model_buffer_type(model.get())));
        ggml_backend_buffer_set_usage(buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        for (int i = 0; i < 3; ++i) { // the down matrix in two pieces, as loaders that stream do
            const size_t half = data[i]->rows.size() / 2;
            ggml_backend_tensor_set(tensors[i], data[i]->rows.data(), 0, half);
            ggml_backend_tensor_set(tensors[i], data[i]->rows.data() + half, half, data[i]->rows.size() - half);
        }
        ggml_backend_tensor_set(tensors[3], &scales[0], 0, sizeof(float));
        ggml_backend_tensor_set(tensors[4], &scales[1], 0, sizeof(float));
    }

    void write_file(const std::string& path, const weight_data * const * data, const float * scales) {
        gguf_context * gguf = gguf_init_empty();
        gguf_set_val_str(gguf, "general.architecture", "llama");
        gguf_set_val_u32(gguf, "llama.block_count", 1);
        gguf_set_val_u32(gguf, "prosparse.version", 1);
        gguf_set_val_str(gguf, "prosparse.activation", threshold > 0.0f ? "fatrelu" : "relu");
        gguf_set_val_f32(gguf, "prosparse.threshold", threshold);
        for (int i = 0; i < 5; ++i) {
            gguf_add_tensor(gguf, tensors[i]);
            gguf_set_tensor_data(gguf, tensors[i]->name, i < 3 ? (const void *) data[i]->rows.data() : &scales[i - 3]);
        }
        CHECK(gguf_write_to_file(gguf, path.c_str(), false), "%s", path.c_str());
        gguf_free(gguf);
    }

    // x: [n_tokens][n_embd]; ours: see product; n_active counts what the threshold lets through
    std::vector<double> reference(const std::vector<float>& x, int64_t n_tokens, bool ours, uint64_t& n_active) const {
        std::vector<double> out;
        n_active = 0;
        for (int64_t t = 0; t < n_tokens; ++t) {
            const std::vector<float> row(x.begin() + t * gate.n_in, x.begin() + (t + 1) * gate.n_in);
            std::vector<double>      g = gate.product(row, ours), u = up.product(row, ours);
            for (size_t i = 0; i < g.size(); ++i) {
                const bool active = g[i] > 0.0 && g[i] >= threshold;
                n_active += active;
                g[i] = active ? g[i] * u[i] : 0.0;
            }
            for (int64_t e = 0; e < down.n_out; ++e) {
                double sum = 0.0;
                for (int64_t i = 0; i < down.n_in; ++i) {
                    sum += down.values[e * down.n_in + i] * g[i];
                }
                out.push_back(sum);
            }
        }
        return out;
    }
};

struct graph_options {
    int  n_threads = 2;
    bool broken    = false; // every node in a graph of its own, as an eval callback does
    bool reglu     = false; // the op instead of SiLU with a large scale
    bool strided_x = false; // rows of x with a gap between them
};

std::vector<float> compute(const layer& l, const std::vector<float>& x, int64_t n_tokens, graph_options options = {}) {
    const int64_t  n_embd  = l.gate.n_in;
    context_ptr    context = make_context();
    ggml_context * c       = context.get();
    ggml_tensor *  storage = ggml_new_tensor_2d(c, GGML_TYPE_F32, n_embd + (options.strided_x ? 16 : 0), n_tokens);
    ggml_tensor *  input = options.strided_x ? ggml_view_2d(c, storage, n_embd, n_tokens, storage->nb[1], 0) : storage;
    ggml_tensor *  gate  = ggml_mul(c, ggml_mul_mat(c, l.tensors[0], input), l.tensors[3]);
    ggml_tensor *  up    = ggml_mul(c, ggml_mul_mat(c, l.tensors[1], input), l.tensors[4]);
    ggml_tensor *  glu   = options.reglu ? ggml_reglu_split(c, gate, up) : ggml_swiglu_split(c, gate, up);
    ggml_tensor *  out   = ggml_mul_mat(c, l.tensors[2], glu);
    ggml_cgraph *  graph = ggml_new_graph(c);
    ggml_build_forward_expand(graph, out);
    buffer_ptr buffer(ggml_backend_alloc_ctx_tensors_from_buft(c, ggml_backend_cpu_buffer_type()));
    for (int64_t t = 0; t < n_tokens; ++t) {
        memcpy((char *) input->data + t * input->nb[1], x.data() + t * n_embd, n_embd * sizeof(float));
    }
    ggml_backend_dev_t device  = ggml_backend_reg_dev_get(ggml_backend_init(), 0);
    ggml_backend_t     backend = ggml_backend_dev_init(device, nullptr);
    auto set_n_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(ggml_backend_init(),
                                                                                          "ggml_backend_set_n_threads");
    set_n_threads(backend, options.n_threads);
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        ggml_tensor * node = ggml_graph_node(graph, i);
        CHECK(node->op == GGML_OP_VIEW || ggml_backend_dev_supports_op(device, node), "%s", ggml_op_name(node->op));
        if (options.broken) {
            ggml_cgraph * alone = ggml_new_graph_custom(c, 1, false);
            ggml_graph_add_node(alone, node);
            CHECK(ggml_backend_graph_compute(backend, alone) == GGML_STATUS_SUCCESS, "node %d", i);
        }
    }
    for (int i = 0; i < 2 && !options.broken; ++i) { // twice: the second run uses the scratch of the first
        CHECK(ggml_backend_graph_compute(backend, graph) == GGML_STATUS_SUCCESS, "graph");
    }
    ggml_backend_free(backend);
    const float * from = (const float *) out->data;
    return std::vector<float>(from, from + n_embd * n_tokens);
}

std::vector<float> make_input(int64_t n_embd, int64_t n_tokens) {
    std::vector<float> x = random_normal(n_embd * n_tokens, 11);
    for (int64_t t = 0; t < n_tokens; ++t) {
        x[t * n_embd] = 1.0f;
    }
    return x;
}

void check_layer(const std::string& path, ggml_type type, ggml_type down_type, int64_t n_embd, int64_t n_ff,
                 double limit, float threshold, std::initializer_list<int> token_counts) {
    const layer l(path, type, down_type, n_embd, n_ff, threshold);
    for (int n_tokens : token_counts) {
        const std::vector<float> x = make_input(n_embd, n_tokens);
        for (const graph_options& options :
             {graph_options{}, graph_options{3, false, true, true}, graph_options{1, true, false, false}}) {
            uint64_t                  n_active;
            const bool                fused    = !options.broken && n_tokens <= 16;
            const std::vector<double> expected = l.reference(x, n_tokens, fused, n_active);
            prosparse_layer_stats     stats;
            prosparse_model_stats(l.model.get(), &stats, true);
            const double error = relative_l2(compute(l, x, n_tokens, options), expected);
            prosparse_model_stats(l.model.get(), &stats, true);
            CHECK(error <= limit, "%s, down %s, %d x %d, %d tokens, threshold %g, broken %d: %g", ggml_type_name(type),
                  ggml_type_name(down_type), (int) n_embd, (int) n_ff, n_tokens, threshold, options.broken, error);
            const uint64_t runs = options.broken ? 1 : 2;
            CHECK(stats.n_tokens == runs * n_tokens && stats.n_ff == (uint64_t) n_ff, "%d tokens counted",
                  (int) stats.n_tokens);
            // a gate within rounding of the threshold may fall on either side
            CHECK(std::llabs((long long) (stats.n_active / runs) - (long long) n_active) <= 2, "%d active, expected %d",
                  (int) (stats.n_active / runs), (int) n_active);
        }
    }
}

void test_special_inputs(const std::string& path) {
    const layer              l(path, GGML_TYPE_F32, GGML_TYPE_Q8_0, 64, 96, 0.0f);
    std::vector<float>       x      = make_input(64, 3);
    const std::vector<float> before = compute(l, x, 3);
    CHECK(compute(l, {}, 0).empty(), "no tokens");
    x[64 + 5] = NAN; // of the second token
    for (bool broken : {false, true}) {
        const std::vector<float> y = compute(l, x, 3, {2, broken, false, false});
        CHECK(std::isnan(y[64]) && std::isnan(y[127]), "a NaN is not hidden");
        CHECK(relative_l2(std::vector<float>(y.begin(), y.begin() + 64),
                          std::vector<float>(before.begin(), before.begin() + 64)) < 1e-6,
              "first token");
        CHECK(relative_l2(std::vector<float>(y.begin() + 128, y.end()),
                          std::vector<float>(before.begin() + 128, before.end())) < 1e-6,
              "third token");
    }
    std::fill(x.begin(), x.end(), 0.0f); // no neuron is active
    for (int n_tokens : {1, 3}) {
        for (float value : compute(l, x, n_tokens)) {
            CHECK(value == 0.0f, "%g", value);
        }
    }
}

void test_dense_switch(const std::string& path) {
    const layer              l(path, GGML_TYPE_Q4_K, GGML_TYPE_Q6_K, 256, 512, 0.0f);
    const std::vector<float> x      = make_input(256, 2);
    const std::vector<float> sparse = compute(l, x, 2);
    prosparse_model_set_sparse(l.model.get(), false);
    CHECK(relative_l2(compute(l, x, 2), sparse) < 1e-6, "dense");
    prosparse_model_set_sparse(l.model.get(), true);
    CHECK(compute(l, x, 2) == sparse, "sparse again");
}

// Buffers keep what they need when the handle goes first.
void test_free_order(const std::string& path) {
    layer                    l(path, GGML_TYPE_F16, GGML_TYPE_F16, 64, 96, 0.1f);
    const std::vector<float> x = make_input(64, 1), before = compute(l, x, 1);
    l.model.reset();
    CHECK(compute(l, x, 1) == before, "after the handle is gone");
}

} // namespace

int main(int argc, char ** argv) {
    const std::string path = std::string(argc > 0 ? argv[0] : "test-ffn") + ".gguf";
    ggml_cpu_init();
    struct {
        ggml_type type;
        double    limit; // of the relative L2 error: rounding of f32 sums, of h (types that stay dense), of Q8_1's sums
    } const types[] = {
        {GGML_TYPE_F32, 1e-5},   {GGML_TYPE_F16, 1e-5},    {GGML_TYPE_BF16, 1e-5},   {GGML_TYPE_Q8_0, 1e-5},
        {GGML_TYPE_Q4_0, 1e-5},  {GGML_TYPE_Q4_1, 2e-3},   {GGML_TYPE_Q5_0, 1e-5},   {GGML_TYPE_Q5_1, 2e-3},
        {GGML_TYPE_Q2_K, 1e-5},  {GGML_TYPE_Q3_K, 1e-5},   {GGML_TYPE_Q4_K, 1e-5},   {GGML_TYPE_Q5_K, 1e-5},
        {GGML_TYPE_Q6_K, 1e-5},  {GGML_TYPE_IQ4_NL, 1e-5}, {GGML_TYPE_IQ4_XS, 1e-5}, {GGML_TYPE_IQ2_S, 2e-2},
        {GGML_TYPE_MXFP4, 2e-2},
    };
    ggml_quantize_init(GGML_TYPE_IQ2_S);
    for (const auto& t : types) {
        check_layer(path, t.type, t.type, 256, 512, t.limit, 0.0f, {1, 5, 20});
    }
    check_layer(path, GGML_TYPE_F32, GGML_TYPE_F32, 100, 67, 1e-5, 0.0f, {1, 2, 16, 17, 40}); // padded embeddings
    check_layer(path, GGML_TYPE_F16, GGML_TYPE_Q4_0, 72, 96, 1e-5, 0.0f, {1, 7, 33});
    check_layer(path, GGML_TYPE_F32, GGML_TYPE_F32, 256, 512, 1e-5, 0.25f, {1, 5, 20});
    check_layer(path, GGML_TYPE_Q8_0, GGML_TYPE_Q4_K, 256, 512, 1e-3, 0.25f, {1, 5, 20});
    test_special_inputs(path);
    test_dense_switch(path);
    test_free_order(path);
    ggml_quantize_free();
    return report("test-ffn");
}
