// One source for every level: GCC/Clang vector types become the widest registers that the flags of this object allow.
#include "cpu-kernels.h"

#include <cmath>
#include <cstring>
#include <type_traits>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace prosparse {
namespace {

typedef float    f32x16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t  i32x16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t u32x16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t u16x16 __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint8_t  u8x16 __attribute__((vector_size(16), aligned(1), may_alias));
typedef int8_t   i8x16 __attribute__((vector_size(16), aligned(1), may_alias));

constexpr i32x16 iota = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

template <typename V>
inline V load(const void * p) {
    V v;
    memcpy(&v, p, sizeof(v));
    return v;
}

inline void store(float * p, f32x16 v) {
    memcpy(p, &v, sizeof(v));
}

inline f32x16 splat(float x) {
    return f32x16{} + x;
}

// 16 bytes to 32 bits. GCC 12 makes long chains of __builtin_convertvector here.
inline i32x16 widen(u8x16 v) {
#if defined(__AVX512F__)
    return (i32x16) _mm512_cvtepu8_epi32((__m128i) v);
#elif defined(__AVX2__)
    i32x16        r;
    const __m256i lo = _mm256_cvtepu8_epi32((__m128i) v);
    const __m256i hi = _mm256_cvtepu8_epi32(_mm_srli_si128((__m128i) v, 8));
    memcpy(&r, &lo, 32);
    memcpy((char *) &r + 32, &hi, 32);
    return r;
#else
    return __builtin_convertvector(v, i32x16);
#endif
}

inline i32x16 widen(i8x16 v) {
#if defined(__AVX512F__)
    return (i32x16) _mm512_cvtepi8_epi32((__m128i) v);
#elif defined(__AVX2__)
    i32x16        r;
    const __m256i lo = _mm256_cvtepi8_epi32((__m128i) v);
    const __m256i hi = _mm256_cvtepi8_epi32(_mm_srli_si128((__m128i) v, 8));
    memcpy(&r, &lo, 32);
    memcpy((char *) &r + 32, &hi, 32);
    return r;
#else
    return __builtin_convertvector(v, i32x16);
#endif
}

// 16 half floats to f32, exact
inline f32x16 load_f16(const uint16_t * p) {
#if defined(__AVX512F__)
    return (f32x16) _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i *) p));
#elif defined(__F16C__)
    f32x16       r;
    const __m256 lo = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p));
    const __m256 hi = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (p + 8)));
    memcpy(&r, &lo, 32);
    memcpy((char *) &r + 32, &hi, 32);
    return r;
#else
    // exponent and mantissa moved into place and the bias corrected by a multiplication, which also handles subnormals;
    // infinities and NaN keep their exponent of all ones
    const u32x16 h    = __builtin_convertvector(load<u16x16>(p), u32x16);
    const u32x16 sign = (h & 0x8000u) << 16;
    const u32x16 bits = (h & 0x7fffu) << 13;
    const f32x16 abs  = (f32x16) bits * 0x1p112f;
    const u32x16 big  = (u32x16) (bits >= (0x7c00u << 13));
    return (f32x16) (sign | ((u32x16) abs & ~big) | ((bits | 0x7f800000u) & big));
#endif
}

inline f32x16 load_bf16(const uint16_t * p) {
#if defined(__AVX512F__)
    return (f32x16) _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) p)), 16);
#endif
    return (f32x16) (__builtin_convertvector(load<u16x16>(p), u32x16) << 16);
}

