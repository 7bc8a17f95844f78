// The transposed down matrix: every value is bit for bit what ggml's to_float gives, at every level of the processor,
// and the kernels agree with sums in double.
#include "down-matrix.h"

#include "ggml-cpu.h"

#include "check.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

using namespace prosparse;

namespace {

struct free_deleter {
    void operator()(void * p) const { free(p); }
};

const ggml_type types[] = {
    GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16, GGML_TYPE_Q8_0,   GGML_TYPE_Q4_0,
    GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_Q2_K,   GGML_TYPE_Q3_K,
    GGML_TYPE_Q4_K, GGML_TYPE_Q5_K, GGML_TYPE_Q6_K, GGML_TYPE_IQ4_NL, GGML_TYPE_IQ4_XS,
};

struct matrix {
    std::vector<uint8_t>                rows;   // as GGUF stores it
    std::vector<float>                  values; // [n_embd][n_ff], by ggml's to_float
    std::unique_ptr<void, free_deleter> data;   // transposed; exactly down_size bytes, so that ASan sees any excess
    down_view                           view;
};

matrix make_matrix(ggml_type type, int64_t n_ff, int64_t n_embd, bool random_bytes) {
    matrix m;
    m.rows.resize(ggml_row_size(type, n_ff) * n_embd);
    if (random_bytes) { // any bit pattern of codes and scales; float scales stay finite
        std::mt19937 engine(9);
        for (uint8_t& byte : m.rows) {
            byte = (uint8_t) engine();
        }
    } else {
        const std::vector<float> source = random_normal(n_ff * n_embd, 3);
        ggml_quantize_chunk(type, source.data(), m.rows.data(), 0, n_embd, n_ff, nullptr);
    }
    m.values.resize(n_ff * n_embd);
    const ggml_to_float_t to_float = ggml_get_type_traits(type)->to_float;
    for (int64_t e = 0; e < n_embd; ++e) {
        const uint8_t * row = m.rows.data() + e * ggml_row_size(type, n_ff);
        if (type == GGML_TYPE_F32) {
            memcpy(&m.values[e * n_ff], row, n_ff * sizeof(float));
        } else {
            to_float(row, &m.values[e * n_ff], n_ff);
        }
    }
    const down_codec * codec = find_down_codec(type);
    const size_t       size  = down_size(*codec, n_ff, n_embd);
    m.data.reset(aligned_alloc(64, size));
    memset(m.data.get(), 0xee, size);
    pack_down(type, n_ff, n_embd, m.rows.data(), m.data.get());
    m.view = view_down(*codec, n_ff, n_embd, m.data.get());
    return m;
}

bool same(float a, float b) {
    return memcmp(&a, &b, sizeof(a)) == 0 || (std::isnan(a) && std::isnan(b));
}

// Zeros of either sign are equal: a - 0 and a + -0 may differ in nothing else.
bool equal(float a, float b) {
    return same(a, b) || (a == 0.0f && b == 0.0f);
}

void test_dequantize(const cpu_kernels& kernels, ggml_type type, const matrix& m) {
    const down_view&   v     = m.view;
    const int64_t      width = v.n_chunks * chunk_size;
    const int64_t      step  = v.codec->is_float() ? 5 : v.codec->group;
    std::vector<float> tile(step * width);
    int64_t            wrong = 0;
    for (int64_t i = 0; i < v.n_ff; i += step) {
        const int64_t n = std::min(step, v.n_ff - i);
        kernels.dequantize(v, i, n, tile.data(), 0, v.n_chunks);
        for (int64_t k = 0; k < n; ++k) {
            for (int64_t e = 0; e < v.n_embd; ++e) {
                wrong += !equal(tile[k * width + e], m.values[e * v.n_ff + i + k]);
            }
            for (int64_t e = v.n_embd; e < width; ++e) {
                wrong += tile[k * width + e] != 0.0f;
            }
        }
    }
    CHECK(wrong == 0, "%s, %s, n_ff %d, n_embd %d: %d values differ", kernels.name, ggml_type_name(type), (int) v.n_ff,
          (int) v.n_embd, (int) wrong);
}

// density: share of active neurons
void test_accumulate(const cpu_kernels& kernels, ggml_type type, const matrix& m, double density) {
    const down_view&     v = m.view;
    std::mt19937         engine(5);
    std::vector<int32_t> neurons;
    std::vector<float>   h;
    for (int64_t i = 0; i < v.n_ff; ++i) {
        if (engine() % 1000 < density * 1000) {
            neurons.push_back((int32_t) i);
            h.push_back((float) (engine() % 2000) / 1000.0f - 1.0f);
        }
    }
    std::vector<double> expected(v.n_embd);
    double              size = 0.0; // of the terms, what rounding errors scale with
    for (int64_t e = 0; e < v.n_embd; ++e) {
        for (size_t k = 0; k < neurons.size(); ++k) {
            const double term = (double) h[k] * m.values[e * v.n_ff + neurons[k]];
            expected[e] += term;
            size = std::max(size, std::fabs(term));
        }
    }
    std::vector<float> y(v.n_chunks * chunk_size, 0.0f);
    const int64_t      middle = v.n_chunks / 2; // two threads' parts
    kernels.accumulate(v, neurons.data(), h.data(), (int64_t) neurons.size(), y.data(), 0, middle);
    kernels.accumulate(v, neurons.data(), h.data(), (int64_t) neurons.size(), y.data(), middle, v.n_chunks);
    // scale * sum of codes + offset * sum of h cancels more than the plain sum: allow for it
    const double limit = 1e-5 * size * std::sqrt((double) neurons.size() + 1) + 1e-30;
    double       worst = 0.0;
    for (int64_t e = 0; e < v.n_embd; ++e) {
        worst = std::max(worst, std::fabs(y[e] - expected[e]));
    }
    CHECK(worst <= limit, "%s, %s, density %g: off by %g, allowed %g", kernels.name, ggml_type_name(type), density,
          worst, limit);
}

void test_multiply_tile(const cpu_kernels& kernels) {
    const int64_t rows = 32, tokens = 3;
    for (int64_t n : {32, 64, 96, 160}) {
        const std::vector<float> tile = random_normal(rows * n, 1);
        std::vector<float>       h    = random_normal(rows * tokens, 2);
        for (size_t i = 0; i < h.size(); i += 3) {
            h[i] = 0.0f;
        }
        std::fill(h.begin() + rows, h.begin() + 2 * rows, 0.0f); // a token without any active neuron
        std::vector<float>  y(tokens * n, 0.5f);
        std::vector<double> expected(tokens * n, 0.5);
        for (int64_t t = 0; t < tokens; ++t) {
            for (int64_t k = 0; k < rows; ++k) {
                for (int64_t i = 0; i < n; ++i) {
                    expected[t * n + i] += (double) h[t * rows + k] * tile[k * n + i];
                }
            }
        }
        kernels.multiply_tile(tile.data(), rows, n, h.data(), rows, y.data(), n, tokens);
        CHECK(relative_l2(y, expected) < 1e-6, "%s, width %d", kernels.name, (int) n);
    }
}

// A NaN activation must reach the result.
void test_nan(const cpu_kernels& kernels, const matrix& m) {
    const int32_t      neurons[] = {1};
    const float        h[]       = {NAN};
    std::vector<float> y(m.view.n_chunks * chunk_size, 0.0f);
    kernels.accumulate(m.view, neurons, h, 1, y.data(), 0, m.view.n_chunks);
    CHECK(std::isnan(y[0]), "%s", kernels.name);
    const std::vector<float> tile(32, 1.0f);
    float                    sums[32] = {};
    kernels.multiply_tile(tile.data(), 1, 32, h, 1, sums, 32, 1);
    CHECK(std::isnan(sums[31]), "%s", kernels.name);
}

} // namespace

