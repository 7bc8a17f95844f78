// What the row kernels need of a processor: 64 unsigned codes at a time, and sums of four products in 32 bits.
// Everything is in an anonymous namespace: each level of the processor has its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512BW__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

template <typename T>
inline T load_as(const void * p) {
    T v;
    memcpy(&v, p, sizeof(v));
    return v;
}

#if defined(__AVX512BW__) && defined(__AVX512VL__)

struct bytes64 {
    __m512i v;
};

inline bytes64 join(__m256i a, __m256i b) {
    return {_mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1)};
}

inline bytes64 load_bytes(const uint8_t * a, const uint8_t * b) { // 32 and 32
    return join(_mm256_loadu_si256((const __m256i *) a), _mm256_loadu_si256((const __m256i *) b));
}

inline bytes64 load_bytes(const uint8_t * p) {
    return {_mm512_loadu_si512(p)};
}

inline void store_bytes(uint8_t * p, bytes64 b) {
    _mm512_storeu_si512(p, b.v);
}

// 16 bytes and 16 bytes: the low nibbles of each, then its high ones
inline bytes64 load_nibbles(const uint8_t * a, const uint8_t * b) {
    const __m128i qa = _mm_loadu_si128((const __m128i *) a), qb = _mm_loadu_si128((const __m128i *) b);
    const __m256i pa = _mm256_inserti128_si256(_mm256_castsi128_si256(qa), _mm_srli_epi16(qa, 4), 1);
    const __m256i pb = _mm256_inserti128_si256(_mm256_castsi128_si256(qb), _mm_srli_epi16(qb, 4), 1);
    return {_mm512_and_si512(join(pa, pb).v, _mm512_set1_epi8(15))};
}

// 32 bytes: their low nibbles, then the high ones
inline bytes64 load_nibbles(const uint8_t * p) {
    const __m256i q = _mm256_loadu_si256((const __m256i *) p);
    return {_mm512_and_si512(join(q, _mm256_srli_epi16(q, 4)).v, _mm512_set1_epi8(15))};
}

// 32 bytes shifted right in two ways, one after the other
template <int FIRST, int SECOND>
inline bytes64 load_shifted(const uint8_t * p, uint8_t mask) {
    const __m256i q = _mm256_loadu_si256((const __m256i *) p);
    return {_mm512_and_si512(join(_mm256_srli_epi16(q, FIRST), _mm256_srli_epi16(q, SECOND)).v,
                             _mm512_set1_epi8((char) mask))};
}

template <int SHIFT>
inline bytes64 shifted_right(bytes64 b, uint8_t mask) {
    return {_mm512_and_si512(_mm512_srli_epi16(b.v, SHIFT), _mm512_set1_epi8((char) mask))};
}

template <int SHIFT>
inline bytes64 shifted_left(bytes64 b) { // no bits may leave a byte
    return {_mm512_slli_epi16(b.v, SHIFT)};
}

inline bytes64 either(bytes64 a, bytes64 b) {
    return {_mm512_or_si512(a.v, b.v)};
}

inline bytes64 flipped(bytes64 b) { // int8 to uint8: + 128
    return {_mm512_xor_si512(b.v, _mm512_set1_epi8((char) 0x80))};
}

// `value` in the bytes whose bit is set
inline bytes64 spread_bits(uint64_t bits, uint8_t value) {
    return {_mm512_maskz_set1_epi8((__mmask64) bits, (char) value)};
}

inline bytes64 look_up(const uint8_t * table, bytes64 b) {
    return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) table)), b.v)};
}

struct floats8 {
    __m256 v;
};

inline floats8 load_floats8(const float * p) {
    return {_mm256_loadu_ps(p)};
}

inline void store_floats8(float * p, floats8 a) {
    _mm256_storeu_ps(p, a.v);
}

inline floats8 multiply(floats8 a, floats8 b) {
    return {_mm256_mul_ps(a.v, b.v)};
}

inline floats8 multiply_add(floats8 a, floats8 b, floats8 c) {
    return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}