// Codes of one chunk of one neuron as f32 levels: lo = elements 0..15, hi = 16..31.
template <int LOW, int HIGH, bool SIGNED, bool TABLE>
inline void load_levels(const uint8_t * low, const uint8_t * high, int zero, i8x16 table, f32x16& lo, f32x16& hi) {
    i32x16 a, b;
    if constexpr (LOW == 8) {
        if constexpr (SIGNED) {
            a = widen(load<i8x16>(low));
            b = widen(load<i8x16>(low + 16));
        } else {
            a = widen(load<u8x16>(low));
            b = widen(load<u8x16>(low + 16));
        }
    } else if constexpr (LOW == 4) {
        const u8x16 q = load<u8x16>(low);
        if constexpr (TABLE) {
            a = widen(__builtin_shuffle(table, (i8x16) (q & 15)));
            b = widen(__builtin_shuffle(table, (i8x16) (q >> 4)));
        } else {
            a = widen(q & 15);
            b = widen(q >> 4);
        }
    } else {
        a = (i32x16{} + load<int32_t>(low)) >> (2 * iota) & 3;
        b = (i32x16{} + load<int32_t>(low + 4)) >> (2 * iota) & 3;
    }
    if constexpr (HIGH == 1) {
        a |= ((i32x16{} + (int32_t) load<uint16_t>(high)) >> iota & 1) << LOW;
        b |= ((i32x16{} + (int32_t) load<uint16_t>(high + 2)) >> iota & 1) << LOW;
    } else if constexpr (HIGH == 2) {
        a |= ((i32x16{} + load<int32_t>(high)) >> (2 * iota) & 3) << LOW;
        b |= ((i32x16{} + load<int32_t>(high + 4)) >> (2 * iota) & 3) << LOW;
    }
    lo = __builtin_convertvector(a - zero, f32x16);
    hi = __builtin_convertvector(b - zero, f32x16);
}

// Where the scales of a neuron's group lie.
struct group_scales {
    const uint16_t * d;
    const uint16_t * m;
    const uint8_t *  sc;
    const uint8_t *  mn;

    group_scales(const down_view& v, int64_t neuron) {
        const int64_t n_pad = v.n_chunks * chunk_size;
        const int64_t s     = neuron / v.codec->super * n_pad;
        const int64_t g     = neuron / v.codec->group * n_pad;
        d                   = v.d + s;
        m                   = v.m + s;
        sc                  = v.sc + g;
        mn                  = v.mn + g;
    }
};

// scale and offset of the elements e .. e + 15 of a group
inline void load_scale(const down_codec& c, const group_scales& g, int64_t e, f32x16& scale, f32x16& offset) {
    scale  = load_f16(g.d + e);
    offset = f32x16{};
    switch (c.kind) {
        case down_codec::scales::d_m:
            offset = load_f16(g.m + e);
            break;
        case down_codec::scales::d_sc:
            scale *= __builtin_convertvector(widen(load<i8x16>(g.sc + e)) - c.zero_sc, f32x16);
            break;
        case down_codec::scales::d_sc_dmin_mn:
            scale *= __builtin_convertvector(widen(load<u8x16>(g.sc + e)), f32x16);
            offset = -(load_f16(g.m + e) * __builtin_convertvector(widen(load<u8x16>(g.mn + e)), f32x16));
            break;
        case down_codec::scales::d_sc4_dmin_mn4: {
            const u8x16 q = load<u8x16>(g.sc + e);
            scale *= __builtin_convertvector(widen(q & 15), f32x16);
            offset = -(load_f16(g.m + e) * __builtin_convertvector(widen(q >> 4), f32x16));
            break;
        }
        default:
            break;
    }
}

inline i8x16 table_of(const down_codec& c) {
    return c.table != nullptr ? load<i8x16>(c.table) : i8x16{};
}

// Neurons whose rows are read side by side: enough to keep several streams busy, few enough for the registers.
constexpr int batch_size = 4;
constexpr int cache_line = 64;

// The rows of the next batch, fetched while this one is computed: nothing is fetched in vain.
struct next_rows {
    const uint8_t * low[batch_size];
    int             count = 0;

    next_rows(const down_view& v, const int32_t * neurons, int64_t n) {
        for (; count < batch_size && count < n; ++count) {
            low[count] = v.low + neurons[count] * (v.n_chunks * v.codec->low_bytes());
        }
    }

    void prefetch(size_t offset) const {
        for (int k = 0; k < count; ++k) {
            __builtin_prefetch(low[k] + offset);
        }
    }
};

