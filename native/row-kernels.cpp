// Dot products of rows in ggml's layouts. One source for every level: simd.h has what differs.
#include "row-kernels.h"

#include "simd.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <type_traits>

namespace prosparse {
namespace {

// ---- formats. A chunk is 256 elements. Of a format:
//   zero          the code that stands for 0, subtracted through row_input::init
//   wide          codes above 127 occur
//   has_min       value = scale * code + min
//   fine          16 elements share a scale, not 32
//   block         elements of ggml's block, and `bytes` its size
//   scales()      scale of each block of 32 of a chunk (or of 16: lo and hi), and the minimum of each block of 32
//   codes<J>()    elements 64 J ... of a chunk

struct scale_set {
    floats8 lo, hi, min;
};

constexpr uint8_t iq4_levels[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241}; // + 128

struct format {
    static constexpr int     zero    = 0;
    static constexpr bool    wide    = false;
    static constexpr bool    has_min = false;
    static constexpr bool    fine    = false;
    static constexpr int64_t block   = 32;
};

struct q8_0 : format {
    static constexpr int    zero  = 128;
    static constexpr bool   wide  = true;
    static constexpr size_t bytes = 34;

    static void scales(const uint8_t * p, scale_set& s) { s.lo = gather_halves(p, bytes); }

    template <int J>
    static bytes64 codes(const uint8_t * p) {
        return flipped(load_bytes(p + 2 * J * bytes + 2, p + (2 * J + 1) * bytes + 2));
    }
};

struct q4_0 : format {
    static constexpr int    zero  = 8;
    static constexpr size_t bytes = 18;

    static void scales(const uint8_t * p, scale_set& s) { s.lo = gather_halves(p, bytes); }

    template <int J>
    static bytes64 codes(const uint8_t * p) {
        return load_nibbles(p + 2 * J * bytes + 2, p + (2 * J + 1) * bytes + 2);
    }
};

struct q4_1 : format {
    static constexpr bool   has_min = true;
    static constexpr size_t bytes   = 20;

    static void scales(const uint8_t * p, scale_set& s) {
        s.lo  = gather_halves(p, bytes);
        s.min = gather_halves(p + 2, bytes);
    }

    template <int J>
    static bytes64 codes(const uint8_t * p) {
        return load_nibbles(p + 2 * J * bytes + 4, p + (2 * J + 1) * bytes + 4);
    }
};

// 16 bytes of nibbles, and a fifth bit for each element `at` bytes into the block
template <int J, size_t BYTES, size_t AT>
inline bytes64 codes_of_5(const uint8_t * p) {
    const uint8_t * a    = p + 2 * J * BYTES + AT;
    const uint8_t * b    = a + BYTES;
    const uint64_t  high = load_as<uint32_t>(a) | (uint64_t) load_as<uint32_t>(b) << 32;
    return either(load_nibbles(a + 4, b + 4), spread_bits(high, 16));
}

struct q5_0 : format {
    static constexpr int    zero  = 16;
    static constexpr size_t bytes = 22;

    static void scales(const uint8_t * p, scale_set& s) { s.lo = gather_halves(p, bytes); }

    template <int J>
    static bytes64 codes(const uint8_t * p) {
        return codes_of_5<J, bytes, 2>(p);
    }
};

struct q5_1 : format {
    static constexpr bool   has_min = true;
    static constexpr size_t bytes   = 24;

    static void scales(const uint8_t * p, scale_set& s) {
        s.lo  = gather_halves(p, bytes);
        s.min = gather_halves(p + 2, bytes);
    }

    template <int J>
    static bytes64 codes(const uint8_t * p) {
        return codes_of_5<J, bytes, 4>(p);
    }
};

struct iq4_nl : q4_0 {
    static constexpr int  zero = 128;
    static constexpr bool wide = true;

    template <int J>
    static bytes64 codes(const uint8_t * p) {
        return look_up(iq4_levels, q4_0::codes<J>(p));
    }
};

struct iq4_xs : format {
    static constexpr int     zero  = 128;
    static constexpr bool    wide  = true;
    static constexpr int64_t block = 256;
    static constexpr size_t  bytes = 136; // d, scales_h, scales_l[4], qs[128]

