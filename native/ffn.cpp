#include "ffn.h"

#include "row-kernels.h"

#include "ggml-cpu.h"

#include <omp.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace prosparse {
namespace {

// Up to this many tokens are decoded together: rows are read once for all of them. More go through ggml's matrix
// product.
constexpr int max_decode_tokens = 16;

const ffn_weight * weight_of(const ggml_tensor * tensor) {
    if (tensor == nullptr || tensor->buffer == nullptr || !is_prosparse_buffer_type(tensor->buffer->buft)) {
        return nullptr;
    }
    return (const ffn_weight *) tensor->extra;
}

bool is_product_with(const ggml_tensor * node, weight_role role) {
    const ffn_weight * weight = node->op == GGML_OP_MUL_MAT ? weight_of(node->src[0]) : nullptr;
    return weight != nullptr && weight->role == role;
}

bool is_split_glu(const ggml_tensor * node) {
    if (node->op != GGML_OP_GLU || node->src[1] == nullptr || node->type != GGML_TYPE_F32) {
        return false;
    }
    const ggml_glu_op op = ggml_get_glu_op(node);
    return op == GGML_GLU_OP_SWIGLU || op == GGML_GLU_OP_REGLU;
}

// The gate or up product at the root of one input of a GLU, through scales and LoRA's additions; nullptr if there is
// none.
const ggml_tensor * find_product(const ggml_tensor * tensor, weight_role role, float& scale) {
    scale = 1.0f;
    for (int depth = 0; tensor != nullptr && depth < 8; ++depth) {
        if (is_product_with(tensor, role)) {
            return tensor;
        }
        if (tensor->op == GGML_OP_MUL) {
            const ffn_weight * weight = weight_of(tensor->src[1]);
            if (weight != nullptr && weight->role == weight_role::scale) {
                scale *= *(const float *) tensor->src[1]->data;
            }
        } else if (tensor->op != GGML_OP_ADD) {
            return nullptr;
        }
        tensor = tensor->src[0];
    }
    return nullptr;
}

// x of a product: plain rows of f32
bool has_plain_input(const ggml_tensor * product) {
    const ggml_tensor * x = product->src[1];
    return x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float) && x->ne[2] == 1 && x->ne[3] == 1;
}

// An FFN whose nodes are all in our hands: down(act(gate(x)) * up(x)).
struct ffn_nodes {
    ggml_tensor *       down;
    ggml_tensor *       glu;
    const ggml_tensor * gate;
    const ggml_tensor * up;
    const ffn_weight *  down_weight;
    float               factor; // product of the two scales, 1 unless somebody chose another pair
};

// One input of the GLU is `product`, or `product` times a scale, and nothing else.
bool is_direct(const ggml_tensor * tensor, const ggml_tensor * product) {
    return tensor == product || (tensor->op == GGML_OP_MUL && tensor->src[0] == product);
}

bool match_ffn(ggml_tensor * down, ffn_nodes& ffn) {
    ffn.down        = down;
    ffn.down_weight = weight_of(down->src[0]);
    ffn.glu         = down->src[1];
    if (!is_split_glu(ffn.glu)) {
        return false;
    }
    float gate_scale, up_scale;
    ffn.gate = find_product(ffn.glu->src[0], weight_role::gate, gate_scale);
    ffn.up   = find_product(ffn.glu->src[1], weight_role::up, up_scale);
    if (ffn.gate == nullptr || ffn.up == nullptr || !is_direct(ffn.glu->src[0], ffn.gate) ||
        !is_direct(ffn.glu->src[1], ffn.up)) {
        return false;
    }
    if (ggml_get_glu_op(ffn.glu) == GGML_GLU_OP_SWIGLU && gate_scale < 256.0f) {
        return false; // SiLU is ReLU only with the large scale
    }
    ffn.factor = gate_scale * up_scale;
    return ffn.gate->src[1] == ffn.up->src[1] && has_plain_input(ffn.gate) && ggml_is_contiguous(ffn.glu) &&
           ggml_is_contiguous(down) && weight_of(ffn.gate->src[0])->layer == ffn.down_weight->layer &&
           weight_of(ffn.up->src[0])->layer == ffn.down_weight->layer;
}