// y += sum h * row for K rows of plain floats
template <int BITS, bool BF16, int K>
void accumulate_float_batch(const down_view& v, const int32_t * neurons, const float * h, const next_rows& next,
                            float * y, int64_t c0, int64_t c1) {
    constexpr size_t low = chunk_size * BITS / 8;
    const uint8_t *  rows[K];
    for (int k = 0; k < K; ++k) {
        rows[k] = v.low + neurons[k] * (v.n_chunks * low);
    }
    for (int64_t c = c0; c < c1; ++c) {
        for (size_t i = 0; i < low; i += cache_line) {
            next.prefetch(c * low + i);
        }
        f32x16 lo = load<f32x16>(y + c * chunk_size), hi = load<f32x16>(y + c * chunk_size + 16);
        for (int k = 0; k < K; ++k) {
            const uint8_t * p = rows[k] + c * low;
            if constexpr (BITS == 32) {
                lo += h[k] * load<f32x16>(p);
                hi += h[k] * load<f32x16>(p + 64);
            } else if constexpr (BF16) {
                lo += h[k] * load_bf16((const uint16_t *) p);
                hi += h[k] * load_bf16((const uint16_t *) p + 16);
            } else {
                lo += h[k] * load_f16((const uint16_t *) p);
                hi += h[k] * load_f16((const uint16_t *) p + 16);
            }
        }
        store(y + c * chunk_size, lo);
        store(y + c * chunk_size + 16, hi);
    }
}

// y += scale * (sum h * level) + offset * sum h for K rows of one group, so that each scale is read once
template <int LOW, int HIGH, bool SIGNED, bool TABLE, int K>
void accumulate_coded_batch(const down_view& v, const int32_t * neurons, const float * h, const next_rows& next,
                            float * y, int64_t c0, int64_t c1) {
    constexpr size_t   low    = chunk_size * LOW / 8;
    constexpr size_t   high   = chunk_size * HIGH / 8;
    constexpr int64_t  a_line = cache_line / low;
    const down_codec   codec  = *v.codec;
    const group_scales scales(v, neurons[0]);
    const i8x16        table = table_of(codec);
    const uint8_t *    lows[K];
    const uint8_t *    highs[K];
    float              h_sum = 0.0f;
    for (int k = 0; k < K; ++k) {
        lows[k]  = v.low + neurons[k] * (v.n_chunks * low);
        highs[k] = v.high + neurons[k] * (v.n_chunks * high);
        h_sum += h[k];
    }
    for (int64_t c = c0; c < c1; ++c) {
        if (c % a_line == 0) {
            next.prefetch(c * low);
        }
        f32x16 lo = {}, hi = {};
        for (int k = 0; k < K; ++k) {
            f32x16 a, b;
            load_levels<LOW, HIGH, SIGNED, TABLE>(lows[k] + c * low, highs[k] + c * high, codec.zero, table, a, b);
            lo += h[k] * a;
            hi += h[k] * b;
        }
        const int64_t e = c * chunk_size;
        f32x16        scale, offset;
        load_scale(codec, scales, e, scale, offset);
        store(y + e, load<f32x16>(y + e) + scale * lo + offset * h_sum);
        load_scale(codec, scales, e + 16, scale, offset);
        store(y + e + 16, load<f32x16>(y + e + 16) + scale * hi + offset * h_sum);
    }
}

// Calls f with the number of rows, 1 to batch_size, as an integral constant.
template <typename F>
void with_batch(int64_t k, F&& f) {
    static_assert(batch_size == 4, "one case each");
    switch (k) {
        case 1:
            return f(std::integral_constant<int, 1>{});
        case 2:
            return f(std::integral_constant<int, 2>{});
        case 3:
            return f(std::integral_constant<int, 3>{});
        default:
            return f(std::integral_constant<int, 4>{});
    }
}

template <int BITS, bool BF16>
void accumulate_float(const down_view& v, const int32_t * neurons, const float * h, int64_t n, float * y, int64_t c0,
                      int64_t c1) {
    for (int64_t begin = 0; begin < n; begin += batch_size) {
        const int64_t   k = n - begin < batch_size ? n - begin : batch_size;
        const next_rows next(v, neurons + begin + k, n - begin - k);
        with_batch(k, [&](auto size) {
            accumulate_float_batch<BITS, BF16, size.value>(v, neurons + begin, h + begin, next, y, c0, c1);
        });
    }
}