// eight f16 that lie `stride` bytes apart
inline floats8 gather_halves(const uint8_t * p, size_t stride) {
    __m128i h = _mm_cvtsi32_si128(load_as<uint16_t>(p));
    h         = _mm_insert_epi16(h, load_as<uint16_t>(p + stride), 1);
    h         = _mm_insert_epi16(h, load_as<uint16_t>(p + 2 * stride), 2);
    h         = _mm_insert_epi16(h, load_as<uint16_t>(p + 3 * stride), 3);
    h         = _mm_insert_epi16(h, load_as<uint16_t>(p + 4 * stride), 4);
    h         = _mm_insert_epi16(h, load_as<uint16_t>(p + 5 * stride), 5);
    h         = _mm_insert_epi16(h, load_as<uint16_t>(p + 6 * stride), 6);
    h         = _mm_insert_epi16(h, load_as<uint16_t>(p + 7 * stride), 7);
    return {_mm256_cvtph_ps(h)};
}

inline float half_to_float(uint16_t h) {
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h)));
}

inline floats8 from_bytes(uint64_t b) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long) b)))};
}

inline floats8 from_signed_bytes(uint64_t b) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((long long) b)))};
}

inline floats8 splat8(float x) {
    return {_mm256_set1_ps(x)};
}

// each of the first (or last) four twice
inline floats8 twice(floats8 a, bool last) {
    const __m256i index = last ? _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7) : _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    return {_mm256_permutevar8x32_ps(a.v, index)};
}

inline float reduce(floats8 a) {
    const __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    const __m128 t = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}

// Sums over 64 products each time, in 16 lanes.
struct sums16 {
    __m512 v = _mm512_setzero_ps();
};

inline __m512i products(bytes64 codes, __m512i x, __m512i init) {
#if defined(__AVX512VNNI__)
    return _mm512_dpbusd_epi32(init, codes.v, x);
#else
    // in two parts, so that 16 bits do not saturate
    const __m512i ones = _mm512_set1_epi16(1), low = _mm512_set1_epi8(127);
    const __m512i a = _mm512_madd_epi16(_mm512_maddubs_epi16(_mm512_and_si512(codes.v, low), x), ones);
    const __m512i b = _mm512_madd_epi16(_mm512_maddubs_epi16(_mm512_andnot_si512(low, codes.v), x), ones);
    return _mm512_add_epi32(init, _mm512_add_epi32(a, b));
#endif
}

// sums += scale of each block * (codes . x + init). J: which 64 of the chunk; scales: of its blocks of 32 or 16.
template <int J, bool WIDE>
inline void add_products(sums16& sums, bytes64 codes, const int8_t * x, const int32_t * init, floats8 scales) {
    const __m512i s     = products(codes, _mm512_loadu_si512(x), _mm512_loadu_si512(init));
    const __m512i index = _mm512_inserti64x4(_mm512_set1_epi32(2 * J), _mm256_set1_epi32(2 * J + 1), 1);
    const __m512  scale = _mm512_permutexvar_ps(index, _mm512_castps256_ps512(scales.v));
    sums.v              = _mm512_fmadd_ps(_mm512_cvtepi32_ps(s), scale, sums.v);
}

template <int J, bool WIDE>
inline void add_products(sums16& sums, bytes64 codes, const int8_t * x, const int32_t * init, floats8 scales_lo,
                         floats8 scales_hi) {
    const __m512i s = products(codes, _mm512_loadu_si512(x), _mm512_loadu_si512(init));
    const __m512i index =
        _mm512_setr_epi32(4 * J, 4 * J, 4 * J, 4 * J, 4 * J + 1, 4 * J + 1, 4 * J + 1, 4 * J + 1, 4 * J + 2, 4 * J + 2,
                          4 * J + 2, 4 * J + 2, 4 * J + 3, 4 * J + 3, 4 * J + 3, 4 * J + 3);
    const __m512 all = _mm512_insertf32x8(_mm512_castps256_ps512(scales_lo.v), scales_hi.v, 1);
    sums.v           = _mm512_fmadd_ps(_mm512_cvtepi32_ps(s), _mm512_permutexvar_ps(index, all), sums.v);
}

inline float reduce(sums16 s) {
    return _mm512_reduce_add_ps(s.v);
}

// 32 weights times 32 values
inline void add_floats(sums16& a, sums16& b, const float * w, const float * x) {
    a.v = _mm512_fmadd_ps(_mm512_loadu_ps(w), _mm512_loadu_ps(x), a.v);
    b.v = _mm512_fmadd_ps(_mm512_loadu_ps(w + 16), _mm512_loadu_ps(x + 16), b.v);
}

inline __m512 widen(const uint16_t * p, bool is_bf16) {
    const __m256i h = _mm256_loadu_si256((const __m256i *) p);
    return is_bf16 ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))
                   : _mm512_maskz_cvtph_ps(0xffff, h);
}