// ---- ggml-cpu

// Lets ggml-cpu compute some nodes, in order.
ggml_status compute_with_ggml(ffn_context& context, ggml_tensor * const * nodes, int n_nodes) {
    context.graph_memory.resize(ggml_graph_overhead_custom(n_nodes, false) + ggml_tensor_overhead());
    ggml_init_params params = {context.graph_memory.size(), context.graph_memory.data(), /* .no_alloc = */ true};
    ggml_context *   meta   = ggml_init(params);
    ggml_cgraph *    graph  = ggml_new_graph_custom(meta, n_nodes, false);
    for (int i = 0; i < n_nodes; ++i) {
        ggml_graph_add_node(graph, nodes[i]);
    }
    ggml_cplan plan = ggml_graph_plan(graph, context.n_threads, nullptr);
    if (context.graph_work.size() < plan.work_size) {
        context.graph_work.resize(plan.work_size);
    }
    plan.work_data           = context.graph_work.data();
    const ggml_status status = ggml_graph_compute(graph, &plan);
    ggml_free(meta);
    return status;
}

// ---- decoding

// Rows of a gate or up matrix, multiplied with x by our kernels, or by ggml-cpu's dot product for types they do not
// know.
class weight_rows {
public:
    explicit weight_rows(const ggml_tensor * product) : weight(product->src[0]) {
        if (!kernels.supports(weight->type)) {
            const auto * traits = ggml_get_type_traits_cpu(weight->type);
            dot                 = traits->vec_dot;
            quantize            = ggml_get_type_traits_cpu(traits->vec_dot_type)->from_float;
        }
    }

    // Bytes of one prepared token, whole cache lines.
    size_t input_bytes() const {
        const size_t n =
            dot != nullptr ? ggml_row_size(weight_dot_type(), weight->ne[0]) : row_input_bytes(weight->ne[0]);
        return (n + 63) & ~(size_t) 63;
    }

    row_input prepare(const float * x, uint8_t * memory) const {
        if (dot == nullptr) {
            return kernels.prepare(weight->type, x, weight->ne[0], memory);
        }
        if (weight_dot_type() == GGML_TYPE_F32) {
            memcpy(memory, x, weight->ne[0] * sizeof(float));
        } else {
            quantize(x, memory, weight->ne[0]);
        }
        row_input in = {};
        in.q         = (const int8_t *) memory;
        return in;
    }

    void range(int64_t r0, int64_t r1, const row_input& x, float * out) const {
        if (dot == nullptr) {
            kernels.dot_range(weight->type, weight->data, weight->nb[1], weight->ne[0], r0, r1, x, out);
            return;
        }
        for (int64_t r = r0; r < r1; ++r) {
            out[r] = one(r, x);
        }
    }

    void list(const int32_t * rows, int64_t count, const row_input& x, float * out) const {
        if (dot == nullptr) {
            kernels.dot_list(weight->type, weight->data, weight->nb[1], weight->ne[0], rows, count, x, out);
            return;
        }
        for (int64_t k = 0; k < count; ++k) {
            out[k] = one(rows[k], x);
        }
    }

    // One row and several tokens.
    void tokens(int64_t row, const row_input * x, const int32_t * chosen, int64_t count, void * scratch,
                float * out) const {
        if (dot == nullptr) {
            kernels.dot_tokens(weight->type, (const char *) weight->data + row * weight->nb[1], weight->ne[0], x,
                               chosen, count, scratch, out);
            return;
        }
        for (int64_t k = 0; k < count; ++k) {
            out[k] = one(row, x[chosen != nullptr ? chosen[k] : k]);
        }
    }

    size_t scratch_bytes() const { return row_scratch_bytes(weight->ne[0]); }

    // Whether one prepared input serves both.
    bool same_input(const weight_rows& other) const {
        return weight->type == other.weight->type ||
               (dot != nullptr && other.dot != nullptr && weight_dot_type() == other.weight_dot_type());
    }

private:
    const row_kernels&  kernels = select_row_kernels();
    const ggml_tensor * weight;
    ggml_vec_dot_t      dot      = nullptr;
    ggml_from_float_t   quantize = nullptr;