template <int LOW, int HIGH, bool SIGNED, bool TABLE>
void accumulate_coded(const down_view& v, const int32_t * neurons, const float * h, int64_t n, float * y, int64_t c0,
                      int64_t c1) {
    const int64_t group = v.codec->group;
    for (int64_t begin = 0, end; begin < n; begin = end) {
        const int64_t group_end = (neurons[begin] / group + 1) * group;
        for (end = begin + 1; end < n && end - begin < batch_size && neurons[end] < group_end; ++end) {
        }
        const next_rows next(v, neurons + end, n - end);
        with_batch(end - begin, [&](auto size) {
            accumulate_coded_batch<LOW, HIGH, SIGNED, TABLE, size.value>(v, neurons + begin, h + begin, next, y, c0,
                                                                         c1);
        });
    }
}

template <int LOW, int HIGH, bool SIGNED, bool TABLE>
void dequantize_coded(const down_view& v, int64_t neuron0, int64_t n, float * out, int64_t c0, int64_t c1) {
    const down_codec&  codec = *v.codec;
    constexpr size_t   low   = chunk_size * LOW / 8;
    constexpr size_t   high  = chunk_size * HIGH / 8;
    const i8x16        table = table_of(codec);
    const group_scales scales(v, neuron0);
    const int64_t      width = (c1 - c0) * chunk_size;
    for (int64_t c = c0; c < c1; ++c) {
        f32x16 scale[2], offset[2];
        for (int half = 0; half < 2; ++half) {
            load_scale(codec, scales, c * chunk_size + half * 16, scale[half], offset[half]);
        }
        for (int64_t k = 0; k < n; ++k) {
            f32x16 a, b;
            load_levels<LOW, HIGH, SIGNED, TABLE>(v.low + ((neuron0 + k) * v.n_chunks + c) * low,
                                                  v.high + ((neuron0 + k) * v.n_chunks + c) * high, codec.zero, table,
                                                  a, b);
            float * o = out + k * width + (c - c0) * chunk_size;
            store(o, a * scale[0] + offset[0]);
            store(o + 16, b * scale[1] + offset[1]);
        }
    }
}

// Calls f with the template arguments of the codec as integral constants.
template <typename F>
void with_codec(const down_codec& c, F&& f) {
    using std::integral_constant;
    auto go   = [&](auto low, auto high, auto is_signed, auto table) { f(low, high, is_signed, table); };
    using yes = std::true_type;
    using no  = std::false_type;
    if (c.low_bits == 8) {
        go(integral_constant<int, 8>{}, integral_constant<int, 0>{}, yes{}, no{});
    } else if (c.low_bits == 4 && c.table != nullptr) {
        go(integral_constant<int, 4>{}, integral_constant<int, 0>{}, no{}, yes{});
    } else if (c.low_bits == 4 && c.high_bits == 0) {
        go(integral_constant<int, 4>{}, integral_constant<int, 0>{}, no{}, no{});
    } else if (c.low_bits == 4 && c.high_bits == 1) {
        go(integral_constant<int, 4>{}, integral_constant<int, 1>{}, no{}, no{});
    } else if (c.low_bits == 4 && c.high_bits == 2) {
        go(integral_constant<int, 4>{}, integral_constant<int, 2>{}, no{}, no{});
    } else if (c.low_bits == 2 && c.high_bits == 1) {
        go(integral_constant<int, 2>{}, integral_constant<int, 1>{}, no{}, no{});
    } else {
        go(integral_constant<int, 2>{}, integral_constant<int, 0>{}, no{}, no{});
    }
}