template <bool BF16>
inline void add_halves(sums16& a, sums16& b, const uint16_t * w, const float * x) {
    a.v = _mm512_fmadd_ps(widen(w, BF16), _mm512_loadu_ps(x), a.v);
    b.v = _mm512_fmadd_ps(widen(w + 16, BF16), _mm512_loadu_ps(x + 16), b.v);
}

template <bool BF16>
inline void widen_halves(float * to, const uint16_t * w) { // 32
    _mm512_storeu_ps(to, widen(w, BF16));
    _mm512_storeu_ps(to + 16, widen(w + 16, BF16));
}

#elif defined(__AVX2__)

struct bytes64 {
    __m256i v[2];
};

inline bytes64 load_bytes(const uint8_t * a, const uint8_t * b) {
    return {{_mm256_loadu_si256((const __m256i *) a), _mm256_loadu_si256((const __m256i *) b)}};
}

inline bytes64 load_bytes(const uint8_t * p) {
    return load_bytes(p, p + 32);
}

inline void store_bytes(uint8_t * p, bytes64 b) {
    _mm256_storeu_si256((__m256i *) p, b.v[0]);
    _mm256_storeu_si256((__m256i *) (p + 32), b.v[1]);
}

inline bytes64 load_nibbles(const uint8_t * a, const uint8_t * b) {
    const __m128i qa = _mm_loadu_si128((const __m128i *) a), qb = _mm_loadu_si128((const __m128i *) b);
    const __m256i mask = _mm256_set1_epi8(15);
    return {{_mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(qa, 4), qa), mask),
             _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(qb, 4), qb), mask)}};
}

inline bytes64 load_nibbles(const uint8_t * p) {
    const __m256i q = _mm256_loadu_si256((const __m256i *) p), mask = _mm256_set1_epi8(15);
    return {{_mm256_and_si256(q, mask), _mm256_and_si256(_mm256_srli_epi16(q, 4), mask)}};
}

template <int FIRST, int SECOND>
inline bytes64 load_shifted(const uint8_t * p, uint8_t mask) {
    const __m256i q = _mm256_loadu_si256((const __m256i *) p), m = _mm256_set1_epi8((char) mask);
    return {{_mm256_and_si256(_mm256_srli_epi16(q, FIRST), m), _mm256_and_si256(_mm256_srli_epi16(q, SECOND), m)}};
}

template <int SHIFT>
inline bytes64 shifted_right(bytes64 b, uint8_t mask) {
    const __m256i m = _mm256_set1_epi8((char) mask);
    return {
        {_mm256_and_si256(_mm256_srli_epi16(b.v[0], SHIFT), m), _mm256_and_si256(_mm256_srli_epi16(b.v[1], SHIFT), m)}};
}

template <int SHIFT>
inline bytes64 shifted_left(bytes64 b) {
    return {{_mm256_slli_epi16(b.v[0], SHIFT), _mm256_slli_epi16(b.v[1], SHIFT)}};
}

inline bytes64 either(bytes64 a, bytes64 b) {
    return {{_mm256_or_si256(a.v[0], b.v[0]), _mm256_or_si256(a.v[1], b.v[1])}};
}

inline bytes64 flipped(bytes64 b) {
    const __m256i m = _mm256_set1_epi8((char) 0x80);
    return {{_mm256_xor_si256(b.v[0], m), _mm256_xor_si256(b.v[1], m)}};
}

inline bytes64 spread_bits(uint64_t bits, uint8_t value) {
    bytes64       r;
    const __m256i place = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit   = _mm256_set1_epi64x((long long) 0x8040201008040201);
    for (int h = 0; h < 2; ++h) {
        const __m256i b = _mm256_shuffle_epi8(_mm256_set1_epi32((int) (bits >> (32 * h))), place);
        r.v[h] = _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(b, bit), bit), _mm256_set1_epi8((char) value));
    }
    return r;
}

inline bytes64 look_up(const uint8_t * table, bytes64 b) {
    const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) table));
    return {{_mm256_shuffle_epi8(t, b.v[0]), _mm256_shuffle_epi8(t, b.v[1])}};
}

struct floats8 {
    __m256 v;
};

inline floats8 load_floats8(const float * p) {
    return {_mm256_loadu_ps(p)};
}