    ggml_type weight_dot_type() const { return ggml_get_type_traits_cpu(weight->type)->vec_dot_type; }

    float one(int64_t row, const row_input& x) const {
        float result;
        dot((int) weight->ne[0], &result, 0, (const char *) weight->data + row * weight->nb[1], 0, x.q, 0, 1);
        return result;
    }
};

// y = W_down h for lists of active neurons, one list a token. Called by all threads; each takes some chunks of the
// embedding.
void accumulate_chunks(const down_view& view, const int32_t * neurons, const float * activations, size_t stride,
                       const int64_t * counts, float * out, float * sums, int64_t n_tokens) {
    const int64_t thread = omp_get_thread_num(), n_threads = omp_get_num_threads();
    const int64_t c0 = view.n_chunks * thread / n_threads, c1 = view.n_chunks * (thread + 1) / n_threads;
    const int64_t n_pad  = view.n_chunks * chunk_size;
    const bool    padded = n_pad != view.n_embd;
    const int64_t e0 = c0 * chunk_size, e1 = std::min(c1 * chunk_size, view.n_embd);
    if (c0 == c1) {
        return;
    }
    for (int64_t t = 0; t < n_tokens; ++t) {
        float * y = padded ? sums + t * n_pad : out + t * view.n_embd;
        std::fill(y + c0 * chunk_size, y + c1 * chunk_size, 0.0f);
        select_kernels().accumulate(view, neurons + t * stride, activations + t * stride, counts[t], y, c0, c1);
        if (padded) {
            std::copy(y + e0, y + e1, out + t * view.n_embd + e0);
        }
    }
}

template <typename T>
T * reserve(std::vector<T>& scratch, size_t n) {
    if (scratch.size() < n) {
        scratch.resize(n);
    }
    return scratch.data();
}

// Several tokens: rows of down are dequantized once, a tile at a time, and multiplied with the non-zero activations of
// every token; rows that no token activates are skipped. h: [n_tokens][n_ff], h_stride elements apart.
void multiply_tiles(ffn_context& context, const down_view& view, const float * h, size_t h_stride, float * out,
                    int64_t n_tokens) {
    constexpr int64_t block     = 16; // chunks: a tile of 32 neurons takes 64 KiB
    constexpr int64_t most_rows = 32;
    const int64_t     n_pad     = view.n_chunks * chunk_size;
    const int64_t     tile_rows = view.codec->is_float() ? most_rows : view.codec->group;
    const bool        padded    = n_pad != view.n_embd;
    float *           sums      = reserve(context.sums, padded ? n_tokens * n_pad : 0);
    float *           tiles     = reserve(context.tiles, context.n_threads * block * chunk_size * most_rows);
    float *           packed    = reserve(context.packed, context.n_threads * n_tokens * most_rows);
    float *           y         = padded ? sums : out;
    const size_t      y_stride  = padded ? n_pad : view.n_embd;
#pragma omp parallel num_threads(context.n_threads)
    {
        const cpu_kernels& kernels = select_kernels();
        const int64_t      thread = omp_get_thread_num(), n = omp_get_num_threads();
        const int64_t      first = view.n_chunks * thread / n, last = view.n_chunks * (thread + 1) / n;
        float *            tile = tiles + thread * block * chunk_size * most_rows;
        float *            own  = packed + thread * n_tokens * most_rows;
        for (int64_t c0 = first; c0 < last; c0 += block) {
            const int64_t c1    = std::min(c0 + block, last);
            const int64_t width = (c1 - c0) * chunk_size;
            for (int64_t t = 0; t < n_tokens; ++t) {
                float * row = y + t * y_stride + c0 * chunk_size;
                std::fill(row, row + width, 0.0f);
            }
            for (int64_t i = 0; i < view.n_ff; i += tile_rows) {
                const int64_t rows = std::min(tile_rows, view.n_ff - i);
                int64_t       kept = 0;
                for (int64_t k = 0; k < rows; ++k) {
                    bool any = false;
                    for (int64_t t = 0; t < n_tokens; ++t) {
                        const float value         = h[t * h_stride + i + k];
                        own[t * most_rows + kept] = value;
                        any |= value != 0.0f; // true for NaN
                    }
                    if (any) {
                        kernels.dequantize(view, i + k, 1, tile + kept * width, c0, c1);
                        ++kept;
                    }
                }
                kernels.multiply_tile(tile, kept, width, own, most_rows, y + c0 * chunk_size, y_stride, n_tokens);
            }
            for (int64_t t = 0; padded && t < n_tokens; ++t) {
                const int64_t e0 = c0 * chunk_size, e1 = std::min(c1 * chunk_size, view.n_embd);
                std::copy(y + t * y_stride + e0, y + t * y_stride + e1, out + t * view.n_embd + e0);
            }
        }
    }
}

