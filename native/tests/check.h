// The little that these tests need of a test framework.
#pragma once

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

inline int& failures() {
    static int n = 0;
    return n;
}

// Reports and goes on, so that one run shows all that is wrong. The arguments after the condition are printf's.
#define CHECK(condition, ...)                                                                                          \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            ++failures();                                                                                              \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition);                                            \
            fprintf(stderr, __VA_ARGS__);                                                                              \
            fprintf(stderr, "\n");                                                                                     \
        }                                                                                                              \
    } while (0)

inline int report(const char * name) {
    fprintf(stderr, "%s: %s\n", name, failures() == 0 ? "ok" : "FAILED");
    return failures() == 0 ? 0 : 1;
}

inline std::vector<float> random_normal(size_t n, unsigned seed, float scale = 1.0f) {
    std::mt19937                    engine(seed);
    std::normal_distribution<float> normal(0.0f, scale);
    std::vector<float>              values(n);
    for (float& value : values) {
        value = normal(engine);
    }
    return values;
}

// ||a - b|| / ||b||
template <typename A, typename B>
double relative_l2(const A& a, const B& b) {
    double difference = 0.0, norm = 0.0;
    for (size_t i = 0; i < b.size(); ++i) {
        difference += ((double) a[i] - (double) b[i]) * ((double) a[i] - (double) b[i]);
        norm += (double) b[i] * (double) b[i];
    }
    return std::sqrt(difference / norm);
}
