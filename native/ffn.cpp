#include "ffn.h"

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

// Dot products of one weight matrix with rows of x, the way ggml-cpu does them.
struct row_products {
    const char *      rows;
    size_t            row_bytes;
    int64_t           n;
    ggml_vec_dot_t    dot;
    ggml_from_float_t quantize; // nullptr: x is used as it is
    size_t            x_bytes;  // of one quantized row of x, rounded up to cache lines
    const uint8_t *   x;        // where quantized rows start

    explicit row_products(const ggml_tensor * product) {
        const ggml_tensor * w      = product->src[0];
        const auto *        traits = ggml_get_type_traits_cpu(w->type);
        const auto *        x_type = ggml_get_type_traits_cpu(traits->vec_dot_type);
        rows                       = (const char *) w->data;
        row_bytes                  = w->nb[1];
        n                          = w->ne[0];
        dot                        = traits->vec_dot;
        quantize                   = traits->vec_dot_type == GGML_TYPE_F32 ? nullptr : x_type->from_float;
        x_bytes                    = (ggml_row_size(traits->vec_dot_type, n) + 63) & ~(size_t) 63;
        x                          = nullptr;
    }

    void prepare(const float * from, void * to) const {
        if (quantize != nullptr) {
            quantize(from, to, n);
        } else {
            memcpy(to, from, n * sizeof(float));
        }
    }

    float operator()(int64_t row, int64_t token) const {
        float result;
        dot((int) n, &result, 0, rows + row * row_bytes, 0, x + token * x_bytes, 0, 1);
        return result;
    }