uint8_t * aligned(std::vector<uint8_t>& scratch, size_t n) {
    return (uint8_t *) (((uintptr_t) reserve(scratch, n + 64) + 63) & ~(uintptr_t) 63);
}

void count_active(const ffn_nodes& ffn, uint64_t n_tokens, uint64_t n_active) {
    layer_counters& counters = ffn.down_weight->model->counters[ffn.down_weight->layer];
    counters.n_tokens.fetch_add(n_tokens, std::memory_order_relaxed);
    counters.n_active.fetch_add(n_active, std::memory_order_relaxed);
}

// NaN counts as active, so that it is not hidden.
bool is_active(float gate, float threshold) {
    return !(gate <= 0.0f) && !(gate < threshold);
}

// The sparse FFN for one token: exact gate for every neuron, up and down for active ones only.
ggml_status decode_token(ffn_context& context, const ffn_nodes& ffn) {
    const float *     x          = (const float *) ffn.gate->src[1]->data;
    const int64_t     n_ff       = ffn.down_weight->n_ff;
    const int         n_threads  = context.n_threads;
    sparse_model&     model      = *ffn.down_weight->model;
    const float       threshold  = model.threshold;
    const bool        all        = !model.sparse.load(std::memory_order_relaxed);
    const down_view&  view       = ffn.down_weight->view;
    const bool        transposed = ffn.down_weight->codec != nullptr;
    const weight_rows gate(ffn.gate), up(ffn.up);
    const bool        same_input  = gate.same_input(up);
    const size_t      input_bytes = gate.input_bytes() + (same_input ? 0 : up.input_bytes());
    uint8_t *         inputs      = aligned(context.inputs, n_threads * input_bytes);
    float *           gates       = reserve(context.values, n_ff);
    int32_t *         candidates  = reserve(context.candidates, n_ff);
    int32_t *         neurons     = reserve(context.neurons, n_ff);
    float *           activations = reserve(context.activations, n_ff);
    int64_t *         counts      = reserve(context.counts, 2 * n_threads + 1); // found, truly active, and the total
    float *           sums        = reserve(context.sums, transposed ? view.n_chunks * chunk_size : 0);
    float *           dense       = (float *) ffn.glu->data; // [n_ff], only for a down matrix that is not transposed

#pragma omp parallel num_threads(n_threads)
    {
        // every thread makes its own input: that is shorter than waiting for one that does
        const int64_t   thread = omp_get_thread_num(), n = omp_get_num_threads();
        uint8_t *       memory  = inputs + thread * input_bytes;
        const row_input gate_in = gate.prepare(x, memory);
        const row_input up_in   = same_input ? gate_in : up.prepare(x, memory + gate.input_bytes());

        const int64_t row0 = n_ff * thread / n, row1 = n_ff * (thread + 1) / n;
        int64_t       found = 0, active = 0;
        gate.range(row0, row1, gate_in, gates);
        for (int64_t row = row0; row < row1; ++row) {
            const bool is            = is_active(gates[row], threshold);
            candidates[row0 + found] = (int32_t) row;
            found += is || all;
            active += is;
            gates[row] = is ? gates[row] : 0.0f;
        }
        counts[thread]     = found;
        counts[n + thread] = active;
#pragma omp barrier

        // the active neurons of all threads, split evenly again, since they cluster among the hot rows
        int64_t total = 0, before = 0;
        for (int64_t i = 0; i < n; ++i) {
            total += counts[i];
        }
        const int64_t slot0 = total * thread / n, slot1 = total * (thread + 1) / n;
        for (int64_t i = 0; i < n; ++i) {
            const int64_t a = std::max(slot0, before), b = std::min(slot1, before + counts[i]);
            if (a < b) {
                std::copy_n(candidates + n_ff * i / n + (a - before), b - a, neurons + a);
            }
            before += counts[i];
        }
        up.list(neurons + slot0, slot1 - slot0, up_in, activations + slot0);
        for (int64_t slot = slot0; slot < slot1; ++slot) {
            activations[slot] *= ffn.factor * gates[neurons[slot]];
        }
        if (transposed) {
#pragma omp barrier
            accumulate_chunks(view, neurons, activations, n_ff, &total, (float *) ffn.down->data, sums, 1);
        } else {
            for (int64_t row = row0; row < row1; ++row) {
                dense[row] = 0.0f;
            }
#pragma omp barrier
            for (int64_t slot = slot0; slot < slot1; ++slot) {
                dense[neurons[slot]] = activations[slot];
            }
        }
    }
    uint64_t n_active = 0;
    for (int i = 0; i < n_threads; ++i) {
        n_active += (uint64_t) counts[n_threads + i];
    }
    count_active(ffn, 1, n_active);
    return transposed ? GGML_STATUS_SUCCESS : compute_with_ggml(context, &ffn.down, 1);
}

