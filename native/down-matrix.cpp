#include "down-matrix.h"

#include <cstring>
#include <vector>

namespace prosparse {
namespace {

using scales = down_codec::scales;

constexpr int8_t iq4_levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

//                                    low high zero signed bf16  kind                 group super zero_sc table
constexpr down_codec codec_f32    = {32, 0, 0, false, false, scales::none, 1, 1, 0, nullptr};
constexpr down_codec codec_f16    = {16, 0, 0, false, false, scales::none, 1, 1, 0, nullptr};
constexpr down_codec codec_bf16   = {16, 0, 0, false, true, scales::none, 1, 1, 0, nullptr};
constexpr down_codec codec_q8_0   = {8, 0, 0, true, false, scales::d, 32, 32, 0, nullptr};
constexpr down_codec codec_q4_0   = {4, 0, 8, false, false, scales::d, 32, 32, 0, nullptr};
constexpr down_codec codec_q4_1   = {4, 0, 0, false, false, scales::d_m, 32, 32, 0, nullptr};
constexpr down_codec codec_q5_0   = {4, 1, 16, false, false, scales::d, 32, 32, 0, nullptr};
constexpr down_codec codec_q5_1   = {4, 1, 0, false, false, scales::d_m, 32, 32, 0, nullptr};
constexpr down_codec codec_q2_k   = {2, 0, 0, false, false, scales::d_sc4_dmin_mn4, 16, 256, 0, nullptr};
constexpr down_codec codec_q3_k   = {2, 1, 4, false, false, scales::d_sc, 16, 256, 32, nullptr};
constexpr down_codec codec_q4_k   = {4, 0, 0, false, false, scales::d_sc_dmin_mn, 32, 256, 0, nullptr};
constexpr down_codec codec_q5_k   = {4, 1, 0, false, false, scales::d_sc_dmin_mn, 32, 256, 0, nullptr};
constexpr down_codec codec_q6_k   = {4, 2, 32, false, false, scales::d_sc, 16, 256, 0, nullptr};
constexpr down_codec codec_iq4_nl = {4, 0, 0, false, false, scales::d, 32, 32, 0, iq4_levels};
constexpr down_codec codec_iq4_xs = {4, 0, 0, false, false, scales::d_sc, 32, 256, 32, iq4_levels};

// One block of a quantized row, taken apart.
struct block_parts {
    uint8_t  codes[256];
    uint16_t d = 0;
    uint16_t m = 0;
    uint8_t  sc[16];
    uint8_t  mn[16];
};

uint16_t read_u16(const uint8_t * p) {
    return (uint16_t) (p[0] | p[1] << 8);
}

// 32 nibbles: element k in the low half of byte k, element k + 16 in the high half
void unpack_nibbles(const uint8_t * q, uint8_t * codes) {
    for (int k = 0; k < 16; ++k) {
        codes[k]      = q[k] & 15;
        codes[k + 16] = q[k] >> 4;
    }
}

// 256 nibbles in runs of 64: 32 bytes hold elements k (low) and k + 32 (high)
void unpack_nibbles_k(const uint8_t * q, uint8_t * codes) {
    for (int run = 0; run < 4; ++run) {
        for (int k = 0; k < 32; ++k) {
            codes[run * 64 + k]      = q[run * 32 + k] & 15;
            codes[run * 64 + k + 32] = q[run * 32 + k] >> 4;
        }
    }
}

// 256 two-bit values in runs of 128: 32 bytes hold four layers of 32 elements
void unpack_pairs_k(const uint8_t * q, uint8_t * codes) {
    for (int run = 0; run < 2; ++run) {
        for (int layer = 0; layer < 4; ++layer) {
            for (int k = 0; k < 32; ++k) {
                codes[run * 128 + layer * 32 + k] = q[run * 32 + k] >> (2 * layer) & 3;
            }
        }
    }
}

// the 6-bit scales and mins of Q4_K and Q5_K: 12 bytes for 8 of each
void unpack_scales_k4(const uint8_t * s, uint8_t * sc, uint8_t * mn) {
    for (int j = 0; j < 4; ++j) {
        sc[j]     = s[j] & 63;
        mn[j]     = s[j + 4] & 63;
        sc[j + 4] = (uint8_t) ((s[j + 8] & 15) | s[j] >> 6 << 4);
        mn[j + 4] = (uint8_t) (s[j + 8] >> 4 | s[j + 4] >> 6 << 4);
    }
}

// the 6-bit scales of Q3_K: 12 bytes for 16, four bits in the first eight bytes and two in the last four
void unpack_scales_q3(const uint8_t * s, uint8_t * sc) {
    for (int j = 0; j < 16; ++j) {
        const int low  = j < 8 ? s[j] & 15 : s[j - 8] >> 4;
        const int high = s[8 + j % 4] >> (2 * (j / 4)) & 3;
        sc[j]          = (uint8_t) (low | high << 4);
    }
}

// Takes the block at p apart. Layouts: ggml/src/ggml-common.h, the order of elements as in ggml's dequantize_row_*.
void unpack_block(ggml_type type, const uint8_t * p, block_parts& b) {
    switch (type) {
        case GGML_TYPE_Q8_0: // d, 32 int8
            b.d = read_u16(p);
            memcpy(b.codes, p + 2, 32);
            break;
        case GGML_TYPE_Q4_0:   // d, nibbles
        case GGML_TYPE_IQ4_NL: // the same with levels
            b.d = read_u16(p);
            unpack_nibbles(p + 2, b.codes);
            break;
        case GGML_TYPE_Q4_1: // d, m, nibbles
            b.d = read_u16(p);
            b.m = read_u16(p + 2);
            unpack_nibbles(p + 4, b.codes);
            break;
        case GGML_TYPE_Q5_0: // d, 32 high bits, nibbles
        case GGML_TYPE_Q5_1: // d, m, 32 high bits, nibbles
        {
            const int at = type == GGML_TYPE_Q5_1 ? 4 : 2;
            b.d          = read_u16(p);
            b.m          = type == GGML_TYPE_Q5_1 ? read_u16(p + 2) : 0;
            uint32_t high;
            memcpy(&high, p + at, 4);
            unpack_nibbles(p + at + 4, b.codes);
            for (int k = 0; k < 32; ++k) {
                b.codes[k] |= (high >> k & 1) << 4;
            }
            break;
        }
        case GGML_TYPE_Q2_K: // 16 scales (4-bit scale, 4-bit min), 2-bit codes, d, dmin
            memcpy(b.sc, p, 16);
            unpack_pairs_k(p + 16, b.codes);
            b.d = read_u16(p + 80);
            b.m = read_u16(p + 82);
            break;
        case GGML_TYPE_Q3_K: // 32 bytes of high bits, 2-bit codes, 12 bytes of scales, d
            unpack_pairs_k(p + 32, b.codes);
            for (int k = 0; k < 256; ++k) {
                b.codes[k] |= (p[k % 32] >> (k / 32) & 1) << 2;
            }
            unpack_scales_q3(p + 96, b.sc);
            b.d = read_u16(p + 108);
            break;
        case GGML_TYPE_Q4_K: // d, dmin, 12 bytes of scales, nibbles
            b.d = read_u16(p);
            b.m = read_u16(p + 2);
            unpack_scales_k4(p + 4, b.sc, b.mn);
            unpack_nibbles_k(p + 16, b.codes);
            break;
        case GGML_TYPE_Q5_K: // d, dmin, 12 bytes of scales, 32 bytes of high bits, nibbles
            b.d = read_u16(p);
            b.m = read_u16(p + 2);
            unpack_scales_k4(p + 4, b.sc, b.mn);
            unpack_nibbles_k(p + 48, b.codes);
            for (int k = 0; k < 256; ++k) {
                b.codes[k] |= (p[16 + k % 32] >> (k / 32) & 1) << 4;
            }
            break;
        case GGML_TYPE_Q6_K: // 128 bytes of low nibbles, 64 of high pairs, 16 int8 scales, d
            for (int run = 0; run < 2; ++run) {
                for (int k = 0; k < 32; ++k) {
                    const uint8_t * low  = p + run * 64 + k;
                    const uint8_t   high = p[128 + run * 32 + k];
                    uint8_t *       c    = b.codes + run * 128 + k;
                    c[0]                 = (uint8_t) ((low[0] & 15) | (high & 3) << 4);
                    c[32]                = (uint8_t) ((low[32] & 15) | (high >> 2 & 3) << 4);
                    c[64]                = (uint8_t) (low[0] >> 4 | (high >> 4 & 3) << 4);
                    c[96]                = (uint8_t) (low[32] >> 4 | (high >> 6 & 3) << 4);
                }
            }
            memcpy(b.sc, p + 192, 16);
            b.d = read_u16(p + 208);
            break;
        case GGML_TYPE_IQ4_XS: // d, 16 high bits of scales, 4 bytes of low bits, nibbles in blocks of 32
            b.d = read_u16(p);
            for (int j = 0; j < 8; ++j) {
                b.sc[j] = (uint8_t) ((p[4 + j / 2] >> (4 * (j % 2)) & 15) | (read_u16(p + 2) >> (2 * j) & 3) << 4);
                unpack_nibbles(p + 8 + 16 * j, b.codes + 32 * j);
            }
            break;
        default:
            GGML_ABORT("no codec for %s", ggml_type_name(type));
    }
}

// Writes the codes of one neuron for one chunk; codes: chunk_size of them.
void pack_chunk(const down_codec& c, const uint8_t * codes, uint8_t * low, uint8_t * high) {
    if (c.low_bits == 8) {
        memcpy(low, codes, chunk_size);
        return;
    }
    memset(low, 0, c.low_bytes());
    memset(high, 0, c.high_bytes());
    for (int k = 0; k < chunk_size; ++k) {
        const int code = codes[k] & ((1 << c.low_bits) - 1);
        const int rest = codes[k] >> c.low_bits;
        if (c.low_bits == 4) {
            low[k % 16] |= (uint8_t) (code << (4 * (k / 16)));
        } else {
            low[k / 4] |= (uint8_t) (code << (2 * (k % 4)));
        }
        if (c.high_bits == 1) {
            high[k / 8] |= (uint8_t) (rest << (k % 8));
        } else if (c.high_bits == 2) {
            high[k / 4] |= (uint8_t) (rest << (2 * (k % 4)));
        }
    }
}

int64_t count_chunks(int64_t n_embd) {
    return (n_embd + chunk_size - 1) / chunk_size;
}

size_t align(size_t size) {
    return (size + 63) & ~(size_t) 63;
}

// Lays the arrays out one after the other; returns the end.
size_t lay_out(const down_codec& c, int64_t n_ff, int64_t n_embd, down_view& v, const void * data) {
    const int64_t n_chunks = count_chunks(n_embd);
    const int64_t n_pad    = n_chunks * chunk_size;
    const bool    has_m    = c.kind != scales::none && c.kind != scales::d && c.kind != scales::d_sc;
    const bool    has_sc = c.kind == scales::d_sc || c.kind == scales::d_sc_dmin_mn || c.kind == scales::d_sc4_dmin_mn4;
    const bool    has_mn = c.kind == scales::d_sc_dmin_mn;
    size_t        at     = 0;
    auto          place  = [&](size_t size) {
        const uint8_t * p = (const uint8_t *) ((uintptr_t) data + at); // data is null when only the size is wanted
        at += align(size);
        return p;
    };
    v      = {&c, n_ff, n_embd, n_chunks, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    v.low  = place(n_ff * n_chunks * c.low_bytes());
    v.high = place(n_ff * n_chunks * c.high_bytes());
    v.d    = (const uint16_t *) place(c.is_float() ? 0 : n_ff / c.super * n_pad * 2);
    v.m    = (const uint16_t *) place(has_m ? n_ff / c.super * n_pad * 2 : 0);
    v.sc   = place(has_sc ? n_ff / c.group * n_pad : 0);
    v.mn   = place(has_mn ? n_ff / c.group * n_pad : 0);
    return at;
}

void pack_float_chunk(const down_view& v, ggml_type type, const uint8_t * rows, int64_t chunk) {
    const size_t size = ggml_type_size(type);
    for (int64_t i = 0; i < v.n_ff; ++i) {
        uint8_t * to = (uint8_t *) v.low + (i * v.n_chunks + chunk) * v.codec->low_bytes();
        for (int64_t k = 0; k < chunk_size; ++k) {
            const int64_t e = chunk * chunk_size + k;
            if (e < v.n_embd) {
                memcpy(to + k * size, rows + (e * v.n_ff + i) * size, size);
            } else {
                memset(to + k * size, 0, size);
            }
        }
    }
}

void pack_coded_chunk(const down_view& v, ggml_type type, const uint8_t * rows, int64_t chunk,
                      std::vector<block_parts>& parts) {
    const down_codec& c         = *v.codec;
    const int64_t     n_pad     = v.n_chunks * chunk_size;
    const int64_t     n_blocks  = v.n_ff / c.super;
    const size_t      row_bytes = ggml_row_size(type, v.n_ff);
    const size_t      block     = ggml_type_size(type);
    const int         n_groups  = c.super / c.group;
    uint8_t           codes[chunk_size];
    for (int64_t b = 0; b < n_blocks; ++b) {
        for (int k = 0; k < chunk_size; ++k) {
            const int64_t e = chunk * chunk_size + k;
            parts[k]        = {};
            if (e < v.n_embd) {
                unpack_block(type, rows + e * row_bytes + b * block, parts[k]);
            }
            const int64_t at       = b * n_pad + e;
            ((uint16_t *) v.d)[at] = parts[k].d;
            if (c.kind != scales::d && c.kind != scales::d_sc) {
                ((uint16_t *) v.m)[at] = parts[k].m;
            }
            for (int g = 0; n_groups > 1 && g < n_groups; ++g) {
                ((uint8_t *) v.sc)[(b * n_groups + g) * n_pad + e] = parts[k].sc[g];
                if (c.kind == scales::d_sc_dmin_mn) {
                    ((uint8_t *) v.mn)[(b * n_groups + g) * n_pad + e] = parts[k].mn[g];
                }
            }
        }
        for (int i = 0; i < c.super; ++i) {
            for (int k = 0; k < chunk_size; ++k) {
                codes[k] = parts[k].codes[i];
            }
            const int64_t at = (b * c.super + i) * v.n_chunks + chunk;
            pack_chunk(c, codes, (uint8_t *) v.low + at * c.low_bytes(), (uint8_t *) v.high + at * c.high_bytes());
        }
    }
}

} // namespace

const down_codec * find_down_codec(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:
            return &codec_f32;
        case GGML_TYPE_F16:
            return &codec_f16;
        case GGML_TYPE_BF16:
            return &codec_bf16;
        case GGML_TYPE_Q8_0:
            return &codec_q8_0;
        case GGML_TYPE_Q4_0:
            return &codec_q4_0;
        case GGML_TYPE_Q4_1:
            return &codec_q4_1;
        case GGML_TYPE_Q5_0:
            return &codec_q5_0;
        case GGML_TYPE_Q5_1:
            return &codec_q5_1;
        case GGML_TYPE_Q2_K:
            return &codec_q2_k;
        case GGML_TYPE_Q3_K:
            return &codec_q3_k;
        case GGML_TYPE_Q4_K:
            return &codec_q4_k;
        case GGML_TYPE_Q5_K:
            return &codec_q5_k;
        case GGML_TYPE_Q6_K:
            return &codec_q6_k;
        case GGML_TYPE_IQ4_NL:
            return &codec_iq4_nl;
        case GGML_TYPE_IQ4_XS:
            return &codec_iq4_xs;
        default:
            return nullptr;
    }
}

size_t down_size(const down_codec& codec, int64_t n_ff, int64_t n_embd) {
    down_view view;
    return lay_out(codec, n_ff, n_embd, view, nullptr);
}

down_view view_down(const down_codec& codec, int64_t n_ff, int64_t n_embd, const void * data) {
    down_view view;
    lay_out(codec, n_ff, n_embd, view, data);
    return view;
}

void pack_down(ggml_type type, int64_t n_ff, int64_t n_embd, const void * rows, void * data) {
    const down_codec& codec = *find_down_codec(type);
    const down_view   view  = view_down(codec, n_ff, n_embd, data);
#pragma omp parallel
    {
        std::vector<block_parts> parts(chunk_size);
#pragma omp for
        for (int64_t chunk = 0; chunk < view.n_chunks; ++chunk) {
            if (codec.is_float()) {
                pack_float_chunk(view, type, (const uint8_t *) rows, chunk);
            } else {
                pack_coded_chunk(view, type, (const uint8_t *) rows, chunk, parts);
            }
        }
    }
}

} // namespace prosparse
