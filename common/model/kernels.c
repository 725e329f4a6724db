/* The few kernels of a token step that torch lacks or does in many calls. Built by native.py, once per element
 * type (-DBFLOAT16); what is not a multiple of 16 elements stays with torch. All sums are kept in float. */

#include <stdint.h>
#include <string.h>

#define LANES 16
#define TILE 64       /* positions per round of the softmax */
#define MAX_GROUP 4   /* query heads that share one pass over a KV head */
#define MAX_WIDTH 16  /* vectors per head: 256 elements */
#define SMALL 65536   /* elements below which a second thread costs more than it brings */

typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));

#if BFLOAT16
typedef uint16_t real;
typedef uint16_t raw __attribute__((vector_size(32)));
typedef uint32_t uvec __attribute__((vector_size(64)));

static inline vec load(const real *from) {
    raw bits;
    memcpy(&bits, from, sizeof bits);
    return (vec)(__builtin_convertvector(bits, uvec) << 16);
}

static inline void store(real *to, vec value) {
    uvec bits = (uvec)value;
    bits += 0x7fff + ((bits >> 16) & 1); /* nearest, ties to even */
    raw rounded = __builtin_convertvector(bits >> 16, raw);
    memcpy(to, &rounded, sizeof rounded);
}
#else
typedef float real;

static inline vec load(const real *from) {
    vec value;
    memcpy(&value, from, sizeof value);
    return value;
}

static inline void store(real *to, vec value) { memcpy(to, &value, sizeof value); }
#endif

static inline float sum(vec value) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += value[i];
    return total;
}

static inline float largest(vec value) {
    float best = value[0];
    for (int i = 1; i < LANES; i++) best = value[i] > best ? value[i] : best;
    return best;
}

/* e^x for x <= 0, relative error below 2e-7; underflows to 0 */
static inline vec exponential(vec x) {
    const vec floor_x = (vec){0} - 87.0f;
    ivec is_tiny = x < floor_x;
    x = (vec)(((ivec)x & ~is_tiny) | ((ivec)floor_x & is_tiny));
    ivec n = __builtin_convertvector(x * 1.44269504f - 0.5f, ivec);
    vec whole = __builtin_convertvector(n, vec);
    vec rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    vec y = (vec){0} + 1.9875691500e-4f;
    y = y * rest + 1.3981999507e-3f;
    y = y * rest + 8.3334519073e-3f;
    y = y * rest + 4.1665795894e-2f;
    y = y * rest + 1.6666665459e-1f;
    y = y * rest + 5.0000001201e-1f;
    y = y * rest * rest + rest + 1.0f;
    vec power = (vec)((n + 127) << 23);
    return (vec)((ivec)(y * power) & ~is_tiny);
}

/* total = hidden + added (neither, where `added` is null), then out = total / rms(total) * weight; all [rows, size] */
void add_norm(const real *hidden, const real *added, real *total, const real *weight, real *out, int64_t rows,
              int64_t size, float epsilon, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * size > SMALL)
    for (int64_t row = 0; row < rows; row++) {
        const real *x = hidden + row * size;
        vec squares = {0};
        if (added) {
            for (int64_t i = row * size; i < (row + 1) * size; i += LANES)
                store(total + i, load(hidden + i) + load(added + i));
            x = total + row * size;
        }
        for (int64_t i = 0; i < size; i += LANES) squares += load(x + i) * load(x + i);
        float scale = 1.0f / __builtin_sqrtf(sum(squares) / size + epsilon);
        for (int64_t i = 0; i < size; i += LANES) store(out + row * size + i, load(x + i) * scale * load(weight + i));
    }
}

/* gate = silu(gate) * up */
void gated_silu(real *gate, const real *up, int64_t size, int threads) {
#pragma omp parallel for num_threads(threads) if (size > SMALL)
    for (int64_t i = 0; i < size; i += LANES) {
        vec x = load(gate + i);
        ivec is_negative = x < 0;
        vec minus = (vec)((ivec)x | (int32_t)0x80000000); /* -|x| */
        vec e = exponential(minus);
        vec top = (vec)(((ivec)e & is_negative) | ((ivec)((vec){0} + 1.0f) & ~is_negative));
        store(gate + i, x * top / (1.0f + e) * load(up + i));
    }
}

static inline void rotate(const real *from, real *to, const real *cosine, const real *sine, const real *norm,
                          float epsilon, int64_t dim) {
    float scale = 1;
    if (norm) {
        vec squares = {0};
        for (int64_t i = 0; i < dim; i += LANES) squares += load(from + i) * load(from + i);
        scale = 1.0f / __builtin_sqrtf(sum(squares) / dim + epsilon);
    }
    for (int64_t i = 0; i < dim / 2; i += LANES) {
        int64_t j = i + dim / 2;
        vec low = load(from + i), high = load(from + j);
        if (norm) {
            low *= scale * load(norm + i);
            high *= scale * load(norm + j);
        }
        store(to + i, low * load(cosine + i) - high * load(sine + i));
        store(to + j, high * load(cosine + j) + low * load(sine + j));
    }
}