    void prefetch(int64_t row) const {
        const char * p = rows + row * row_bytes;
        for (size_t i = 0; i < row_bytes; i += 64) {
            __builtin_prefetch(p + i);
        }
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

// The sparse FFN for a few tokens: exact gate for every neuron, up and down for active ones only.
ggml_status decode_ffn(ffn_context& context, const ffn_nodes& ffn) {
    const ggml_tensor * x          = ffn.gate->src[1];
    const int64_t       n_tokens   = x->ne[1];
    const int64_t       n_ff       = ffn.down_weight->n_ff;
    const int           n_threads  = context.n_threads;
    sparse_model&       model      = *ffn.down_weight->model;
    const float         threshold  = model.threshold;
    const bool          all        = !model.sparse.load(std::memory_order_relaxed);
    const down_view&    view       = ffn.down_weight->view;
    const bool          transposed = ffn.down_weight->codec != nullptr;

    row_products gate(ffn.gate), up(ffn.up);
    const bool   same_x      = gate.quantize == up.quantize;
    uint8_t *    quantized   = reserve(context.quantized, n_tokens * (gate.x_bytes + up.x_bytes) + 64);
    quantized                = (uint8_t *) (((uintptr_t) quantized + 63) & ~(uintptr_t) 63);
    gate.x                   = quantized;
    up.x                     = same_x ? quantized : quantized + n_tokens * gate.x_bytes;
    float *    values        = reserve(context.values, n_tokens * n_ff);
    uint32_t * masks         = reserve(context.masks, n_ff);
    int32_t *  candidates    = reserve(context.candidates, n_ff);
    int32_t *  neurons       = reserve(context.neurons, n_tokens * n_ff);
    float *    activations   = reserve(context.activations, n_tokens * n_ff);
    int64_t *  thread_counts = reserve(context.counts, n_threads + n_tokens);
    int64_t *  token_counts  = thread_counts + n_threads;
    float *    sums          = reserve(context.sums, n_tokens * (transposed ? view.n_chunks * chunk_size : 0));
    float *    dense = (float *) ffn.glu->data; // [n_tokens][n_ff], only for a down matrix that is not transposed

#pragma omp parallel num_threads(n_threads)
    {
        const int64_t thread = omp_get_thread_num(), n = omp_get_num_threads();

        for (int64_t t = thread; t < n_tokens; t += n) {
            const float * from = (const float *) ((const char *) x->data + t * x->nb[1]);
            gate.prepare(from, (void *) (gate.x + t * gate.x_bytes));
            if (!same_x) {
                up.prepare(from, (void *) (up.x + t * up.x_bytes));
            }
        }
#pragma omp barrier

        // gate: which neurons are active. NaN counts as active, so that it is not hidden.
        const int64_t row0 = n_ff * thread / n, row1 = n_ff * (thread + 1) / n;
        int64_t       found = 0;
        for (int64_t row = row0; row < row1; ++row) {
            uint32_t mask = 0;
            for (int64_t t = 0; t < n_tokens; ++t) {
                const float g          = gate(row, t);
                const bool  active     = !(g <= 0.0f) && !(g < threshold);
                values[t * n_ff + row] = active ? g : 0.0f;
                mask |= (uint32_t) active << t;
            }
            masks[row]               = mask;
            candidates[row0 + found] = (int32_t) row;
            found += mask != 0 || all;
        }
        thread_counts[thread] = found;
#pragma omp barrier

        // up: the active neurons of all threads, split evenly again, since they cluster among the hot rows
        int64_t total = 0;
        for (int64_t i = 0; i < n; ++i) {
            total += thread_counts[i];
        }
        const int64_t slot0 = total * thread / n, slot1 = total * (thread + 1) / n;
        int64_t       part = 0, part_start = 0;
        auto          neuron_at = [&](int64_t slot) {
            while (slot >= part_start + thread_counts[part]) {
                part_start += thread_counts[part++];
            }
            return candidates[n_ff * part / n + slot - part_start];
        };
        int32_t next = slot0 < slot1 ? neuron_at(slot0) : 0;
        for (int64_t slot = slot0; slot < slot1; ++slot) {
            const int32_t row = next;
            if (slot + 1 < slot1) {
                next = neuron_at(slot + 1);
                up.prefetch(next);
            }
            for (int64_t t = 0; t < n_tokens; ++t) {
                float& value = values[t * n_ff + row];
                if (all || masks[row] >> t & 1) {
                    value *= ffn.factor * up(row, t);
                }
            }
            if (n_tokens == 1) {
                neurons[slot]     = row;
                activations[slot] = values[row];
            }
        }
        if (n_tokens == 1) {
#pragma omp single
            token_counts[0] = total;
        } else {
#pragma omp barrier
            for (int64_t t = thread; t < n_tokens; t += n) {
                int64_t count = 0;
                for (int64_t row = 0; row < n_ff; ++row) {
                    neurons[t * n_ff + count]     = (int32_t) row;
                    activations[t * n_ff + count] = values[t * n_ff + row];
                    count += all || (masks[row] >> t & 1);
                }
                token_counts[t] = count;
            }
#pragma omp barrier
        }

        if (transposed) {
            accumulate_chunks(view, neurons, activations, n_ff, token_counts, (float *) ffn.down->data, sums, n_tokens);
        } else {
#pragma omp for
            for (int64_t i = 0; i < n_tokens * n_ff; ++i) {
                dense[i] = values[i];
            }
        }
    }

    uint64_t n_active = 0;
    for (int64_t row = 0; row < n_ff; ++row) {
        n_active += (uint64_t) __builtin_popcount(masks[row]);
    }
    layer_counters& counters = model.counters[ffn.down_weight->layer];
    counters.n_tokens.fetch_add((uint64_t) n_tokens, std::memory_order_relaxed);
    counters.n_active.fetch_add(n_active, std::memory_order_relaxed);
    return transposed ? GGML_STATUS_SUCCESS : compute_with_ggml(context, &ffn.down, 1);
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

// Many tokens: a tile of neurons is dequantized once and multiplied with the non-zero activations of every token.
void multiply_tiles(ffn_context& context, const down_view& view, const float * h, size_t h_stride, float * out,
                    int64_t n_tokens) {
    constexpr int64_t block     = 16; // chunks: a tile of 32 neurons takes 64 KiB
    const int64_t     n_pad     = view.n_chunks * chunk_size;
    const int64_t     tile_rows = view.codec->is_float() ? 32 : view.codec->group;
    const bool        padded    = n_pad != view.n_embd;
    float *           sums      = reserve(context.sums, padded ? n_tokens * n_pad : 0);
    float *           tiles     = reserve(context.tiles, context.n_threads * block * chunk_size * 32);
    float *           y         = padded ? sums : out;
    const size_t      y_stride  = padded ? n_pad : view.n_embd;
#pragma omp parallel num_threads(context.n_threads)
    {
        const cpu_kernels& kernels = select_kernels();
        const int64_t      thread = omp_get_thread_num(), n = omp_get_num_threads();
        const int64_t      first = view.n_chunks * thread / n, last = view.n_chunks * (thread + 1) / n;
        float *            tile = tiles + thread * block * chunk_size * 32;
        for (int64_t c0 = first; c0 < last; c0 += block) {
            const int64_t c1    = std::min(c0 + block, last);
            const int64_t width = (c1 - c0) * chunk_size;
            for (int64_t t = 0; t < n_tokens; ++t) {
                float * row = y + t * y_stride + c0 * chunk_size;
                std::fill(row, row + width, 0.0f);
            }
            for (int64_t i = 0; i < view.n_ff; i += tile_rows) {
                const int64_t rows = std::min(tile_rows, view.n_ff - i);
                kernels.dequantize(view, i, rows, tile, c0, c1);
                kernels.multiply_tile(tile, rows, width, h + i, h_stride, y + c0 * chunk_size, y_stride, n_tokens);
            }
            for (int64_t t = 0; padded && t < n_tokens; ++t) {
                const int64_t e0 = c0 * chunk_size, e1 = std::min(c1 * chunk_size, view.n_embd);
                std::copy(y + t * y_stride + e0, y + t * y_stride + e1, out + t * view.n_embd + e0);
            }
        }
    }
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
            status = fused ? decode_ffn(context, ffn) : compute_node(context, node);
        }
        if (status != GGML_STATUS_SUCCESS) {
            return status;
        }
    }
    return flush(nullptr);
}

} // namespace prosparse