inline void store_floats8(float * p, floats8 a) {
    _mm256_storeu_ps(p, a.v);
}

inline floats8 multiply(floats8 a, floats8 b) {
    return {_mm256_mul_ps(a.v, b.v)};
}

inline floats8 multiply_add(floats8 a, floats8 b, floats8 c) {
    return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}

// eight f16 that lie `stride` bytes apart
inline floats8 gather_halves(const uint8_t * p, size_t stride) {
    __m128i h = _mm_cvtsi32_si128(load_as<uint16_t>(p));
    h         = _mm_insert_epi16(h, load_as<uint16_t>(p + stride), 1);
    h         = _mm_insert_epi16(h, load_as<uint16_t>(p + 2 * stride), 2);
    h         = _mm_insert_epi16(h, load_as<uint16_t>(p + 3 * stride), 3);
    h         = _mm_insert_epi16(h, load_as<uint16_t>(p + 4 * stride), 4);
    h         = _mm_insert_epi16(h, load_as<uint16_t>(p + 5 * stride), 5);
    h         = _mm_insert_epi16(h, load_as<uint16_t>(p + 6 * stride), 6);
    h         = _mm_insert_epi16(h, load_as<uint16_t>(p + 7 * stride), 7);
    return {_mm256_cvtph_ps(h)};
}

inline float half_to_float(uint16_t h) {
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h)));
}

inline floats8 from_bytes(uint64_t b) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long) b)))};
}

inline floats8 from_signed_bytes(uint64_t b) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((long long) b)))};
}

inline floats8 splat8(float x) {
    return {_mm256_set1_ps(x)};
}

// each of the first (or last) four twice
inline floats8 twice(floats8 a, bool last) {
    const __m256i index = last ? _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7) : _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    return {_mm256_permutevar8x32_ps(a.v, index)};
}

inline float reduce(floats8 a) {
    const __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    const __m128 t = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}

struct sums16 {
    __m256 v[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
};

template <bool WIDE>
inline __m256i products(__m256i codes, const int8_t * x, const int32_t * init) {
    const __m256i q = _mm256_loadu_si256((const __m256i *) x), ones = _mm256_set1_epi16(1);
    const __m256i start = _mm256_loadu_si256((const __m256i *) init);
    if constexpr (WIDE) { // in two parts, so that 16 bits do not saturate
        const __m256i low = _mm256_set1_epi8(127);
        const __m256i a   = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_and_si256(codes, low), q), ones);
        const __m256i b   = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_andnot_si256(low, codes), q), ones);
        return _mm256_add_epi32(start, _mm256_add_epi32(a, b));
    }
    return _mm256_add_epi32(start, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, q), ones));
}

template <int J, bool WIDE>
inline void add_products(sums16& sums, bytes64 codes, const int8_t * x, const int32_t * init, floats8 scales) {
    for (int h = 0; h < 2; ++h) {
        const __m256i s     = products<WIDE>(codes.v[h], x + 32 * h, init + 8 * h);
        const __m256  scale = _mm256_permutevar8x32_ps(scales.v, _mm256_set1_epi32(2 * J + h));
        sums.v[h]           = _mm256_fmadd_ps(_mm256_cvtepi32_ps(s), scale, sums.v[h]);
    }
}

template <int J, bool WIDE>
inline void add_products(sums16& sums, bytes64 codes, const int8_t * x, const int32_t * init, floats8 scales_lo,
                         floats8 scales_hi) {
    for (int h = 0; h < 2; ++h) {
        const __m256i s     = products<WIDE>(codes.v[h], x + 32 * h, init + 8 * h);
        const int     first = (4 * J + 2 * h) % 8;
        const __m256i index = _mm256_setr_epi32(first, first, first, first, first + 1, first + 1, first + 1, first + 1);
        const __m256  scale = _mm256_permutevar8x32_ps(J < 2 ? scales_lo.v : scales_hi.v, index);
        sums.v[h]           = _mm256_fmadd_ps(_mm256_cvtepi32_ps(s), scale, sums.v[h]);
    }
}

inline float reduce(sums16 s) {
    return reduce(floats8{_mm256_add_ps(s.v[0], s.v[1])});
}