/* fused [rows, heads + 2 kv_heads, dim] holds query, key and value of each row. Rotates queries in place and keys into
 * the pool's `keys`, and copies values into `values`, at slots[row]; `query_norm` and `key_norm` [dim] may be null. */
void rotate_and_store(real *fused, const real *cosine, const real *sine, const real *query_norm, const real *key_norm,
                      float epsilon, real *keys, real *values, const int64_t *slots, int64_t rows, int64_t heads,
                      int64_t kv_heads, int64_t dim, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * heads * dim > SMALL)
    for (int64_t row = 0; row < rows; row++) {
        real *head = fused + row * (heads + 2 * kv_heads) * dim;
        const real *c = cosine + row * dim, *s = sine + row * dim;
        real *key = keys + slots[row] * kv_heads * dim;
        for (int64_t i = 0; i < heads; i++, head += dim) rotate(head, head, c, s, query_norm, epsilon, dim);
        for (int64_t i = 0; i < kv_heads; i++, head += dim) rotate(head, key + i * dim, c, s, key_norm, epsilon, dim);
        memcpy(values + slots[row] * kv_heads * dim, head, kv_heads * dim * sizeof(real));
    }
}

#define PICK(s, i) (((i) & (s)) ? 16 + (i) : (i))
#define CROSS(s, i) (((i) & (s)) ? 16 + ((i) ^ (s)) : ((i) ^ (s)))
#define EACH(f, s) \
    f(s, 0), f(s, 1), f(s, 2), f(s, 3), f(s, 4), f(s, 5), f(s, 6), f(s, 7), f(s, 8), f(s, 9), f(s, 10), f(s, 11), \
        f(s, 12), f(s, 13), f(s, 14), f(s, 15)
#if defined(__clang__)
#define SHUFFLE(a, b, f, s) __builtin_shufflevector(a, b, EACH(f, s))
#else
#define SHUFFLE(a, b, f, s) __builtin_shuffle(a, b, (ivec){EACH(f, s)})
#endif
#define FOLD(a, b, s) (SHUFFLE(a, b, PICK, s) + SHUFFLE(a, b, CROSS, s))

/* lane i of the result is the sum of rows[i] */
static inline vec sums(const vec *rows) {
    vec a[8], b[4];
    for (int i = 0; i < 8; i++) a[i] = FOLD(rows[2 * i], rows[2 * i + 1], 1);
    for (int i = 0; i < 4; i++) b[i] = FOLD(a[2 * i], a[2 * i + 1], 2);
    vec c = FOLD(b[0], b[1], 4), d = FOLD(b[2], b[3], 4);
    return FOLD(c, d, 8);
}

/* One round: `group` query heads against `count` positions of one KV head, whose rows are rows[i] + offset. */
static inline __attribute__((always_inline)) void attend_tile(
    const int group, const int width, const vec *query, const real *const *keys, const real *const *values, int count,
    int64_t offset, const float *slopes, float distance, float *peak, float *total, vec *output) {
    float scores[MAX_GROUP][TILE];
    for (int first = 0; first < count; first += LANES) {
        vec products[MAX_GROUP][LANES];
        for (int i = 0; i < LANES; i++) {
            const real *key = keys[first + i] + offset;
            vec part = load(key);
            for (int g = 0; g < group; g++) products[g][i] = query[g * width] * part;
            for (int w = 1; w < width; w++) {
                part = load(key + w * LANES);
                for (int g = 0; g < group; g++) products[g][i] += query[g * width + w] * part;
            }
        }
        for (int g = 0; g < group; g++) {
            vec score = sums(products[g]);
            for (int i = 0; i < LANES; i++) {
                if (slopes) score[i] += slopes[g] * (distance + first + i);
                if (first + i >= count) score[i] = -1e30f;
            }
            memcpy(scores[g] + first, &score, sizeof score);
        }
    }
    for (int g = 0; g < group; g++) {
        vec best, part, all = {0};
        memcpy(&best, scores[g], sizeof best);
        for (int i = LANES; i < count; i += LANES) {
            memcpy(&part, scores[g] + i, sizeof part);
            ivec is_more = part > best;
            best = (vec)(((ivec)part & is_more) | ((ivec)best & ~is_more));
        }
        float next = largest(best);
        next = next > peak[g] ? next : peak[g];
        float shrink = exponential((vec){0} + (peak[g] - next))[0];
        peak[g] = next;
        for (int i = 0; i < count; i += LANES) {
            memcpy(&part, scores[g] + i, sizeof part);
            part = exponential(part - next);
            all += part;
            memcpy(scores[g] + i, &part, sizeof part);
        }
        total[g] = total[g] * shrink + sum(all);
        for (int w = 0; w < width; w++) output[g * width + w] *= shrink;
    }
    vec kept[MAX_GROUP * MAX_WIDTH];
    for (int i = 0; i < group * width; i++) kept[i] = output[i];
    for (int i = 0; i < count; i++) {
        const real *value = values[i] + offset;
        for (int w = 0; w < width; w++) {
            vec part = load(value + w * LANES);
            for (int g = 0; g < group; g++) kept[g * width + w] += scores[g][i] * part;
        }
    }
    for (int i = 0; i < group * width; i++) output[i] = kept[i];
}

