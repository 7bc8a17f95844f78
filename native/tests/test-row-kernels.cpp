// Dot products of rows in ggml's layouts: every level of the processor against sums in double over ggml's to_float.
#include "row-kernels.h"

#include "ggml-cpu.h"

#include "check.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

using namespace prosparse;

namespace {

const ggml_type types[] = {
    GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0,   GGML_TYPE_Q4_1,   GGML_TYPE_Q5_0,
    GGML_TYPE_Q5_1, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K, GGML_TYPE_Q6_K, GGML_TYPE_IQ4_NL, GGML_TYPE_IQ4_XS,
};

struct free_deleter {
    void operator()(void * p) const { free(p); }
};

using memory = std::unique_ptr<void, free_deleter>;

memory allocate(size_t size) { // exactly so much, so that ASan sees any excess
    memory m(aligned_alloc(64, (size + 63) / 64 * 64));
    memset(m.get(), 0xee, size);
    return m;
}

struct matrix {
    ggml_type            type;
    int64_t              n, n_rows;
    size_t               row_bytes;
    std::vector<uint8_t> rows;   // exact size
    std::vector<float>   values; // [n_rows][n]
};

matrix make_matrix(ggml_type type, int64_t n, int64_t n_rows, bool random_bytes) {
    matrix m = {type, n, n_rows, ggml_row_size(type, n), {}, {}};
    m.rows.resize(m.row_bytes * n_rows);
    const std::vector<float> source = random_normal(n * n_rows, 3);
    ggml_quantize_chunk(type, source.data(), m.rows.data(), 0, n_rows, n, nullptr);
    if (random_bytes) { // any codes and sub-scales: only the float scales stay as they are
        std::mt19937               engine(9);
        const std::vector<uint8_t> kept      = m.rows;
        const size_t               block     = ggml_type_size(type);
        const bool                 last_is_d = type == GGML_TYPE_Q6_K;
        const size_t               n_scales =
            type == GGML_TYPE_Q4_1 || type == GGML_TYPE_Q5_1 || type == GGML_TYPE_Q4_K || type == GGML_TYPE_Q5_K ? 4
                                                                                                                 : 2;
        for (size_t i = 0; i < m.rows.size(); ++i) {
            const size_t at = i % block;
            if (last_is_d ? at < block - 2 : at >= n_scales) {
                m.rows[i] = (uint8_t) engine();
            }
        }
    }
    m.values.resize(n * n_rows);
    for (int64_t r = 0; r < n_rows; ++r) {
        if (type == GGML_TYPE_F32) {
            memcpy(&m.values[r * n], m.rows.data() + r * m.row_bytes, n * sizeof(float));
        } else {
            ggml_get_type_traits(type)->to_float(m.rows.data() + r * m.row_bytes, &m.values[r * n], n);
        }
    }
    return m;
}

// x as the kernels see it
std::vector<double> seen(const row_input& in, const std::vector<float>& x) {
    std::vector<double> values(x.begin(), x.end());
    if (in.q != nullptr) {
        for (size_t i = 0; i < x.size(); ++i) {
            values[i] = (double) in.d[i / 32] * in.q[i];
        }
    }
    return values;
}

void test_matrix(const row_kernels& kernels, const matrix& m) {
    constexpr int64_t      n_tokens = 7; // a tile and a rest
    std::vector<memory>    memories;
    std::vector<row_input> inputs;
    std::vector<double>    expected(m.n_rows * n_tokens), size(m.n_rows * n_tokens);
    for (int64_t t = 0; t < n_tokens; ++t) {
        const std::vector<float> x = random_normal(m.n, (unsigned) t + 11, t == 3 ? 100.0f : 1.0f);
        memories.push_back(allocate(row_input_bytes(m.n)));
        inputs.push_back(kernels.prepare(m.type, x.data(), m.n, memories.back().get()));
        const std::vector<double> v = seen(inputs.back(), x);
        CHECK(relative_l2(v, x) < (inputs.back().q != nullptr ? 0.01 : 1e-7), "%s: the input", kernels.name);
        for (int64_t r = 0; r < m.n_rows; ++r) {
            for (int64_t i = 0; i < m.n; ++i) {
                expected[t * m.n_rows + r] += v[i] * m.values[r * m.n + i];
                size[t * m.n_rows + r] += std::fabs(v[i] * m.values[r * m.n + i]);
            }
        }
    }
    auto check = [&](const char * what, int64_t t, int64_t r, float got) {
        // rounding of f32 sums; minima and offsets are summed apart, so their cancelling counts too
        const double limit = 1e-5 * size[t * m.n_rows + r] + 1e-30;
        const double off   = std::fabs(got - expected[t * m.n_rows + r]);
        CHECK(off <= limit, "%s, %s, %s, n %d, row %d, token %d: %g instead of %g", kernels.name,
              ggml_type_name(m.type), what, (int) m.n, (int) r, (int) t, got, expected[t * m.n_rows + r]);
    };
    std::vector<float> out(m.n_rows);
    for (int64_t t = 0; t < n_tokens; ++t) {
        kernels.dot_range(m.type, m.rows.data(), m.row_bytes, m.n, 1, m.n_rows, inputs[t], out.data());
        for (int64_t r = 1; r < m.n_rows; ++r) {
            check("range", t, r, out[r]);
        }
    }
    std::vector<int32_t> list;
    for (int64_t r = 0; r < m.n_rows; r += 2) {
        list.push_back((int32_t) r);
    }
    kernels.dot_list(m.type, m.rows.data(), m.row_bytes, m.n, list.data(), (int64_t) list.size(), inputs[2],
                     out.data());
    for (size_t k = 0; k < list.size(); ++k) {
        check("list", 2, list[k], out[k]);
    }
    const memory  scratch  = allocate(row_scratch_bytes(m.n));
    const int32_t tokens[] = {6, 0, 3, 4, 1};
    float         sums[n_tokens];
    for (int64_t r = 0; r < m.n_rows; ++r) {
        const uint8_t * row = m.rows.data() + r * m.row_bytes;
        kernels.dot_tokens(m.type, row, m.n, inputs.data(), nullptr, n_tokens, scratch.get(), sums);
        for (int64_t t = 0; t < n_tokens; ++t) {
            check("tokens", t, r, sums[t]);
        }
        kernels.dot_tokens(m.type, row, m.n, inputs.data(), tokens, 5, scratch.get(), sums);
        for (int64_t k = 0; k < 5; ++k) {
            check("chosen tokens", tokens[k], r, sums[k]);
        }
    }
}

// A value that is not finite must reach the result.
void test_nan(const row_kernels& kernels, const matrix& m) {
    for (float bad : {NAN, INFINITY}) {
        std::vector<float> x  = random_normal(m.n, 1);
        x[m.n - 1]            = bad;
        const memory    place = allocate(row_input_bytes(m.n));
        const row_input in    = kernels.prepare(m.type, x.data(), m.n, place.get());
        float           out   = 0.0f;
        kernels.dot_range(m.type, m.rows.data(), m.row_bytes, m.n, 0, 1, in, &out);
        CHECK(!std::isfinite(out), "%s, %s", kernels.name, ggml_type_name(m.type));
    }
}

} // namespace