// The sparse FFN for a few tokens: each row of gate is read once for all of them, each row of up once for those that
// activate it, each row of down once for all.
ggml_status decode_tokens(ffn_context& context, const ffn_nodes& ffn) {
    const ggml_tensor * x          = ffn.gate->src[1];
    const int64_t       n_tokens   = x->ne[1];
    const int64_t       n_ff       = ffn.down_weight->n_ff;
    const int           n_threads  = context.n_threads;
    sparse_model&       model      = *ffn.down_weight->model;
    const float         threshold  = model.threshold;
    const bool          all        = !model.sparse.load(std::memory_order_relaxed);
    const bool          transposed = ffn.down_weight->codec != nullptr;
    const weight_rows   gate(ffn.gate), up(ffn.up);
    const bool          same_input    = gate.same_input(up);
    const size_t        scratch_bytes = (gate.scratch_bytes() + 63) & ~(size_t) 63;
    const size_t        input_bytes   = gate.input_bytes() + (same_input ? 0 : up.input_bytes());
    uint8_t *           inputs        = aligned(context.inputs, n_tokens * input_bytes);
    uint8_t *           scratch       = aligned(context.decoded, n_threads * scratch_bytes);
    float *             values =
        transposed ? reserve(context.values, n_tokens * n_ff) : (float *) ffn.glu->data; // [n_tokens][n_ff]
    row_input gate_in[max_decode_tokens], up_in[max_decode_tokens];
    uint64_t  n_active = 0;

    constexpr int64_t rows_at_once = 16; // dealt out in turn, since active neurons cluster among the hot rows
#pragma omp parallel num_threads(n_threads) reduction(+ : n_active)
    {
        const int64_t thread = omp_get_thread_num(), n = omp_get_num_threads();
        for (int64_t t = thread; t < n_tokens; t += n) {
            const float * from = (const float *) ((const char *) x->data + t * x->nb[1]);
            uint8_t *     to   = inputs + t * input_bytes;
            gate_in[t]         = gate.prepare(from, to);
            up_in[t]           = same_input ? gate_in[t] : up.prepare(from, to + gate.input_bytes());
        }
#pragma omp barrier
        uint8_t * own = scratch + thread * scratch_bytes;
        for (int64_t first = thread * rows_at_once; first < n_ff; first += n * rows_at_once) {
            for (int64_t row = first; row < std::min(first + rows_at_once, n_ff); ++row) {
                float   gates[max_decode_tokens], ups[max_decode_tokens];
                int32_t chosen[max_decode_tokens];
                int64_t count = 0;
                gate.tokens(row, gate_in, nullptr, n_tokens, own, gates);
                for (int64_t t = 0; t < n_tokens; ++t) {
                    const bool is          = is_active(gates[t], threshold);
                    values[t * n_ff + row] = 0.0f;
                    gates[t]               = is ? gates[t] : 0.0f;
                    chosen[count]          = (int32_t) t;
                    count += is || all;
                    n_active += is;
                }
                if (count > 0) {
                    up.tokens(row, up_in, chosen, count, own, ups);
                }
                for (int64_t k = 0; k < count; ++k) {
                    values[chosen[k] * n_ff + row] = ffn.factor * gates[chosen[k]] * ups[k];
                }
            }
        }
    }
    count_active(ffn, (uint64_t) n_tokens, n_active);
    if (!transposed) {
        return compute_with_ggml(context, &ffn.down, 1);
    }
    multiply_tiles(context, ffn.down_weight->view, values, n_ff, (float *) ffn.down->data, n_tokens);
    return GGML_STATUS_SUCCESS;
}