#define CASE(g, w) \
    case (g) * 32 + (w): \
        attend_tile(g, w, query, keys, values, count, offset, slopes, distance, peak, total, output); \
        break;
#define CASES(w) CASE(1, w) CASE(2, w) CASE(3, w) CASE(4, w)

static void attend_group(int group, int width, const vec *query, const real *const *keys, const real *const *values,
                         int count, int64_t offset, const float *slopes, float distance, float *peak, float *total,
                         vec *output) {
    switch (group * 32 + width) {
        CASES(2)
        CASES(4)
        CASES(5)
        CASES(6)
        CASES(8)
        default:
            attend_tile(group, width, query, keys, values, count, offset, slopes, distance, peak, total, output);
    }
}

/* Heads [first, end) of the KV heads of one token, over positions [start, length) of its block table. */
static void attend_heads(const real *query, real *out, const real *keys, const real *values, const int32_t *blocks,
                         int64_t block_size, int64_t start, int64_t length, int64_t first, int64_t end, int64_t heads,
                         int64_t kv_heads, int64_t dim, float scale, const float *slopes) {
    int width = dim / LANES, group = heads / kv_heads;
    float peak[heads], total[heads];
    vec output[heads * width], scaled[heads * width];
    for (int64_t i = first * group; i < end * group; i++) {
        peak[i] = -1e30f;
        total[i] = 0;
        for (int w = 0; w < width; w++) {
            scaled[i * width + w] = load(query + i * dim + w * LANES) * scale;
            output[i * width + w] = (vec){0};
        }
    }
    for (int64_t position = start; position < length; position += TILE) {
        const real *key_rows[TILE], *value_rows[TILE];
        int count = length - position < TILE ? length - position : TILE;
        for (int i = 0; i < TILE; i++) {
            int64_t at = i < count ? position + i : position; /* what is too many reads something harmless */
            int64_t slot = blocks[at / block_size] * block_size + at % block_size;
            key_rows[i] = keys + slot * kv_heads * dim;
            value_rows[i] = values + slot * kv_heads * dim;
        }
        for (int64_t h = first; h < end; h++)
            for (int done = 0; done < group; done += MAX_GROUP) {
                int64_t head = h * group + done;
                attend_group(group - done < MAX_GROUP ? group - done : MAX_GROUP, width, scaled + head * width, key_rows,
                             value_rows, count, h * dim, slopes ? slopes + head : 0, position - (length - 1), peak + head,
                             total + head, output + head * width);
            }
    }
    for (int64_t i = first * group; i < end * group; i++)
        for (int w = 0; w < width; w++) store(out + i * dim + w * LANES, output[i * width + w] / total[i]);
}

/* Row rows[i] of query [.., heads, dim] attends to positions [starts[i], lengths[i]) of the block table tables[i] on in
 * `blocks`; the result goes to the same row of out [.., heads, dim]. */
void attend_tokens(const real *query, int64_t query_stride, real *out, const real *keys, const real *values,
                   const int64_t *rows, const int32_t *tables, const int32_t *starts, const int32_t *lengths,
                   const int32_t *blocks, int64_t block_size, int64_t num_tokens, int64_t heads, int64_t kv_heads,
                   int64_t dim, float scale, const float *slopes, int threads) {
    int64_t splits = num_tokens >= 4 * threads ? 1 : kv_heads, share = kv_heads / splits;
#pragma omp parallel for num_threads(threads) schedule(dynamic) collapse(2)
    for (int64_t i = 0; i < num_tokens; i++)
        for (int64_t split = 0; split < splits; split++)
            attend_heads(query + rows[i] * query_stride, out + rows[i] * heads * dim, keys, values, blocks + tables[i],
                         block_size, starts[i], lengths[i], split * share, (split + 1) * share, heads, kv_heads, dim,
                         scale, slopes);
}