    static void scales(const uint8_t * p, scale_set& s) {
        uint64_t high = load_as<uint16_t>(p + 2), low = load_as<uint32_t>(p + 4);
        low           = (low | low << 16) & 0x0000ffff0000ffff; // a nibble to each byte
        low           = (low | low << 8) & 0x00ff00ff00ff00ff;
        low           = (low | low << 4) & 0x0f0f0f0f0f0f0f0f;
        high          = (high | high << 24) & 0x000000ff000000ff; // two bits to each byte
        high          = (high | high << 12) & 0x000f000f000f000f;
        high          = (high | high << 6) & 0x0303030303030303;
        const float d = half_to_float(load_as<uint16_t>(p));
        s.lo          = multiply_add(from_bytes(low | high << 4), splat8(d), splat8(-32.0f * d));
    }

    template <int J>
    static bytes64 codes(const uint8_t * p) {
        return look_up(iq4_levels, load_nibbles(p + 8 + 32 * J, p + 24 + 32 * J));
    }
};

// scales and minima of Q4_K and Q5_K: d, dmin, then eight pairs of 6 bits in 12 bytes
inline void scales_of_k(const uint8_t * p, scale_set& s) {
    const uint32_t a = load_as<uint32_t>(p + 4), b = load_as<uint32_t>(p + 8), c = load_as<uint32_t>(p + 12);
    const uint64_t sc = (a & 0x3f3f3f3fu) | (uint64_t) ((c & 0x0f0f0f0fu) | (a >> 6 & 0x03030303u) << 4) << 32;
    const uint64_t mn = (b & 0x3f3f3f3fu) | (uint64_t) ((c >> 4 & 0x0f0f0f0fu) | (b >> 6 & 0x03030303u) << 4) << 32;
    s.lo              = multiply(from_bytes(sc), splat8(half_to_float(load_as<uint16_t>(p))));
    s.min             = multiply(from_bytes(mn), splat8(-half_to_float(load_as<uint16_t>(p + 2))));
}

struct q4_k : format {
    static constexpr bool    has_min = true;
    static constexpr int64_t block   = 256;
    static constexpr size_t  bytes   = 144;

    static void scales(const uint8_t * p, scale_set& s) { scales_of_k(p, s); }

    template <int J>
    static bytes64 codes(const uint8_t * p) {
        return load_nibbles(p + 16 + 32 * J);
    }
};

struct q5_k : format {
    static constexpr bool    has_min = true;
    static constexpr int64_t block   = 256;
    static constexpr size_t  bytes   = 176;

    static void scales(const uint8_t * p, scale_set& s) { scales_of_k(p, s); }

    template <int J>
    static bytes64 codes(const uint8_t * p) {
        // bit 2 J of a byte belongs to the low nibbles' elements, bit 2 J + 1 to the high ones'
        return either(load_nibbles(p + 48 + 32 * J), shifted_left<4>(load_shifted<2 * J, 2 * J + 1>(p + 16, 1)));
    }
};

struct q6_k : format {
    static constexpr int     zero  = 32;
    static constexpr bool    fine  = true;
    static constexpr int64_t block = 256;
    static constexpr size_t  bytes = 210; // ql[128], qh[64], scales[16], d

    static void scales(const uint8_t * p, scale_set& s) {
        const floats8 d = splat8(half_to_float(load_as<uint16_t>(p + 208)));
        s.lo            = multiply(from_signed_bytes(load_as<uint64_t>(p + 192)), d);
        s.hi            = multiply(from_signed_bytes(load_as<uint64_t>(p + 200)), d);
    }

