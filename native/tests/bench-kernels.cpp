// GB/s of the kernels beside a plain streaming read, by type: gate (every row), up and down (a list of rows), and
// ggml's own dot product over every row.
//   cmake -S native -B build/native-bench -G Ninja -DPROSPARSE_BUILD_TESTS=ON && cmake --build build/native-bench
//   build/native-bench/tests/bench-kernels [THREADS [N_EMBD [N_FF [MiB]]]]
#include "down-matrix.h"
#include "row-kernels.h"

#include "ggml-cpu.h"

#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

using namespace prosparse;

namespace {

int     n_threads = 2;
int64_t n_embd = 4096, n_ff = 11008;
size_t  footprint = 640; // MiB, more than the caches hold

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct memory {
    uint8_t * data;
    size_t    size;

    explicit memory(size_t n) : size((n + (2u << 20) - 1) >> 21 << 21) {
        data = (uint8_t *) aligned_alloc(2u << 20, size);
        madvise(data, size, MADV_HUGEPAGE);
        memset(data, 1, size);
    }
    memory(const memory&)            = delete;
    memory& operator=(const memory&) = delete;
    ~memory() { free(data); }
};

// Best of some runs of f(thread, copy) on all threads; f is called for every copy of a matrix. GB/s of `bytes` in all.
template <typename F>
double best_rate(int copies, double bytes, F&& f) {
    double best = 1e30;
    for (int run = 0; run < 4; ++run) {
        const double start = now();
#pragma omp parallel num_threads(n_threads)
        for (int copy = 0; copy < copies; ++copy) {
            f(omp_get_thread_num(), copy);
        }
        best = std::min(best, now() - start);
    }
    return bytes / best / 1e9;
}

double plain_read() {
    const memory      m(footprint << 20);
    volatile uint64_t sink = 0;
    return best_rate(1, (double) m.size, [&](int thread, int) {
        const uint64_t * p = (const uint64_t *) m.data;
        const size_t     n = m.size / 8, first = n * thread / n_threads / 8 * 8;
        const size_t     last = n * (thread + 1) / n_threads / 8 * 8;
        uint64_t         s[8] = {};
        for (size_t i = first; i < last; i += 8) {
            for (int k = 0; k < 8; ++k) {
                s[k] += p[i + k];
            }
        }
        sink = sink + s[0] + s[1] + s[2] + s[3] + s[4] + s[5] + s[6] + s[7];
    });
}

void measure(ggml_type type) {
    const row_kernels&              kernels   = select_row_kernels();
    const size_t                    row_bytes = ggml_row_size(type, n_embd), bytes = row_bytes * n_ff;
    const int                       copies = std::max<int>(1, (int) ((footprint << 20) / bytes));
    const memory                    rows(bytes * copies);
    std::mt19937                    engine(1);
    std::normal_distribution<float> normal;
    std::vector<float>              source(64 * n_embd), x(n_embd);
    for (float& v : source) {
        v = normal(engine);
    }
    for (float& v : x) {
        v = normal(engine);
    }
    ggml_quantize_chunk(type, source.data(), rows.data, 0, 64, n_embd, nullptr);
    for (size_t at = 64 * row_bytes; at < bytes * copies; at += 64 * row_bytes) {
        memcpy(rows.data + at, rows.data, std::min(64 * row_bytes, bytes * copies - at));
    }
    std::vector<int32_t> active; // 11 %
    for (int32_t i = 0; i < n_ff; ++i) {
        if (engine() % 100 < 11) {
            active.push_back(i);
        }
    }
    std::vector<uint8_t> place(row_input_bytes(n_embd) + 64);
    const row_input in = kernels.prepare(type, x.data(), n_embd, (void *) (((uintptr_t) place.data() + 63) & ~63ull));
    std::vector<float> out(n_ff * n_threads), h(active.size(), 0.5f);

    const double gate    = best_rate(copies, (double) bytes * copies, [&](int thread, int copy) {
        kernels.dot_range(type, rows.data + copy * bytes, row_bytes, n_embd, n_ff * thread / n_threads,
                          n_ff * (thread + 1) / n_threads, in, out.data());
    });
    const double touched = (double) active.size() * row_bytes * copies;
    const double up      = best_rate(copies, touched, [&](int thread, int copy) {
        const int64_t a = (int64_t) active.size() * thread / n_threads,
                      b = (int64_t) active.size() * (thread + 1) / n_threads;
        kernels.dot_list(type, rows.data + copy * bytes, row_bytes, n_embd, active.data() + a, b - a, in,
                         out.data() + n_ff * thread);
    });

    const auto *         traits = ggml_get_type_traits_cpu(type);
    std::vector<uint8_t> q(ggml_row_size(traits->vec_dot_type, n_embd));
    const auto           from_float = ggml_get_type_traits_cpu(traits->vec_dot_type)->from_float;
    if (from_float != nullptr) {
        from_float(x.data(), q.data(), n_embd);
    } else {
        memcpy(q.data(), x.data(), q.size());
    }
    const double ggml = best_rate(copies, (double) bytes * copies, [&](int thread, int copy) {
        for (int64_t r = n_ff * thread / n_threads; r < n_ff * (thread + 1) / n_threads; ++r) {
            traits->vec_dot((int) n_embd, &out[r], 0, rows.data + copy * bytes + r * row_bytes, 0, q.data(), 0, 1);
        }
    });

    double             down  = 0.0;
    const down_codec * codec = n_ff % ggml_blck_size(type) == 0 ? find_down_codec(type) : nullptr;
    if (codec != nullptr) {
        const size_t       size    = down_size(*codec, n_ff, n_embd);
        const int          copies_ = std::max<int>(1, (int) ((footprint << 20) / size));
        const memory       m(size * copies_);
        std::vector<float> y((n_embd + chunk_size) * n_threads);
        down = best_rate(copies_, (double) active.size() / n_ff * size * copies_, [&](int thread, int copy) {
            const down_view view = view_down(*codec, n_ff, n_embd, m.data + copy * size);
            select_kernels().accumulate(view, active.data(), h.data(), (int64_t) active.size(), y.data(),
                                        view.n_chunks * thread / n_threads, view.n_chunks * (thread + 1) / n_threads);
        });
    }
    printf("%-7s %6.1f %6.1f %6.1f %9.1f\n", ggml_type_name(type), gate, up, down, ggml);
    fflush(stdout);
}

} // namespace

int main(int argc, char ** argv) {
    n_threads = argc > 1 ? atoi(argv[1]) : n_threads;
    n_embd    = argc > 2 ? atoll(argv[2]) : n_embd;
    n_ff      = argc > 3 ? atoll(argv[3]) : n_ff;
    footprint = argc > 4 ? (size_t) atoll(argv[4]) : footprint;
    ggml_cpu_init();
    printf("%s, %d threads, n_embd %d, n_ff %d, plain read %.1f GB/s\n", select_row_kernels().name, n_threads,
           (int) n_embd, (int) n_ff, plain_read());
    printf("%-7s %6s %6s %6s %9s   GB/s\n", "type", "gate", "up", "down", "ggml gate");
    for (ggml_type type :
         {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q5_0,
          GGML_TYPE_Q5_1, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K, GGML_TYPE_Q6_K, GGML_TYPE_IQ4_NL, GGML_TYPE_IQ4_XS}) {
        if (n_embd % ggml_blck_size(type) == 0) {
            measure(type);
        }
    }
    return 0;
}
