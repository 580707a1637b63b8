// Norms, rotation, and attention over keys and values that stand in blocks.
#pragma once
#include "vectors.h"

namespace {
void norm_row(const float *x, const float *w, float *y, long n, float eps) {
    Vec acc{};
    long i = 0;
    for (; i + LANES <= n; i += LANES) { Vec v = load(x + i); acc += v * v; }
    float tail[LANES] = {};
    memcpy(tail, x + i, (n - i) * 4);
    acc += load(tail) * load(tail);
    float scale = 1.0f / sqrtf(sum(acc) / n + eps);
    for (long j = 0; j < n; j++) y[j] = x[j] * scale * w[j];
}

struct Heads { long query, kv, dim, all() const { return query + 2 * kv; } };

// Rotates (and first norms) the query and key heads in place and stores the token's keys and values in its slot.
template <class T> void place(float *heads, const float *turn, const float *norm, T *slot, long plane, Heads h, float eps) {
    for (long head = 0; head < h.query + h.kv; head++) {
        float *x = heads + head * h.dim;
        if (norm) norm_row(x, norm + head * h.dim, x, h.dim, eps);
        for (long i = 0; i < h.dim; i += 2) {
            float a = x[i], b = x[i + 1], c = turn[i], s = turn[i + 1];
            x[i] = a * c - b * s; x[i + 1] = a * s + b * c;
        }
    }
    if (slot) for (long p = 0; p < 2 * h.kv; p++) for (long i = 0; i < h.dim; i++)
        narrow(slot + p * plane + i, heads[(h.query + p) * h.dim + i]);
}

struct Keys { const int64_t *table; long block_size, block_stride, dim; };  // of one (layer, kv head)

template <class T> inline const T *row_of(const T *base, const Keys &keys, long position) {
    const uint32_t at = (uint32_t)position, size = (uint32_t)keys.block_size;  // 64-bit division is several times slower
    return base + keys.table[at / size] * keys.block_stride + (long)(at % size) * keys.dim;
}

// Blocks lie apart, so the processor's own prefetcher starts anew with each: ask for the keys a few steps ahead.
template <class T> inline void prefetch(const T *base, const Keys &keys, long position, long to) {
    if (position >= to) return;
    const char *at = (const char *)row_of(base, keys, position);
    for (long byte = 0; byte < LANES * keys.dim * (long)sizeof(T); byte += 64) __builtin_prefetch(at + byte);
}

// scores[r][j] = q_r . k_(from + j) for LANES keys, summed over the dimension in order.
template <int R> void dot_block(const float *q, long q_stride, const float *kt, long dim, float *scores, long stride) {
    Vec acc[R];
    for (int r = 0; r < R; r++) acc[r] = Vec{};
    for (long d = 0; d < dim; d++) { Vec b = load(kt + d * LANES); for (int r = 0; r < R; r++) acc[r] += q[r * q_stride + d] * b; }
    for (int r = 0; r < R; r++) store(scores + r * stride, acc[r]);
}

// LANES rows become as many columns: halves are exchanged between rows LANES / 2 … 2 and 1 apart.
template <int S> inline __attribute__((always_inline)) void exchange(Vec *v) {
    IVec low, high;
    for (int l = 0; l < LANES; l++) { low[l] = l & S ? LANES + l - S : l; high[l] = l & S ? LANES + l : l + S; }
    for (int i = 0; i < LANES; i++) if (!(i & S)) {
        Vec a = v[i], b = v[i + S];
        v[i] = __builtin_shuffle(a, b, low); v[i + S] = __builtin_shuffle(a, b, high);
    }
}
template <int S> inline __attribute__((always_inline)) void transpose(Vec *v) {
    exchange<S>(v);
    if constexpr (S > 1) transpose<S / 2>(v);
}

// kt[d][i] = component d of key from + i, zero beyond `to`.
template <class T> void turn_keys(const T *base, const Keys &keys, long from, long to, float *kt) {
    const T *row[LANES];
    for (long i = 0; i < LANES;) {
        const T *at = from + i < to ? row_of(base, keys, from + i) : nullptr;
        const long left = keys.block_size - (uint32_t)(from + i) % (uint32_t)keys.block_size;
        for (long end = i + left < LANES ? i + left : LANES; i < end; i++, at += keys.dim) row[i] = from + i < to ? at : nullptr;
    }
    long d = 0;
    for (; d + LANES <= keys.dim; d += LANES) {
        Vec v[LANES];
        for (int i = 0; i < LANES; i++) v[i] = row[i] ? load(row[i] + d) : Vec{};
        transpose<LANES / 2>(v);
        for (int i = 0; i < LANES; i++) store(kt + (d + i) * LANES, v[i]);
    }
    for (; d < keys.dim; d++) for (long i = 0; i < LANES; i++) kt[d * LANES + i] = row[i] ? widen(row[i][d]) : 0.0f;
}

// out[r] = sum over keys in order of p[r][key] * v_key, for D vectors of the dimension from d on.
template <int R, int D, class T> void mix(const float *p, long stride, const T *base, const Keys &keys, long from, long to,
                                          long d, float *out, long out_stride) {
    Vec acc[R][D];
    for (int r = 0; r < R; r++) for (int c = 0; c < D; c++) acc[r][c] = Vec{};
    for (long j = from; j < to;) {
        const T *v = row_of(base, keys, j) + d;
        long end = j + keys.block_size - (uint32_t)j % (uint32_t)keys.block_size;
        if (d == 0) prefetch(base, keys, j + KEYS_AHEAD, to);
        for (end = end < to ? end : to; j < end; j++, v += keys.dim) {
            Vec b[D];
            for (int c = 0; c < D; c++) b[c] = load(v + c * LANES);
            for (int r = 0; r < R; r++) { float a = p[r * stride + j - from]; for (int c = 0; c < D; c++) acc[r][c] += a * b[c]; }
        }
    }
    for (int r = 0; r < R; r++) for (int c = 0; c < D; c++) store(out + r * out_stride + d + c * LANES, acc[r][c]);
}

template <int R, class T> void mix_rows(const float *p, long stride, const T *base, const Keys &keys, long from, long to,
                                        float *out, long out_stride) {
    long d = 0;
    if constexpr (R * 4 <= ACCUMULATORS) for (; d + 4 * LANES <= keys.dim; d += 4 * LANES) mix<R, 4>(p, stride, base, keys, from, to, d, out, out_stride);
    if constexpr (R * 2 <= ACCUMULATORS) for (; d + 2 * LANES <= keys.dim; d += 2 * LANES) mix<R, 2>(p, stride, base, keys, from, to, d, out, out_stride);
    for (; d + LANES <= keys.dim; d += LANES) mix<R, 1>(p, stride, base, keys, from, to, d, out, out_stride);
    for (; d < keys.dim; d++) for (int r = 0; r < R; r++) {
        float acc = 0.0f;
        for (long j = from; j < to; j++) acc += p[r * stride + j - from] * widen(row_of(base, keys, j)[d]);
        out[r * out_stride + d] = acc;
    }
}

// One tile: `rows` query rows (token-major, group heads each) of one sequence against keys [from, to) of one kv head.
struct Tile { long first, count, start; const int64_t *table; };
constexpr long MIX_ROWS = 8, MAX_DIM = 512;

template <class T>
void attend(const float *heads, float *out, const T *k, const T *v, const Tile &tile, long kv_head, Heads h, long block_size,
            long block_stride, long window, float scale, float *scratch, long stride) {
    const long group = h.query / h.kv, rows = tile.count * group;
    const long to = tile.start + tile.count;
    const long low = window ? tile.start - window + 1 : 0, from = low > 0 ? low / LANES * LANES : 0;
    const Keys keys{tile.table, block_size, block_stride, h.dim};
    float *q = scratch, *kt = q + rows * h.dim, *p = kt + h.dim * LANES;
    for (long t = 0; t < tile.count; t++) for (long g = 0; g < group; g++) for (long d = 0; d < h.dim; d++)
        q[(t * group + g) * h.dim + d] = heads[((tile.first + t) * h.all() + kv_head * group + g) * h.dim + d] * scale;
    for (long j = from; j < to; j += LANES) {
        prefetch(k, keys, j + KEYS_AHEAD, to);
        turn_keys(k, keys, j, to, kt);
        for (long r = 0; r < rows;) {
            const float *qr = q + r * h.dim; float *s = p + r * stride + j - from;
            if (rows - r >= 8) { dot_block<8>(qr, h.dim, kt, h.dim, s, stride); r += 8; }
            else if (rows - r >= 4) { dot_block<4>(qr, h.dim, kt, h.dim, s, stride); r += 4; }
            else if (rows - r >= 2) { dot_block<2>(qr, h.dim, kt, h.dim, s, stride); r += 2; }
            else { dot_block<1>(qr, h.dim, kt, h.dim, s, stride); r += 1; }
        }
    }
    for (long r = 0; r < rows; r++) {
        const long position = tile.start + r / group, last = position + 1;
        const long first = window && position - window + 1 > from ? position - window + 1 : from;
        float *s = p + r * stride;
        for (long j = from; j < first; j++) s[j - from] = -INFINITY;
        for (long j = last; j < (to - from + LANES - 1) / LANES * LANES + from; j++) s[j - from] = -INFINITY;
        Vec top = all(-INFINITY), total{};
        const long width = (to - from + LANES - 1) / LANES * LANES;
        for (long j = 0; j < width; j += LANES) { Vec x = load(s + j); top = x > top ? x : top; }
        float most = -INFINITY;
        for (int i = 0; i < LANES; i++) most = top[i] > most ? top[i] : most;
        for (long j = 0; j < width; j += LANES) {
            Vec x = load(s + j);
            Vec e = x == -INFINITY ? Vec{} : exponential(x - most);
            store(s + j, e); total += e;
        }
        float inverse = 1.0f / sum(total);
        for (long j = 0; j < width; j += LANES) store(s + j, load(s + j) * inverse);
    }
    for (long r = 0; r < rows;) {
        float mixed[MIX_ROWS * MAX_DIM];
        const float *pr = p + r * stride;
        long n = rows - r >= 8 ? 8 : rows - r >= 4 ? 4 : rows - r >= 2 ? 2 : 1;
        if (n == 8) mix_rows<8>(pr, stride, v, keys, from, to, mixed, h.dim);
        else if (n == 4) mix_rows<4>(pr, stride, v, keys, from, to, mixed, h.dim);
        else if (n == 2) mix_rows<2>(pr, stride, v, keys, from, to, mixed, h.dim);
        else mix_rows<1>(pr, stride, v, keys, from, to, mixed, h.dim);
        for (long i = 0; i < n; i++) {
            const long t = (r + i) / group, g = (r + i) % group;
            memcpy(out + ((tile.first + t) * h.query + kv_head * group + g) * h.dim, mixed + i * h.dim, h.dim * 4);
        }
        r += n;
    }
}
}  // namespace
