// The arithmetic of a decoder layer for CPUs. Every sum runs in one fixed order that follows from the element alone: over
// k = 0, 1, 2 … for products, over key positions for attention, by lane for norms. So a row comes out the same
// bits whatever rows, chunks, tiles or threads stand beside it. Written with GCC vector extensions, as wide as
// the machine's registers. Weights and KV may be bfloat16, arithmetic is always float.
#include "attention.h"
#include "products.h"

extern "C" {
long tandem_panel() { return PANEL; }

int tandem_linear(const float *x, const void *w, int half, const float *bias, const float *other, float *y, int mode, long m,
                   long k, long n, int threads) {
    Out out{y, bias, other, n, mode};
    Product of{x, nullptr, m, k, n};
    return half ? linear(of, (const uint16_t *)w, out, threads) : linear(of, (const float *)w, out, threads);
}

void tandem_rms_norm(const float *x, const float *w, float *y, long m, long n, float eps) {
    for (long i = 0; i < m; i++) norm_row(x + i * n, w, y + i * n, n, eps);
}

void tandem_place(float *heads, const float *turns, const int64_t *positions, const float *norm, void *kv, int half,
                  const int64_t *slots, long plane, long m, long query, long kv_heads, long dim, float eps, int threads) {
    Heads h{query, kv_heads, dim};
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && m > 16)
    for (long i = 0; i < m; i++) {
        float *at = heads + i * h.all() * dim;
        const float *turn = turns + positions[i] * dim;
        if (half) place(at, turn, norm, (uint16_t *)kv + slots[i], plane, h, eps);
        else place(at, turn, norm, (float *)kv + slots[i], plane, h, eps);
    }
}

// tiles: [count][4] of (first row, tokens, first position, offset of the sequence's blocks in tables)
int tandem_attend(const float *heads, float *out, const void *kv, int half, const int64_t *tiles, long count,
                  const int64_t *tables, long query, long kv_heads, long dim, long block_size, long block_stride, long window,
                  float scale, long longest, long tile_tokens, int threads) {
    Heads h{query, kv_heads, dim};
    const long stride = (longest + 2 * LANES) / LANES * LANES, rows = tile_tokens * (query / kv_heads);
    const long plane = block_size * dim;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed) if (threads > 1)
    {
        float *scratch = (float *)malloc((rows * dim + dim * LANES + rows * stride) * 4);
        failed = scratch == nullptr;
#pragma omp for schedule(dynamic, 1) collapse(2)
        for (long i = 0; i < count; i++) for (long head = 0; head < kv_heads; head++) {
            if (!scratch) continue;
            const int64_t *t = tiles + i * 4;
            Tile tile{t[0], t[1], t[2], tables + t[3]};
            if (half) attend(heads, out, (const uint16_t *)kv + head * plane, (const uint16_t *)kv + (kv_heads + head) * plane, tile,
                             head, h, block_size, block_stride, window, scale, scratch, stride);
            else attend(heads, out, (const float *)kv + head * plane, (const float *)kv + (kv_heads + head) * plane, tile, head, h,
                        block_size, block_stride, window, scale, scratch, stride);
        }
        free(scratch);
    }
    return failed;
}
}
