/* Copies and digests of many pieces in one call each, which Python makes without its interpreter lock. Built by
 * native.py. Every function looks at all offsets before it touches a byte and returns 0 where one leaves its memory. */

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define WIDTH 64
#define STREAM(to, from) _mm512_stream_si512((void *)(to), _mm512_loadu_si512((const void *)(from)))
#elif defined(__AVX__)
#include <immintrin.h>
#define WIDTH 32
#define STREAM(to, from) _mm256_stream_si256((__m256i *)(to), _mm256_loadu_si256((const __m256i *)(from)))
#elif defined(__SSE2__)
#include <immintrin.h>
#define WIDTH 16
#define STREAM(to, from) _mm_stream_si128((__m128i *)(to), _mm_loadu_si128((const __m128i *)(from)))
#endif

#define PAGE 4096
#define LINE 64
#define AT_ONCE 4      /* pages that are copied side by side: the processor fetches from each ahead of time */
#define AHEAD 512      /* bytes of a page that are asked for before they are needed */

static inline int is_within(int64_t offset, int64_t size, int64_t total) {
    return offset >= 0 && size >= 0 && size <= total && offset <= total - size;
}

#ifdef WIDTH
static inline void stream_line(uint8_t *to, const uint8_t *from) {
    for (int at = 0; at < LINE; at += WIDTH) STREAM(to + at, from + at);
}

/* Past the caches: what is copied is more than they hold, and the destination need not be read first. */
static void stream(uint8_t *to, const uint8_t *from, int64_t size) {
    int64_t head = (int64_t)(-(uintptr_t)to & (LINE - 1));
    head = head < size ? head : size;
    memcpy(to, from, (size_t)head);
    to += head, from += head, size -= head;
    for (; size >= AT_ONCE * PAGE; to += AT_ONCE * PAGE, from += AT_ONCE * PAGE, size -= AT_ONCE * PAGE)
        for (int line = 0; line < PAGE; line += LINE) {
            for (int page = 0; page < AT_ONCE; page++) _mm_prefetch((const char *)from + page * PAGE + line + AHEAD, _MM_HINT_T0);
            for (int page = 0; page < AT_ONCE; page++) stream_line(to + page * PAGE + line, from + page * PAGE + line);
        }
    for (; size >= LINE; to += LINE, from += LINE, size -= LINE) stream_line(to, from);
    memcpy(to, from, (size_t)size);
}
#endif

/* Piece i: sizes[i] bytes from source + from[i] to destination + to[i]. `is_big`: together more than caches hold. */
int copy_pieces(uint8_t *destination, int64_t destination_size, const uint8_t *source, int64_t source_size,
                const int64_t *from, const int64_t *to, const int64_t *sizes, int64_t count, int is_big) {
    for (int64_t i = 0; i < count; i++)
        if (!is_within(from[i], sizes[i], source_size) || !is_within(to[i], sizes[i], destination_size)) return 0;
    for (int64_t i = 0; i < count; i++) {
        uint8_t *into = destination + to[i];
        const uint8_t *out_of = source + from[i];
#ifdef WIDTH
        if (is_big && sizes[i] >= PAGE) {
            if (i + 1 < count && sizes[i + 1] >= PAGE)
                for (int line = 0; line < PAGE; line += LINE) _mm_prefetch((const char *)source + from[i + 1] + line, _MM_HINT_T1);
            stream(into, out_of, sizes[i]);
            continue;
        }
#endif
        memcpy(into, out_of, (size_t)sizes[i]);
    }
#ifdef WIDTH
    if (is_big) _mm_sfence();
#endif
    return 1;
}

typedef uint64_t words8 __attribute__((vector_size(64)));

static inline uint64_t weigh(const uint64_t *words, const uint64_t *factors, int64_t count) {
    words8 one = {0}, other = {0}, left, right;
    int64_t at = 0;
    for (; at + 16 <= count; at += 16) {
        memcpy(&left, words + at, sizeof left);
        memcpy(&right, factors + at, sizeof right);
        one += left * right;
        memcpy(&left, words + at + 8, sizeof left);
        memcpy(&right, factors + at + 8, sizeof right);
        other += left * right;
    }
    one += other;
    uint64_t total = 0;
    for (int lane = 0; lane < 8; lane++) total += one[lane];
    for (; at < count; at++) total += words[at] * factors[at];
    return total;
}

/* memory [planes][slots][slot_words]: of each of planes [first, first + num_planes) and of each slot, words
 * [column, column + num_words) times `factors`, summed up: digests [num_planes][count]. */
int digest_slots(const uint64_t *memory, int64_t num_slots, int64_t slot_words, int64_t first, int64_t num_planes,
                 const int64_t *slots, int64_t count, int64_t column, const uint64_t *factors, int64_t num_words,
                 uint64_t *digests) {
    for (int64_t i = 0; i < count; i++)
        if (slots[i] < 0 || slots[i] >= num_slots) return 0;
    for (int64_t plane = 0; plane < num_planes; plane++) {
        const uint64_t *words = memory + (first + plane) * num_slots * slot_words + column;
        for (int64_t i = 0; i < count; i++)
            digests[plane * count + i] = weigh(words + slots[i] * slot_words, factors, num_words);
    }
    return 1;
}
