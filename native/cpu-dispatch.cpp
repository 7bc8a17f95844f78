// Picks the kernels for the processor that this runs on.
#include "cpu-kernels.h"

namespace prosparse {

extern const cpu_kernels kernels_baseline;
#ifdef PROSPARSE_X86
extern const cpu_kernels kernels_x86_64_v3;
extern const cpu_kernels kernels_x86_64_v4;
#endif

int available_kernels(const cpu_kernels ** list, int capacity) {
    int  n   = 0;
    auto add = [&](const cpu_kernels& kernels) {
        if (n < capacity) {
            list[n++] = &kernels;
        }
    };
    add(kernels_baseline);
#ifdef PROSPARSE_X86
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
    if (v3) {
        add(kernels_x86_64_v3);
    }
    if (v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512cd")) {
        add(kernels_x86_64_v4);
    }
#endif
    return n;
}

const cpu_kernels& select_kernels() {
    static const cpu_kernels * best = [] {
        const cpu_kernels * list[4];
        return list[available_kernels(list, 4) - 1];
    }();
    return *best;
}

} // namespace prosparse