int main() {
    ggml_cpu_init();
    const cpu_kernels * levels[4];
    const int           n_levels = available_kernels(levels, 4);
    CHECK(n_levels >= 1 && &select_kernels() == levels[n_levels - 1], "%d levels", n_levels);
    for (ggml_type type : types) {
        const int64_t block = ggml_blck_size(type);
        for (int64_t n_embd : {256, 100, 8}) { // whole strips, a rest, less than a chunk
            const int64_t n_ff = block == 1 ? 67 : 2 * std::max<int64_t>(block, 128);
            for (bool random_bytes : {false, true}) {
                const matrix m = make_matrix(type, n_ff, n_embd, random_bytes);
                for (int i = 0; i < n_levels; ++i) {
                    test_dequantize(*levels[i], type, m);
                    for (double density : {0.0, 0.02, 0.3, 1.0}) {
                        if (!random_bytes) {
                            test_accumulate(*levels[i], type, m, density);
                        }
                    }
                }
            }
        }
        // the same memory as the file: codes and scales only, and whole bytes for the sub-scales of k-quants
        const size_t file = ggml_row_size(type, 11008) * 4096, ours = down_size(*find_down_codec(type), 11008, 4096);
        fprintf(stderr, "%-6s %.3f of the file's bytes\n", ggml_type_name(type), (double) ours / (double) file);
        CHECK((double) ours <= 1.08 * (double) file, "%s grows to %g", ggml_type_name(type),
              (double) ours / (double) file);
    }
    const matrix m = make_matrix(GGML_TYPE_Q8_0, 64, 64, false);
    for (int i = 0; i < n_levels; ++i) {
        test_multiply_tile(*levels[i]);
        test_nan(*levels[i], m);
    }
    for (ggml_type type :
         {GGML_TYPE_IQ2_S, GGML_TYPE_IQ1_M, GGML_TYPE_TQ2_0, GGML_TYPE_MXFP4, GGML_TYPE_Q8_K, GGML_TYPE_I32}) {
        CHECK(find_down_codec(type) == nullptr, "%s", ggml_type_name(type));
    }
    return report("test-down-matrix");
}