inline void add_floats(sums16& a, sums16& b, const float * w, const float * x) {
    a.v[0] = _mm256_fmadd_ps(_mm256_loadu_ps(w), _mm256_loadu_ps(x), a.v[0]);
    a.v[1] = _mm256_fmadd_ps(_mm256_loadu_ps(w + 8), _mm256_loadu_ps(x + 8), a.v[1]);
    b.v[0] = _mm256_fmadd_ps(_mm256_loadu_ps(w + 16), _mm256_loadu_ps(x + 16), b.v[0]);
    b.v[1] = _mm256_fmadd_ps(_mm256_loadu_ps(w + 24), _mm256_loadu_ps(x + 24), b.v[1]);
}

inline __m256 widen(const uint16_t * p, bool is_bf16) {
    const __m128i h = _mm_loadu_si128((const __m128i *) p);
    return is_bf16 ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)) : _mm256_cvtph_ps(h);
}

template <bool BF16>
inline void add_halves(sums16& a, sums16& b, const uint16_t * w, const float * x) {
    a.v[0] = _mm256_fmadd_ps(widen(w, BF16), _mm256_loadu_ps(x), a.v[0]);
    a.v[1] = _mm256_fmadd_ps(widen(w + 8, BF16), _mm256_loadu_ps(x + 8), a.v[1]);
    b.v[0] = _mm256_fmadd_ps(widen(w + 16, BF16), _mm256_loadu_ps(x + 16), b.v[0]);
    b.v[1] = _mm256_fmadd_ps(widen(w + 24, BF16), _mm256_loadu_ps(x + 24), b.v[1]);
}

template <bool BF16>
inline void widen_halves(float * to, const uint16_t * w) {
    for (int i = 0; i < 32; i += 8) {
        _mm256_storeu_ps(to + i, widen(w + i, BF16));
    }
}

#else // any processor: plain loops, which compilers turn into what it has

struct bytes64 {
    uint8_t v[64];
};

inline bytes64 load_bytes(const uint8_t * a, const uint8_t * b) {
    bytes64 r;
    memcpy(r.v, a, 32);
    memcpy(r.v + 32, b, 32);
    return r;
}

inline bytes64 load_bytes(const uint8_t * p) {
    return load_bytes(p, p + 32);
}

inline void store_bytes(uint8_t * p, bytes64 b) {
    memcpy(p, b.v, 64);
}

inline bytes64 load_nibbles(const uint8_t * a, const uint8_t * b) {
    bytes64 r;
    for (int i = 0; i < 16; ++i) {
        r.v[i]      = a[i] & 15;
        r.v[i + 16] = a[i] >> 4;
        r.v[i + 32] = b[i] & 15;
        r.v[i + 48] = b[i] >> 4;
    }
    return r;
}

inline bytes64 load_nibbles(const uint8_t * p) {
    bytes64 r;
    for (int i = 0; i < 32; ++i) {
        r.v[i]      = p[i] & 15;
        r.v[i + 32] = p[i] >> 4;
    }
    return r;
}

template <int FIRST, int SECOND>
inline bytes64 load_shifted(const uint8_t * p, uint8_t mask) {
    bytes64 r;
    for (int i = 0; i < 32; ++i) {
        r.v[i]      = (p[i] >> FIRST) & mask;
        r.v[i + 32] = (p[i] >> SECOND) & mask;
    }
    return r;
}

template <int SHIFT>
inline bytes64 shifted_right(bytes64 b, uint8_t mask) {
    for (uint8_t& v : b.v) {
        v = (v >> SHIFT) & mask;
    }
    return b;
}

template <int SHIFT>
inline bytes64 shifted_left(bytes64 b) {
    for (uint8_t& v : b.v) {
        v = (uint8_t) (v << SHIFT);
    }
    return b;
}

inline bytes64 either(bytes64 a, bytes64 b) {
    for (int i = 0; i < 64; ++i) {
        a.v[i] |= b.v[i];
    }
    return a;
}

inline bytes64 flipped(bytes64 b) {
    for (uint8_t& v : b.v) {
        v ^= 0x80;
    }
    return b;
}

inline bytes64 spread_bits(uint64_t bits, uint8_t value) {
    bytes64 r;
    for (int i = 0; i < 64; ++i) {
        r.v[i] = (bits >> i & 1) != 0 ? value : 0;
    }
    return r;
}

inline bytes64 look_up(const uint8_t * table, bytes64 b) {
    for (uint8_t& v : b.v) {
        v = table[v];
    }
    return b;
}

struct floats8 {
    float v[8];
};

inline floats8 load_floats8(const float * p) {
    return load_as<floats8>(p);
}