// ---- node by node

// relu(gate) * up with the threshold, for gate = K g and up = u / K. Elementwise, so the result may lie over an input.
ggml_status compute_glu(ffn_context& context, ggml_tensor * glu) {
    float               scale;
    const ggml_tensor * product = find_product(glu->src[0], weight_role::gate, scale);
    const ffn_weight *  weight  = product != nullptr ? weight_of(product->src[0]) : nullptr;
    if (weight == nullptr || (ggml_get_glu_op(glu) == GGML_GLU_OP_SWIGLU && scale < 256.0f)) {
        return compute_with_ggml(context, &glu, 1);
    }
    const float         threshold = weight->model->threshold * scale;
    const ggml_tensor * gate      = glu->src[0];
    const ggml_tensor * up        = glu->src[1];
    uint64_t            n_active  = 0;
#pragma omp parallel for num_threads(context.n_threads) reduction(+ : n_active)
    for (int64_t t = 0; t < glu->ne[1]; ++t) {
        const float * g   = (const float *) ((const char *) gate->data + t * gate->nb[1]);
        const float * u   = (const float *) ((const char *) up->data + t * up->nb[1]);
        float *       out = (float *) ((char *) glu->data + t * glu->nb[1]);
        for (int64_t i = 0; i < glu->ne[0]; ++i) {
            const bool active = !(g[i] <= 0.0f) && !(g[i] < threshold);
            out[i]            = active ? g[i] * u[i] : 0.0f;
            n_active += active;
        }
    }
    layer_counters& counters = weight->model->counters[weight->layer];
    counters.n_tokens.fetch_add((uint64_t) glu->ne[1], std::memory_order_relaxed);
    counters.n_active.fetch_add(n_active, std::memory_order_relaxed);
    return GGML_STATUS_SUCCESS;
}

// A product with a transposed down matrix; h may hold anything, zeros are skipped.
ggml_status compute_down(ffn_context& context, ggml_tensor * node, const ffn_weight& weight) {
    const ggml_tensor * h        = node->src[1];
    const int64_t       n_tokens = ggml_nrows(h), n_ff = weight.n_ff;
    const float *       from   = (const float *) h->data;
    const size_t        stride = h->nb[1] / sizeof(float);
    if (h->type != GGML_TYPE_F32 || h->nb[0] != sizeof(float) || (h->ne[2] * h->ne[3] > 1 && !ggml_is_contiguous(h)) ||
        !ggml_is_contiguous(node)) {
        fprintf(stderr, "prosparse: %s has an input that this backend does not read\n", node->name);
        return GGML_STATUS_FAILED;
    }
    if (n_tokens > max_decode_tokens) {
        multiply_tiles(context, weight.view, from, stride, (float *) node->data, n_tokens);
        return GGML_STATUS_SUCCESS;
    }
    int32_t * neurons     = reserve(context.neurons, n_tokens * n_ff);
    float *   activations = reserve(context.activations, n_tokens * n_ff);
    int64_t * counts      = reserve(context.counts, n_tokens);
    float *   sums        = reserve(context.sums, n_tokens * weight.view.n_chunks * chunk_size);
#pragma omp parallel num_threads(context.n_threads)
    {
#pragma omp for
        for (int64_t t = 0; t < n_tokens; ++t) {
            int64_t count = 0;
            for (int64_t i = 0; i < n_ff; ++i) {
                neurons[t * n_ff + count]     = (int32_t) i;
                activations[t * n_ff + count] = from[t * stride + i];
                count += from[t * stride + i] != 0.0f; // true for NaN
            }
            counts[t] = count;
        }
        accumulate_chunks(weight.view, neurons, activations, n_ff, counts, (float *) node->data, sums, n_tokens);
    }
    return GGML_STATUS_SUCCESS;
}

