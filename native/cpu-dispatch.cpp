// Picks the kernels for the processor that this runs on.
#include "cpu-kernels.h"
#include "row-kernels.h"

namespace prosparse {

#define PROSPARSE_LEVEL(level)                                                                                         \
    extern const cpu_kernels kernels_##level;                                                                          \
    extern const row_kernels row_kernels_##level

PROSPARSE_LEVEL(baseline);
#ifdef PROSPARSE_X86
PROSPARSE_LEVEL(x86_64_v3);
PROSPARSE_LEVEL(x86_64_v4);
PROSPARSE_LEVEL(x86_64_v4_vnni);
#endif

namespace {

constexpr int max_levels = 4;

struct level {
    const cpu_kernels * down;
    const row_kernels * rows;
};

// Levels that this processor runs, worst first.
int available_levels(level * list) {
    int n     = 0;
    list[n++] = {&kernels_baseline, &row_kernels_baseline};
#ifdef PROSPARSE_X86
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
          __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c"))) {
        return n;
    }
    list[n++] = {&kernels_x86_64_v3, &row_kernels_x86_64_v3};
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
          __builtin_cpu_supports("avx512cd"))) {
        return n;
    }
    list[n++] = {&kernels_x86_64_v4, &row_kernels_x86_64_v4};
    if (__builtin_cpu_supports("avx512vnni")) {
        list[n++] = {&kernels_x86_64_v4_vnni, &row_kernels_x86_64_v4_vnni};
    }
#endif
    return n;
}

level best_level() {
    level list[max_levels];
    return list[available_levels(list) - 1];
}

} // namespace

int available_kernels(const cpu_kernels ** list, int capacity) {
    level     levels[max_levels];
    const int n = available_levels(levels);
    for (int i = 0; i < n && i < capacity; ++i) {
        list[i] = levels[i].down;
    }
    return n < capacity ? n : capacity;
}

int available_row_kernels(const row_kernels ** list, int capacity) {
    level     levels[max_levels];
    const int n = available_levels(levels);
    for (int i = 0; i < n && i < capacity; ++i) {
        list[i] = levels[i].rows;
    }
    return n < capacity ? n : capacity;
}

const cpu_kernels& select_kernels() {
    static const cpu_kernels& best = *best_level().down;
    return best;
}

const row_kernels& select_row_kernels() {
    static const row_kernels& best = *best_level().rows;
    return best;
}

} // namespace prosparse