    template <int J>
    static bytes64 codes(const uint8_t * p) {
        const bytes64 low  = load_bytes(p + 64 * (J / 2));
        const bytes64 high = load_shifted<4 * (J % 2), 4 * (J % 2) + 2>(p + 128 + 32 * (J / 2), 3);
        return either(shifted_right<4 * (J % 2)>(low, 15), shifted_left<4>(high));
    }
};

// Calls f with the format of a type; false if there is none.
template <typename F>
bool with_format(ggml_type type, F&& f) {
    switch (type) {
        case GGML_TYPE_Q8_0:
            f(q8_0{});
            return true;
        case GGML_TYPE_Q4_0:
            f(q4_0{});
            return true;
        case GGML_TYPE_Q4_1:
            f(q4_1{});
            return true;
        case GGML_TYPE_Q5_0:
            f(q5_0{});
            return true;
        case GGML_TYPE_Q5_1:
            f(q5_1{});
            return true;
        case GGML_TYPE_IQ4_NL:
            f(iq4_nl{});
            return true;
        case GGML_TYPE_IQ4_XS:
            f(iq4_xs{});
            return true;
        case GGML_TYPE_Q4_K:
            f(q4_k{});
            return true;
        case GGML_TYPE_Q5_K:
            f(q5_k{});
            return true;
        case GGML_TYPE_Q6_K:
            f(q6_k{});
            return true;
        default:
            return false;
    }
}

bool is_float(ggml_type type) {
    return type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16;
}

bool supports(ggml_type type) {
    return is_float(type) || with_format(type, [](auto) {});
}

// ---- the input

// q, d and s of one block of 32. Where a value is not finite, d is NaN: it must reach the result.
void quantize_block(const float * x, int64_t n, int8_t * q, float& d, float& s) {
    float values[32] = {};
    std::copy(x, x + n, values);
    float largest[8] = {}; // in lanes, which compilers can make a register of
    bool  finite     = true;
    for (int i = 0; i < 32; i += 8) {
        for (int k = 0; k < 8; ++k) {
            const float size = std::fabs(values[i + k]);
            largest[k]       = size > largest[k] ? size : largest[k];
            finite &= size <= FLT_MAX; // false for NaN
        }
    }
    const float most    = *std::max_element(largest, largest + 8);
    const float inverse = most > 0.0f && finite ? 127.0f / most : 0.0f;
    int32_t     sum     = 0;
    for (int i = 0; i < 32; ++i) {
        const int32_t code = finite ? (int32_t) std::nearbyint(values[i] * inverse) : 0;
        q[i]               = (int8_t) code;
        sum += code;
    }
    d = finite ? most / 127.0f : NAN;
    s = d * (float) sum;
}

row_input prepare(ggml_type type, const float * x, int64_t n, void * memory) {
    const int64_t n_pad = padded_row(n);
    row_input     in    = {};
    if (is_float(type)) {
        auto * f = (float *) memory;
        std::copy(x, x + n, f);
        std::fill(f + n, f + n_pad, 0.0f);
        in.f = f;
        return in;
    }
    auto * q    = (int8_t *) memory;
    auto * init = (int32_t *) (q + n_pad);
    auto * d    = (float *) (init + n_pad / 4);
    auto * s    = d + n_pad / 32;
    for (int64_t b = 0; b < n_pad / 32; ++b) {
        quantize_block(x + 32 * b, std::clamp<int64_t>(n - 32 * b, 0, 32), q + 32 * b, d[b], s[b]);
    }
    int zero = 0;
    with_format(type, [&](auto format) { zero = format.zero; });
    for (int64_t k = 0; k < n_pad / 4; ++k) {
        init[k] = -zero * (q[4 * k] + q[4 * k + 1] + q[4 * k + 2] + q[4 * k + 3]);
    }
    in.q    = q;
    in.init = init;
    in.d    = d;
    in.s    = s;
    return in;
}

// ---- one token

template <typename F>
constexpr size_t chunk_bytes = F::bytes * (size_t) (row_chunk / F::block);

// The last chunk, if the row does not fill it: blocks copied into zeros, so that nothing behind the row is read.
template <typename F>
struct partial_chunk {
    alignas(64) uint8_t data[chunk_bytes<F>];