inline void store_floats8(float * p, floats8 a) {
    memcpy(p, a.v, sizeof(a.v));
}

inline floats8 multiply(floats8 a, floats8 b) {
    for (int i = 0; i < 8; ++i) {
        a.v[i] *= b.v[i];
    }
    return a;
}

inline floats8 multiply_add(floats8 a, floats8 b, floats8 c) {
    for (int i = 0; i < 8; ++i) {
        c.v[i] += a.v[i] * b.v[i];
    }
    return c;
}

inline float widen(uint16_t h, bool is_bf16) {
    // exponent and mantissa moved into place; for f16 the bias is corrected by a product, which also handles subnormals
    if (is_bf16) {
        const uint32_t shifted = (uint32_t) h << 16;
        return load_as<float>(&shifted);
    }
    const uint32_t bits = (h & 0x7fffu) << 13;
    const float    abs  = load_as<float>(&bits) * 0x1p112f;
    const uint32_t big  = bits | 0x7f800000u; // infinity and NaN keep their exponent of all ones
    const float    size = bits >= (0x7c00u << 13) ? load_as<float>(&big) : abs;
    return (h & 0x8000u) != 0 ? -size : size;
}

inline float half_to_float(uint16_t h) {
    return widen(h, false);
}

inline floats8 gather_halves(const uint8_t * p, size_t stride) {
    floats8 r;
    for (int i = 0; i < 8; ++i) {
        r.v[i] = widen(load_as<uint16_t>(p + i * stride), false);
    }
    return r;
}

inline floats8 from_bytes(uint64_t b) {
    floats8 r;
    for (int i = 0; i < 8; ++i) {
        r.v[i] = (float) (uint8_t) (b >> (8 * i));
    }
    return r;
}

inline floats8 from_signed_bytes(uint64_t b) {
    floats8 r;
    for (int i = 0; i < 8; ++i) {
        r.v[i] = (float) (int8_t) (b >> (8 * i));
    }
    return r;
}

inline floats8 splat8(float x) {
    return {{x, x, x, x, x, x, x, x}};
}

inline floats8 twice(floats8 a, bool last) {
    floats8 r;
    for (int i = 0; i < 8; ++i) {
        r.v[i] = a.v[i / 2 + (last ? 4 : 0)];
    }
    return r;
}

inline float reduce(floats8 a) {
    float s = 0.0f;
    for (const float v : a.v) {
        s += v;
    }
    return s;
}

struct sums16 {
    float v[16] = {};
};

template <int GROUP>
inline void add_lanes(sums16& sums, const bytes64& codes, const int8_t * x, const int32_t * init,
                      const float * scales) {
    for (int k = 0; k < 16; ++k) {
        int32_t s = init[k];
        for (int i = 4 * k; i < 4 * k + 4; ++i) {
            s += codes.v[i] * x[i];
        }
        sums.v[k] += scales[4 * k / GROUP] * (float) s;
    }
}

template <int J, bool WIDE>
inline void add_products(sums16& sums, bytes64 codes, const int8_t * x, const int32_t * init, floats8 scales) {
    add_lanes<32>(sums, codes, x, init, scales.v + 2 * J);
}

template <int J, bool WIDE>
inline void add_products(sums16& sums, bytes64 codes, const int8_t * x, const int32_t * init, floats8 scales_lo,
                         floats8 scales_hi) {
    add_lanes<16>(sums, codes, x, init, (J < 2 ? scales_lo.v : scales_hi.v) + 4 * J % 8);
}

inline float reduce(sums16 a) {
    float s = 0.0f;
    for (const float v : a.v) {
        s += v;
    }
    return s;
}

inline void add_floats(sums16& a, sums16& b, const float * w, const float * x) {
    for (int i = 0; i < 16; ++i) {
        a.v[i] += w[i] * x[i];
        b.v[i] += w[i + 16] * x[i + 16];
    }
}

template <bool BF16>
inline void add_halves(sums16& a, sums16& b, const uint16_t * w, const float * x) {
    for (int i = 0; i < 16; ++i) {
        a.v[i] += widen(w[i], BF16) * x[i];
        b.v[i] += widen(w[i + 16], BF16) * x[i + 16];
    }
}

template <bool BF16>
inline void widen_halves(float * to, const uint16_t * w) {
    for (int i = 0; i < 32; ++i) {
        to[i] = widen(w[i], BF16);
    }
}

#endif

} // namespace
