// Rows of activations times panels of weights, with bias, activation or a second operand applied on the way out.
#pragma once
#include "vectors.h"

namespace {
enum Mode { PLAIN, SILU, ADD, MUL };
struct Out { float *y; const float *bias; const float *other; long stride; int mode; };

inline void finish(const Out &out, long row, long col, Vec v, long cols) {
    float t[LANES] = {}, o[LANES] = {};
    if (out.bias) { memcpy(o, out.bias + col, cols * 4); v += load(o); }
    if (out.mode == SILU) v = v / (1.0f + exponential(-v));
    if (out.mode >= ADD) {
        memcpy(o, out.other + row * out.stride + col, cols * 4);
        v = out.mode == ADD ? v + load(o) : v * load(o);
    }
    float *y = out.y + row * out.stride + col;
    if (cols == LANES) store(y, v); else { store(t, v); memcpy(y, t, cols * 4); }
}

// How a block finds its rows of x: as they stand in the matrix, or packed [k][R] so that a stretch of k is
// read in one run. STREAMS: the panel comes from memory, not from the first cache.
struct Plain { enum { STREAMS = 1 }; const float *x; long ld; template <int R> float at(long k, int r) const { return x[r * ld + k]; } };
struct Packed { enum { STREAMS = 0 }; const float *x; template <int R> float at(long k, int r) const { return x[k * R + r]; } };

// R rows of x times one panel over k in [0, count): accumulators start from `sums` (or zero) and end in the output, or in
// `sums` again while more of k is to come. A float kept in memory between two stretches of k changes no bit.
template <int R, class X, class W>
void block(X x, const W *w, long count, float *sums, bool first, const Out *out, long row, long col, long cols) {
    Vec acc[R][VECTORS];
    for (int r = 0; r < R; r++) for (long v = 0; v < VECTORS; v++) acc[r][v] = first ? Vec{} : load(sums + r * PANEL + v * LANES);
    for (long k = 0; k < count; k++, w += PANEL) {
        Vec b[VECTORS];
        for (long v = 0; v < VECTORS; v++) b[v] = load(w + v * LANES);
        if (X::STREAMS) for (long i = 0; i < PANEL; i += 64 / (long)sizeof(W)) __builtin_prefetch(w + i + AHEAD / (long)sizeof(W));
        for (int r = 0; r < R; r++) {
            float a = x.template at<R>(k, r);
            for (long v = 0; v < VECTORS; v++) acc[r][v] += a * b[v];
        }
    }
    for (int r = 0; r < R; r++) for (long v = 0; v < VECTORS; v++) {
        if (!out) store(sums + r * PANEL + v * LANES, acc[r][v]);
        else if (v * LANES < cols) finish(*out, row + r, col + v * LANES, acc[r][v], cols - v * LANES < LANES ? cols - v * LANES : LANES);
    }
}

template <class X, class W>
void block_of(long r, X x, const W *w, long count, float *sums, bool first, const Out *out, long row, long col, long cols) {
    switch (r) {
    case 1: block<1>(x, w, count, sums, first, out, row, col, cols); break;
    case 2: block<2>(x, w, count, sums, first, out, row, col, cols); break;
    case 3: block<3>(x, w, count, sums, first, out, row, col, cols); break;
    case 4: block<4>(x, w, count, sums, first, out, row, col, cols); break;
    case 5: block<5>(x, w, count, sums, first, out, row, col, cols); break;
    default: block<6>(x, w, count, sums, first, out, row, col, cols); break;
    }
}
inline long rows_of_block(long left) { return left >= 2 * ROWS ? ROWS : left > ROWS ? (left + 1) / 2 : left; }

inline const float *stretch(const float *w, long, float *) { return w; }
inline const float *stretch(const uint16_t *w, long count, float *wide) {
    for (long i = 0; i < count * PANEL; i += LANES) store(wide + i, load(w + i));
    return wide;
}

struct Product { const float *x, *packed; long m, k, n; };

// R rows times G panels at once: a row or two against one panel are so few sums that each waits for the one before it.
template <int R, int G, class W> void abreast(const Product &of, const W *w, const Out &out, long col) {
    Vec acc[R][G][VECTORS] = {};
    for (long k = 0; k < of.k; k++) for (int g = 0; g < G; g++) {
        const W *at = w + (g * of.k + k) * PANEL;
        for (long i = 0; i < PANEL; i += 64 / (long)sizeof(W)) __builtin_prefetch(at + i + AHEAD / (long)sizeof(W));
        for (long v = 0; v < VECTORS; v++) {
            Vec b = load(at + v * LANES);
            for (int r = 0; r < R; r++) acc[r][g][v] += of.x[r * of.k + k] * b;
        }
    }
    for (int r = 0; r < R; r++) for (int g = 0; g < G; g++) for (long v = 0; v < VECTORS; v++) {
        const long at = col + g * PANEL + v * LANES, left = of.n - at;
        if (left > 0) finish(out, r, at, acc[r][g][v], left < LANES ? left : LANES);
    }
}

template <class W> void few_rows(const Product &of, const W *w, const Out &out, long panel, long panels) {
    for (long col = panel * PANEL; panels--; w += of.k * PANEL, col += PANEL) for (long i = 0; i < of.m;) {
        long r = rows_of_block(of.m - i);
        block_of(r, Plain{of.x + i * of.k, of.k}, w, of.k, nullptr, true, &out, i, col, of.n - col < PANEL ? of.n - col : PANEL);
        i += r;
    }
}

// k is taken in stretches whose part of the panel stays in the second cache while all rows pass over it.
template <class W> void many_rows(const Product &of, const W *w, float *scratch, const Out &out, long col, long cols) {
    float *wide = scratch + of.m * PANEL;
    for (long from = 0; from < of.k; from += STRETCH) {
        long count = of.k - from < STRETCH ? of.k - from : STRETCH;
        const float *part = stretch(w + from * PANEL, count, wide);
        const Out *last = from + count == of.k ? &out : nullptr;
        for (long i = 0; i < of.m;) {
            long r = rows_of_block(of.m - i);
            block_of(r, Packed{of.packed + i * of.k + from * r}, part, count, scratch + i * PANEL, from == 0, last, i, col, cols);
            i += r;
        }
    }
}

// Rows in blocks of r, each block as [k][r]. The threads of a team share the full blocks; one takes the uneven rest.
inline void pack_block(const float *x, float *to, long r, long k) {
    for (long at = 0; at < k; at++) for (long j = 0; j < r; j++) to[at * r + j] = x[j * k + at];
}
void pack_rows(const float *x, float *packed, long m, long k) {
    const long full = m / ROWS - 1;
#pragma omp for schedule(static) nowait
    for (long i = 0; i < full; i++) pack_block(x + i * ROWS * k, packed + i * ROWS * k, ROWS, k);
#pragma omp single
    for (long i = full * ROWS; i < m;) {
        long r = rows_of_block(m - i);
        pack_block(x + i * k, packed + i * k, r, k);
        i += r;
    }
}

template <class W> int linear(Product of, const W *w, const Out &out, int threads) {
    const long panels = (of.n + PANEL - 1) / PANEL;
    const bool many = of.m > FEW_ROWS;
    const long wide = of.m == 1 ? ABREAST : of.m == 2 ? ABREAST / 2 : 1, group = panels >= 2 * wide * threads ? wide : 1;
    float *packed = many ? (float *)malloc(of.m * of.k * 4) : nullptr;
    int failed = many && !packed;
    of.packed = packed;
#pragma omp parallel num_threads(threads) reduction(| : failed) if (threads > 1)
    {
        float *scratch = many ? (float *)malloc((of.m + STRETCH) * PANEL * 4) : nullptr;
        failed |= many && !scratch;
        if (packed) pack_rows(of.x, packed, of.m, of.k);  // ends in a barrier
#pragma omp for schedule(dynamic)
        for (long p = 0; p < panels; p += group) {
            const W *part = w + p * PANEL * of.k;
            const long col = p * PANEL, cols = of.n - col < PANEL ? of.n - col : PANEL;
            if (group > 1 && of.m == 1 && p + group <= panels) abreast<1, ABREAST>(of, part, out, col);
            else if (group > 1 && p + group <= panels) abreast<2, ABREAST / 2>(of, part, out, col);
            else if (!many) few_rows(of, part, out, p, group < panels - p ? group : panels - p);
            else if (packed && scratch) many_rows(of, part, scratch, out, col, cols);
        }
        free(scratch);
    }
    free(packed);
    return failed;
}
}  // namespace