ggml_status compute_node(ffn_context& context, ggml_tensor * node) {
    const ffn_weight * weight = node->op == GGML_OP_MUL_MAT ? weight_of(node->src[0]) : nullptr;
    if (weight != nullptr && weight->codec != nullptr) {
        return compute_down(context, node, *weight);
    }
    if (is_split_glu(node)) {
        return compute_glu(context, node);
    }
    return compute_with_ggml(context, &node, 1);
}

bool is_computed(const ggml_tensor * node) {
    return (node->flags & GGML_TENSOR_FLAG_COMPUTE) != 0 && node->op != GGML_OP_NONE && ggml_nelements(node) > 0;
}

// The nodes before `down` in this split are exactly the FFN's own, and nobody else reads them.
bool owns_nodes(const ffn_nodes& ffn, const std::vector<ggml_tensor *>& pending) {
    const ggml_tensor * own[] = {ffn.gate, ffn.glu->src[0], ffn.up, ffn.glu->src[1], ffn.glu};
    for (const ggml_tensor * node : own) {
        if (std::find(pending.begin(), pending.end(), node) == pending.end() ||
            (node->flags & GGML_TENSOR_FLAG_OUTPUT) != 0) {
            return false;
        }
    }
    return true;
}

} // namespace

bool supports_op(const ggml_tensor * op) {
    float scale;
    switch (op->op) {
        case GGML_OP_NONE:
            return op->buffer != nullptr && is_prosparse_buffer_type(op->buffer->buft);
        case GGML_OP_MUL_MAT: // FFN weights, and LoRA's, which lie beside them
            return op->src[0]->buffer != nullptr && is_prosparse_buffer_type(op->src[0]->buffer->buft);
        case GGML_OP_MUL: {
            const ffn_weight * weight = weight_of(op->src[1]);
            return weight != nullptr && weight->role == weight_role::scale;
        }
        case GGML_OP_GLU:
            return is_split_glu(op) && find_product(op->src[0], weight_role::gate, scale) != nullptr;
        default:
            return false;
    }
}

ggml_status compute_graph(ffn_context& context, ggml_cgraph * graph) {
    std::vector<ggml_tensor *>& pending = context.pending;
    pending.clear();
    auto flush = [&](const ffn_nodes * done) {
        for (ggml_tensor * node : pending) {
            const bool fused = done != nullptr && (node == done->gate || node == done->up || node == done->glu ||
                                                   node == done->glu->src[0] || node == done->glu->src[1]);
            if (!fused) {
                const ggml_status status = compute_node(context, node);
                if (status != GGML_STATUS_SUCCESS) {
                    return status;
                }
            }
        }
        pending.clear();
        return GGML_STATUS_SUCCESS;
    };
    const int n_nodes = ggml_graph_n_nodes(graph);
    for (int i = 0; i < n_nodes; ++i) {
        ggml_tensor * node = ggml_graph_node(graph, i);
        if (!is_computed(node)) {
            continue;
        }
        if (!is_product_with(node, weight_role::down)) {
            pending.push_back(node);
            continue;
        }
        ffn_nodes   ffn;
        const bool  fused  = match_ffn(node, ffn) && node->ne[1] <= max_decode_tokens && owns_nodes(ffn, pending);
        ggml_status status = flush(fused ? &ffn : nullptr);
        if (status == GGML_STATUS_SUCCESS) {
            status = !fused             ? compute_node(context, node)
                     : node->ne[1] == 1 ? decode_token(context, ffn)
                                        : decode_tokens(context, ffn);
        }
        if (status != GGML_STATUS_SUCCESS) {
            return status;
        }
    }
    return flush(nullptr);
}

} // namespace prosparse