int main() {
    ggml_cpu_init();
    const row_kernels * levels[4];
    const int           n_levels = available_row_kernels(levels, 4);
    CHECK(n_levels >= 1 && &select_row_kernels() == levels[n_levels - 1], "%d levels", n_levels);
    for (int i = 0; i < n_levels; ++i) {
        for (ggml_type type : types) {
            CHECK(levels[i]->supports(type), "%s", ggml_type_name(type));
            const int64_t block = ggml_blck_size(type);
            for (int64_t n : {(int64_t) 1, (int64_t) 67, (int64_t) 32, (int64_t) 96, (int64_t) 576, (int64_t) 256,
                              (int64_t) 1280}) {
                if (n % block == 0) {
                    for (bool random_bytes : {false, true}) {
                        if (block > 1 || !random_bytes) {
                            test_matrix(*levels[i], make_matrix(type, n, 6, random_bytes));
                        }
                    }
                }
            }
            test_nan(*levels[i], make_matrix(type, 256, 1, false));
        }
        for (ggml_type type : {GGML_TYPE_Q2_K, GGML_TYPE_Q3_K, GGML_TYPE_IQ2_S, GGML_TYPE_TQ2_0, GGML_TYPE_I32}) {
            CHECK(!levels[i]->supports(type), "%s", ggml_type_name(type));
        }
    }
    return report("test-row-kernels");
}