    partial_chunk(const uint8_t * p, int64_t n_blocks) {
        memset(data, 0, sizeof(data));
        memcpy(data, p, (size_t) n_blocks * F::bytes);
    }
};

// Rows that follow one another are fetched this far ahead: the processor's own prefetcher alone reaches half the
// bandwidth. 1.5 KiB was the best of 0.75, 1.5 and 3.
constexpr size_t prefetch_distance = 1536;

template <bool AHEAD, size_t BYTES>
inline void prefetch_ahead(const void * p) {
    for (size_t i = 0; AHEAD && i < BYTES; i += 64) {
        __builtin_prefetch((const char *) p + prefetch_distance + i);
    }
}

// sums += one chunk, of which the first `steps` times 64 elements are there
template <typename F, bool AHEAD>
inline void add_chunk(sums16& sums, floats8& minima, const uint8_t * p, const row_input& x, int64_t chunk, int steps) {
    const int8_t *  q    = x.q + chunk * row_chunk;
    const int32_t * init = x.init + chunk * (row_chunk / 4);
    const floats8   d    = load_floats8(x.d + chunk * 8);
    scale_set       s;
    prefetch_ahead<AHEAD, chunk_bytes<F>>(p);
    F::scales(p, s);
    if constexpr (F::has_min) {
        minima = multiply_add(s.min, load_floats8(x.s + chunk * 8), minima);
    }
    auto add = [&](auto j) {
        constexpr int J = decltype(j)::value;
        if constexpr (F::fine) {
            add_products<J, F::wide>(sums, F::template codes<J>(p), q + 64 * J, init + 16 * J, s.lo, s.hi);
        } else {
            add_products<J, F::wide>(sums, F::template codes<J>(p), q + 64 * J, init + 16 * J, s.lo);
        }
    };
    if constexpr (F::fine) {
        s.lo = multiply(s.lo, twice(d, false));
        s.hi = multiply(s.hi, twice(d, true));
    } else {
        s.lo = multiply(s.lo, d);
    }
    add(std::integral_constant<int, 0>{});
    if (steps > 1) {
        add(std::integral_constant<int, 1>{});
    }
    if (steps > 2) {
        add(std::integral_constant<int, 2>{});
    }
    if (steps > 3) {
        add(std::integral_constant<int, 3>{});
    }
}

template <typename F, bool AHEAD>
inline float dot_row(const uint8_t * row, int64_t n, const row_input& x) {
    sums16        sums;
    floats8       minima = splat8(0.0f);
    const int64_t whole  = n / row_chunk;
    for (int64_t c = 0; c < whole; ++c) {
        add_chunk<F, AHEAD>(sums, minima, row + c * chunk_bytes<F>, x, c, 4);
    }
    if constexpr (F::block < row_chunk) {
        if (n % row_chunk != 0) {
            const int64_t          blocks = n % row_chunk / F::block;
            const partial_chunk<F> last(row + whole * chunk_bytes<F>, blocks);
            add_chunk<F, false>(sums, minima, last.data, x, whole, (int) (blocks + 1) / 2);
        }
    }
    return F::has_min ? reduce(sums) + reduce(minima) : reduce(sums);
}

template <ggml_type TYPE, bool AHEAD>
inline float dot_float_row(const uint8_t * row, int64_t n, const row_input& x) {
    constexpr int64_t size = TYPE == GGML_TYPE_F32 ? 4 : 2;
    sums16            sums[4];
    auto              add = [&](int64_t i, sums16& a, sums16& b) {
        if constexpr (TYPE == GGML_TYPE_F32) {
            add_floats(a, b, (const float *) row + i, x.f + i);
        } else {
            add_halves<TYPE == GGML_TYPE_BF16>(a, b, (const uint16_t *) row + i, x.f + i);
        }
    };
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        prefetch_ahead<AHEAD, 64 * size>(row + i * size);
        add(i, sums[0], sums[1]);
        add(i + 32, sums[2], sums[3]);
    }
    for (; i + 32 <= n; i += 32) {
        add(i, sums[0], sums[1]);
    }
    float rest = 0.0f;
    for (; i < n; ++i) {
        if constexpr (TYPE == GGML_TYPE_F32) {
            rest += ((const float *) row)[i] * x.f[i];
        } else {
            uint16_t h[32] = {((const uint16_t *) row)[i]};
            float    w[32];
            widen_halves<TYPE == GGML_TYPE_BF16>(w, h);
            rest += w[0] * x.f[i];
        }
    }
    return reduce(sums[0]) + reduce(sums[1]) + (reduce(sums[2]) + reduce(sums[3])) + rest;
}

// Calls f with a function (row, n, x) for the type. AHEAD: rows follow one another.
template <bool AHEAD, typename F>
void with_dot(ggml_type type, F&& f) {
    auto of_floats = [&](auto kind) {
        f([](const uint8_t * row, int64_t n, const row_input& x) {
            return dot_float_row<(ggml_type) decltype(kind)::value, AHEAD>(row, n, x);
        });
    };
    if (type == GGML_TYPE_F32) {
        of_floats(std::integral_constant<int, GGML_TYPE_F32>{});
    } else if (type == GGML_TYPE_F16) {
        of_floats(std::integral_constant<int, GGML_TYPE_F16>{});
    } else if (type == GGML_TYPE_BF16) {
        of_floats(std::integral_constant<int, GGML_TYPE_BF16>{});
    } else {
        with_format(type, [&](auto format) {
            f([](const uint8_t * row, int64_t n, const row_input& x) {
                return dot_row<decltype(format), AHEAD>(row, n, x);
            });
        });
    }
}

void dot_range(ggml_type type, const void * rows, size_t row_bytes, int64_t n, int64_t r0, int64_t r1,
               const row_input& x, float * out) {
    with_dot<true>(type, [&](auto dot) {
        for (int64_t r = r0; r < r1; ++r) {
            out[r] = dot((const uint8_t *) rows + r * row_bytes, n, x);
        }
    });
}

void dot_list(ggml_type type, const void * rows, size_t row_bytes, int64_t n, const int32_t * list, int64_t count,
              const row_input& x, float * out) {
    with_dot<false>(type, [&](auto dot) {
        for (int64_t k = 0; k < count; ++k) {
            if (k + 1 < count) {
                const char * next = (const char *) rows + list[k + 1] * row_bytes;
                for (size_t i = 0; i < row_bytes; i += 64) {
                    __builtin_prefetch(next + i);
                }
            }
            out[k] = dot((const uint8_t *) rows + list[k] * row_bytes, n, x);
        }
    });
}

// ---- several tokens: the row is decoded once into scratch

constexpr int token_tile = 4;

struct decoded_row {
    uint8_t * codes;  // [n_pad]
    float *   scales; // [n_pad / 32], or [n_pad / 16] if fine
    float *   minima; // [n_pad / 32]
};

template <typename F>
void decode_chunk(const uint8_t * p, int64_t chunk, const decoded_row& to, int steps) {
    scale_set s;
    F::scales(p, s);
    store_floats8(to.scales + chunk * (F::fine ? 16 : 8), s.lo);
    if constexpr (F::fine) {
        store_floats8(to.scales + chunk * 16 + 8, s.hi);
    }
    if constexpr (F::has_min) {
        store_floats8(to.minima + chunk * 8, s.min);
    }
    uint8_t * codes = to.codes + chunk * row_chunk;
    store_bytes(codes, F::template codes<0>(p));
    if (steps > 1) {
        store_bytes(codes + 64, F::template codes<1>(p));
    }
    if (steps > 2) {
        store_bytes(codes + 128, F::template codes<2>(p));
    }
    if (steps > 3) {
        store_bytes(codes + 192, F::template codes<3>(p));
    }
}

template <typename F>
void decode_row(const uint8_t * row, int64_t n, const decoded_row& to) {
    const int64_t whole = n / row_chunk;
    for (int64_t c = 0; c < whole; ++c) {
        decode_chunk<F>(row + c * chunk_bytes<F>, c, to, 4);
    }
    if constexpr (F::block < row_chunk) {
        if (n % row_chunk != 0) {
            const int64_t          blocks = n % row_chunk / F::block;
            const partial_chunk<F> last(row + whole * chunk_bytes<F>, blocks);
            decode_chunk<F>(last.data, whole, to, (int) (blocks + 1) / 2);
        }
    }
}

// T tokens at once
template <typename F, int T>
inline void dot_decoded(const decoded_row& row, int64_t n, const row_input * const * x, float * out) {
    sums16  sums[T];
    floats8 minima[T];
    for (int t = 0; t < T; ++t) {
        minima[t] = splat8(0.0f);
    }
    const int64_t n_chunks = padded_row(n) / row_chunk;
    for (int64_t c = 0; c < n_chunks; ++c) {
        const int     steps = (int) std::min<int64_t>(4, (n - c * row_chunk + 63) / 64);
        const floats8 lo    = load_floats8(row.scales + c * (F::fine ? 16 : 8));
        const floats8 hi    = F::fine ? load_floats8(row.scales + c * 16 + 8) : lo;
        floats8       scale[T], scale_hi[T];
        for (int t = 0; t < T; ++t) {
            const floats8 d = load_floats8(x[t]->d + c * 8);
            scale[t]        = multiply(lo, F::fine ? twice(d, false) : d);
            scale_hi[t]     = F::fine ? multiply(hi, twice(d, true)) : scale[t];
            if constexpr (F::has_min) {
                minima[t] = multiply_add(load_floats8(row.minima + c * 8), load_floats8(x[t]->s + c * 8), minima[t]);
            }
        }
        auto add = [&](auto j) {
            constexpr int J     = decltype(j)::value;
            const int64_t at    = c * row_chunk + 64 * J;
            const bytes64 codes = load_bytes(row.codes + at);
            for (int t = 0; t < T; ++t) {
                if constexpr (F::fine) {
                    add_products<J, F::wide>(sums[t], codes, x[t]->q + at, x[t]->init + at / 4, scale[t], scale_hi[t]);
                } else {
                    add_products<J, F::wide>(sums[t], codes, x[t]->q + at, x[t]->init + at / 4, scale[t]);
                }
            }
        };
        add(std::integral_constant<int, 0>{});
        if (steps > 1) {
            add(std::integral_constant<int, 1>{});
        }
        if (steps > 2) {
            add(std::integral_constant<int, 2>{});
        }
        if (steps > 3) {
            add(std::integral_constant<int, 3>{});
        }
    }
    for (int t = 0; t < T; ++t) {
        out[t] = F::has_min ? reduce(sums[t]) + reduce(minima[t]) : reduce(sums[t]);
    }
}

template <int T>
inline void dot_decoded_floats(const float * row, int64_t n, const row_input * const * x, float * out) {
    sums16 a[T], b[T];
    for (int64_t i = 0; i < padded_row(n); i += 32) {
        for (int t = 0; t < T; ++t) {
            add_floats(a[t], b[t], row + i, x[t]->f + i);
        }
    }
    for (int t = 0; t < T; ++t) {
        out[t] = reduce(a[t]) + reduce(b[t]);
    }
}

// The tokens in tiles, the rest one by one. f<T>(inputs, out)
template <typename F>
void for_tokens(const row_input * x, const int32_t * tokens, int64_t count, float * out, F&& f) {
    auto    input = [&](int64_t k) { return x + (tokens != nullptr ? tokens[k] : k); };
    int64_t k     = 0;
    for (; k + token_tile <= count; k += token_tile) {
        const row_input * const inputs[token_tile] = {input(k), input(k + 1), input(k + 2), input(k + 3)};
        f(std::integral_constant<int, token_tile>{}, inputs, out + k);
    }
    for (; k < count; ++k) {
        const row_input * const inputs[1] = {input(k)};
        f(std::integral_constant<int, 1>{}, inputs, out + k);
    }
}

void dot_tokens(ggml_type type, const void * row, int64_t n, const row_input * x, const int32_t * tokens, int64_t count,
                void * scratch, float * out) {
    const int64_t n_pad = padded_row(n);
    if (is_float(type)) {
        auto * f = (float *) scratch;
        std::fill(f + n / 32 * 32, f + n_pad, 0.0f);
        if (type == GGML_TYPE_F32) {
            std::copy((const float *) row, (const float *) row + n, f);
        } else {
            uint16_t rest[32] = {};
            memcpy(rest, (const uint16_t *) row + n / 32 * 32, (size_t) (n % 32) * sizeof(uint16_t));
            auto widen_row = [&](auto is_bf16) {
                for (int64_t i = 0; i + 32 <= n; i += 32) {
                    widen_halves<is_bf16.value>(f + i, (const uint16_t *) row + i);
                }
                if (n % 32 != 0) {
                    widen_halves<is_bf16.value>(f + n / 32 * 32, rest);
                }
            };
            type == GGML_TYPE_BF16 ? widen_row(std::true_type{}) : widen_row(std::false_type{});
        }
        for_tokens(x, tokens, count, out, [&](auto tile, const row_input * const * inputs, float * o) {
            dot_decoded_floats<tile.value>(f, n, inputs, o);
        });
        return;
    }
    decoded_row to;
    to.codes  = (uint8_t *) scratch;
    to.scales = (float *) (to.codes + n_pad);
    to.minima = to.scales + n_pad / 16;
    with_format(type, [&](auto format) {
        using F = decltype(format);
        decode_row<F>((const uint8_t *) row, n, to);
        for_tokens(x, tokens, count, out, [&](auto tile, const row_input * const * inputs, float * o) {
            dot_decoded<F, tile.value>(to, n, inputs, o);
        });
    });
}

} // namespace

#define PROSPARSE_NAME_(level) row_kernels_##level
#define PROSPARSE_NAME(level) PROSPARSE_NAME_(level)
#define PROSPARSE_STRING_(x) #x
#define PROSPARSE_STRING(x) PROSPARSE_STRING_(x)

extern const row_kernels PROSPARSE_NAME(PROSPARSE_KERNELS);
const row_kernels        PROSPARSE_NAME(PROSPARSE_KERNELS) = {
    /* .name       = */ PROSPARSE_STRING(PROSPARSE_KERNELS),
    /* .supports   = */ supports,
    /* .prepare    = */ prepare,
    /* .dot_range  = */ dot_range,
    /* .dot_list   = */ dot_list,
    /* .dot_tokens = */ dot_tokens,
};

} // namespace prosparse