void accumulate(const down_view& v, const int32_t * neurons, const float * h, int64_t n, float * y, int64_t c0,
                int64_t c1) {
    const down_codec& c = *v.codec;
    if (c.is_float()) {
        c.low_bits == 32 ? accumulate_float<32, false>(v, neurons, h, n, y, c0, c1)
        : c.is_bf16      ? accumulate_float<16, true>(v, neurons, h, n, y, c0, c1)
                         : accumulate_float<16, false>(v, neurons, h, n, y, c0, c1);
        return;
    }
    with_codec(c, [&](auto low, auto high, auto is_signed, auto table) {
        accumulate_coded<low.value, high.value, is_signed.value, table.value>(v, neurons, h, n, y, c0, c1);
    });
}

void dequantize(const down_view& v, int64_t neuron0, int64_t n, float * out, int64_t c0, int64_t c1) {
    const down_codec& c     = *v.codec;
    const int64_t     width = (c1 - c0) * chunk_size;
    if (c.is_float()) {
        for (int64_t k = 0; k < n; ++k) {
            const uint8_t * row = v.low + ((neuron0 + k) * v.n_chunks + c0) * c.low_bytes();
            for (int64_t e = 0; e < width; e += 16) {
                const uint16_t * half = (const uint16_t *) row + e;
                store(out + k * width + e, c.low_bits == 32 ? load<f32x16>((const float *) row + e)
                                           : c.is_bf16      ? load_bf16(half)
                                                            : load_f16(half));
            }
        }
        return;
    }
    with_codec(c, [&](auto low, auto high, auto is_signed, auto table) {
        dequantize_coded<low.value, high.value, is_signed.value, table.value>(v, neuron0, n, out, c0, c1);
    });
}

void multiply_tile(const float * tile, int64_t n_rows, int64_t n, const float * h, size_t h_stride, float * y,
                   size_t y_stride, int64_t n_tokens) {
    constexpr int64_t width = 64; // four registers of sums
    for (int64_t t = 0; t < n_tokens; ++t) {
        const float * ht = h + t * h_stride;
        int32_t       active[chunk_size];
        int64_t       n_active = 0;
        for (int64_t k = 0; k < n_rows; ++k) {
            active[n_active] = (int32_t) k;
            n_active += ht[k] != 0.0f; // true for NaN
        }
        float * yt = y + t * y_stride;
        int64_t i  = 0;
        for (; n_active > 0 && i + width <= n; i += width) {
            f32x16 s0 = load<f32x16>(yt + i), s1 = load<f32x16>(yt + i + 16);
            f32x16 s2 = load<f32x16>(yt + i + 32), s3 = load<f32x16>(yt + i + 48);
            for (int64_t a = 0; a < n_active; ++a) {
                const f32x16  hk  = splat(ht[active[a]]);
                const float * row = tile + active[a] * n + i;
                s0 += hk * load<f32x16>(row);
                s1 += hk * load<f32x16>(row + 16);
                s2 += hk * load<f32x16>(row + 32);
                s3 += hk * load<f32x16>(row + 48);
            }
            store(yt + i, s0);
            store(yt + i + 16, s1);
            store(yt + i + 32, s2);
            store(yt + i + 48, s3);
        }
        for (; n_active > 0 && i < n; i += 16) {
            f32x16 s = load<f32x16>(yt + i);
            for (int64_t a = 0; a < n_active; ++a) {
                s += splat(ht[active[a]]) * load<f32x16>(tile + active[a] * n + i);
            }
            store(yt + i, s);
        }
    }
}

} // namespace

#define PROSPARSE_NAME_(level) kernels_##level
#define PROSPARSE_NAME(level) PROSPARSE_NAME_(level)
#define PROSPARSE_STRING_(x) #x
#define PROSPARSE_STRING(x) PROSPARSE_STRING_(x)

extern const cpu_kernels PROSPARSE_NAME(PROSPARSE_KERNELS);
const cpu_kernels        PROSPARSE_NAME(PROSPARSE_KERNELS) = {
    /* .name          = */ PROSPARSE_STRING(PROSPARSE_KERNELS),
    /* .accumulate    = */ accumulate,
    /* .dequantize    = */ dequantize,
    /* .multiply_tile = */ multiply_tile,
};

} // namespace prosparse
