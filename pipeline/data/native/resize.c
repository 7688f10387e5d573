#include "resize.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define HAS_AVX2 1
#include <immintrin.h>
#endif

/* Weights are fractions of ONE: what 16 bits with a sign hold, and what a processor multiplies and adds in pairs. */
#define BITS 14
#define ONE (1 << BITS)

/* The weights of one side: pixel i of the result is the sum of count[i] pixels from first[i] on. They are kept in pairs, an
   even number for each pixel, the missing ones 0. */
struct taps {
    int *first, *count;
    int16_t *weights; /* width for each pixel */
    int width;
};

typedef void horizontal_pass(const uint8_t *const rows[2], const struct taps *taps, int length, int mirrored,
                             uint8_t *const out[2]);
typedef void vertical_pass(const uint8_t *rows, size_t stride, const int16_t *weights, int count, size_t length, uint8_t *out);

/* ---- portable ---- */

static void one_row(const uint8_t *row, const struct taps *taps, int length, int mirrored, uint8_t *out) {
    for (int i = 0; i < length; i++) {
        const uint8_t *pixel = row + 3 * (size_t)taps->first[i];
        const int16_t *weights = taps->weights + (size_t)i * taps->width;
        int32_t red = ONE / 2, green = ONE / 2, blue = ONE / 2;
        for (int j = 0; j < taps->count[i]; j++, pixel += 3) {
            red += weights[j] * pixel[0];
            green += weights[j] * pixel[1];
            blue += weights[j] * pixel[2];
        }
        uint8_t *to = out + 3 * (size_t)(mirrored ? length - 1 - i : i);
        to[0] = (uint8_t)(red >> BITS);
        to[1] = (uint8_t)(green >> BITS);
        to[2] = (uint8_t)(blue >> BITS);
    }
}

static void horizontal_portable(const uint8_t *const rows[2], const struct taps *taps, int length, int mirrored,
                                uint8_t *const out[2]) {
    one_row(rows[0], taps, length, mirrored, out[0]);
    if (rows[1] != rows[0]) one_row(rows[1], taps, length, mirrored, out[1]);
}

static void vertical_portable(const uint8_t *rows, size_t stride, const int16_t *weights, int count, size_t length,
                              uint8_t *out) {
    enum { AT_ONCE = 64 };
    for (size_t x = 0; x < length; x += AT_ONCE) {
        int32_t sums[AT_ONCE];
        size_t number = length - x < AT_ONCE ? length - x : AT_ONCE;
        for (size_t k = 0; k < number; k++) sums[k] = ONE / 2;
        for (int j = 0; j < count; j++) {
            const uint8_t *row = rows + (size_t)j * stride + x;
            for (size_t k = 0; k < number; k++) sums[k] += weights[j] * row[k];
        }
        for (size_t k = 0; k < number; k++) out[x + k] = (uint8_t)(sums[k] >> BITS);
    }
}

/* ---- AVX2 ---- */

#ifdef HAS_AVX2

/* Two neighbouring pixels of each of two rows as 16-bit pairs: R0 R1 G0 G1 B0 B1. Reads 8 bytes where 6 are used. */
__attribute__((target("avx2"))) static inline __m256i pairs_of(const uint8_t *upper, const uint8_t *lower) {
    const __m256i pairs = _mm256_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1, 0, -1, 3, -1, 1, -1, 4, -1,
                                           2, -1, 5, -1, -1, -1, -1, -1);
    __m128i low = _mm_loadl_epi64((const __m128i *)upper), high = _mm_loadl_epi64((const __m128i *)lower);
    return _mm256_shuffle_epi8(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1), pairs);
}

/* One pixel of the result in each of two rows, 3 bytes in either half: the rows share their weights. */
__attribute__((target("avx2"))) static inline __m256i pixel_of(const uint8_t *upper, const uint8_t *lower, const struct taps *taps,
                                                               int i) {
    const int16_t *weights = taps->weights + (size_t)i * taps->width;
    const uint8_t *from[2] = {upper + 3 * (size_t)taps->first[i], lower + 3 * (size_t)taps->first[i]};
    __m256i sums = _mm256_set1_epi32(ONE / 2);
    for (int j = 0; j < taps->count[i]; j += 2) {
        int32_t pair;
        memcpy(&pair, weights + j, 4);
        __m256i pixels = pairs_of(from[0] + 3 * (size_t)j, from[1] + 3 * (size_t)j);
        sums = _mm256_add_epi32(sums, _mm256_madd_epi16(pixels, _mm256_set1_epi32(pair)));
    }
    sums = _mm256_packs_epi32(_mm256_srai_epi32(sums, BITS), _mm256_setzero_si256());
    return _mm256_packus_epi16(sums, sums);
}

__attribute__((target("avx2"))) static void horizontal_avx2(const uint8_t *const rows[2], const struct taps *taps, int length,
                                                            int mirrored, uint8_t *const out[2]) {
    int i = 0;
    for (; i + 2 <= length; i += 2) {
        __m256i one = pixel_of(rows[0], rows[1], taps, i), other = pixel_of(rows[0], rows[1], taps, i + 1);
        size_t at = 3 * (size_t)(mirrored ? length - 2 - i : i);
        for (int row = 0; row < 2; row++) {
            uint64_t first = (uint32_t)(row ? _mm256_extract_epi32(one, 4) : _mm256_extract_epi32(one, 0));
            uint64_t second = (uint32_t)(row ? _mm256_extract_epi32(other, 4) : _mm256_extract_epi32(other, 0));
            uint64_t both = mirrored ? second | first << 24 : first | second << 24;
            memcpy(out[row] + at, &both, 6);
        }
    }
    if (i == length) return;
    __m256i last = pixel_of(rows[0], rows[1], taps, i);
    uint32_t upper = (uint32_t)_mm256_extract_epi32(last, 0), lower = (uint32_t)_mm256_extract_epi32(last, 4);
    memcpy(out[0] + 3 * (size_t)(mirrored ? 0 : i), &upper, 3);
    memcpy(out[1] + 3 * (size_t)(mirrored ? 0 : i), &lower, 3);
}

__attribute__((target("avx2"))) static void vertical_avx2(const uint8_t *rows, size_t stride, const int16_t *weights, int count,
                                                          size_t length, uint8_t *out) {
    const __m256i zero = _mm256_setzero_si256();
    size_t x = 0;
    for (; x + 32 <= length; x += 32) {
        __m256i a = _mm256_set1_epi32(ONE / 2), b = a, c = a, d = a;
        for (int j = 0; j < count; j += 2) {
            __m256i upper = _mm256_loadu_si256((const __m256i *)(rows + (size_t)j * stride + x)), lower = zero;
            if (j + 1 < count) lower = _mm256_loadu_si256((const __m256i *)(rows + (size_t)(j + 1) * stride + x));
            int32_t pair;
            memcpy(&pair, weights + j, 4);
            __m256i both = _mm256_set1_epi32(pair);
            __m256i low = _mm256_unpacklo_epi8(upper, lower), high = _mm256_unpackhi_epi8(upper, lower);
            a = _mm256_add_epi32(a, _mm256_madd_epi16(_mm256_unpacklo_epi8(low, zero), both));
            b = _mm256_add_epi32(b, _mm256_madd_epi16(_mm256_unpackhi_epi8(low, zero), both));
            c = _mm256_add_epi32(c, _mm256_madd_epi16(_mm256_unpacklo_epi8(high, zero), both));
            d = _mm256_add_epi32(d, _mm256_madd_epi16(_mm256_unpackhi_epi8(high, zero), both));
        }
        __m256i low = _mm256_packs_epi32(_mm256_srai_epi32(a, BITS), _mm256_srai_epi32(b, BITS));
        __m256i high = _mm256_packs_epi32(_mm256_srai_epi32(c, BITS), _mm256_srai_epi32(d, BITS));
        _mm256_storeu_si256((__m256i *)(out + x), _mm256_packus_epi16(low, high));
    }
    vertical_portable(rows + x, stride, weights, count, length - x, out + x);
}

static atomic_int avx2_wanted = -1; /* until somebody asks */

int uses_avx2(void) {
    if (avx2_wanted < 0) avx2_wanted = __builtin_cpu_supports("avx2") != 0;
    return avx2_wanted;
}

void use_avx2(int wanted) { avx2_wanted = wanted && __builtin_cpu_supports("avx2"); }

#else

int uses_avx2(void) { return 0; }
void use_avx2(int wanted) { (void)wanted; }

#endif

/* ---- both ---- */

/* How many pixels one of the result is the mean of, at most. */
static int most_taps(double extent, int length) {
    double scale = extent / length;
    return 2 * (int)ceil(scale < 1 ? 1 : scale) + 1;
}

/* As Pillow and torch do: the middle of result pixel i lies at (i + 1/2) * extent / length, the filter reaches as far as the
   result's pixels lie apart, at least one pixel, and what lies outside of the box counts nothing. */
static void fill_taps(struct taps *taps, double start, double extent, int limit, int length) {
    double scale = extent / length, reach = scale < 1 ? 1 : scale;
    int low = (int)floor(start), high = (int)ceil(start + extent);
    if (low < 0) low = 0;
    if (high > limit) high = limit;
    for (int i = 0; i < length; i++) {
        double middle = start + (i + 0.5) * scale, shares[MAX_TAPS], total = 0;
        int first = (int)(middle - reach + 0.5), end = (int)(middle + reach + 0.5);
        if (first < low) first = low;
        if (first > high - 1) first = high - 1;
        if (end > high) end = high;
        if (end <= first) end = first + 1;
        if (end - first > MAX_TAPS) end = first + MAX_TAPS;
        for (int j = 0; j < end - first; j++) {
            double distance = fabs((first + j - middle + 0.5) / reach);
            shares[j] = distance < 1 ? 1 - distance : 0;
            total += shares[j];
        }
        if (total <= 0) {
            shares[0] = total = 1;
            end = first + 1;
        }
        taps->first[i] = first;
        taps->count[i] = end - first;
        int16_t *weights = taps->weights + (size_t)i * taps->width;
        memset(weights, 0, sizeof *weights * (size_t)taps->width);
        /* Rounding the running total rather than each share keeps their sum exact. */
        double running = 0;
        int given = 0;
        for (int j = 0; j < end - first; j++) {
            running += shares[j];
            int until = (int)lrint(running / total * ONE);
            weights[j] = (int16_t)(until - given);
            given = until;
        }
    }
}

static int reserve_taps(struct taps taps[2], const struct window *window, int height, int width, struct scratch *scratch) {
    int rows = most_taps(window->box_height, height) + 1, columns = most_taps(window->box_width, width) + 1;
    taps[0].width = rows + rows % 2;
    taps[1].width = columns + columns % 2;
    size_t whole = sizeof(int) * 2 * ((size_t)height + (size_t)width);
    size_t weights = sizeof(int16_t) * ((size_t)height * (size_t)taps[0].width + (size_t)width * (size_t)taps[1].width);
    uint8_t *memory = room(&scratch->weights, whole + weights);
    if (!memory) return 0;
    taps[0].first = (int *)memory;
    taps[0].count = taps[0].first + height;
    taps[1].first = taps[0].count + height;
    taps[1].count = taps[1].first + width;
    taps[0].weights = (int16_t *)(memory + whole);
    taps[1].weights = taps[0].weights + (size_t)height * (size_t)taps[0].width;
    return 1;
}

enum status resize(const struct window *window, int height, int width, int mirrored, int upside_down, struct scratch *scratch,
                   uint8_t *out) {
    if (most_taps(window->box_height, height) > MAX_TAPS || most_taps(window->box_width, width) > MAX_TAPS)
        return NOT_SUPPORTED;
    struct taps taps[2];
    if (!reserve_taps(taps, window, height, width, scratch)) return NO_MEMORY;
    struct taps *down = &taps[0], *across = &taps[1];
    fill_taps(down, window->top, window->box_height, window->height, height);
    fill_taps(across, window->left, window->box_width, window->width, width);
    int first_row = down->first[0], num_rows = down->first[height - 1] + down->count[height - 1] - first_row;
    int first_column = across->first[0];
    int num_columns = across->first[width - 1] + across->count[width - 1] - first_column;
    horizontal_pass *horizontal = horizontal_portable;
    vertical_pass *vertical = vertical_portable;
#ifdef HAS_AVX2
    if (uses_avx2()) {
        horizontal = horizontal_avx2;
        vertical = vertical_avx2;
    }
#endif
    size_t stride = 3 * (size_t)window->width, line = 3 * (size_t)width;
    const uint8_t *from = window->pixels + (size_t)first_row * stride + 3 * (size_t)first_column;
    for (int i = 0; i < height; i++) down->first[i] -= first_row;
    for (int i = 0; i < width; i++) across->first[i] -= first_column;
    /* The pass that leaves less goes first. */
    int vertical_first = num_rows > height;
    size_t between = 3 * (size_t)num_columns + SLACK;
    uint8_t *passed = room(&scratch->resized, (vertical_first ? 2 * between : line * (size_t)num_rows) + SLACK);
    if (!passed) return NO_MEMORY;
    if (!vertical_first)
        for (int row = 0; row < num_rows; row += 2) {
            int next = row + 1 < num_rows ? row + 1 : row; /* an odd number: the last row twice */
            const uint8_t *const rows[] = {from + (size_t)row * stride, from + (size_t)next * stride};
            uint8_t *const to[] = {passed + (size_t)row * line, passed + (size_t)next * line};
            horizontal(rows, across, width, mirrored, to);
        }
    for (int i = 0; i < height; i += 2) {
        int last = i + 1 < height;
        const uint8_t *rows[] = {passed, passed};
        uint8_t *to[2];
        for (int k = 0; k <= last; k++) {
            const int16_t *weights = down->weights + (size_t)(i + k) * (size_t)down->width;
            size_t first = (size_t)down->first[i + k];
            to[k] = out + line * (size_t)(upside_down ? height - 1 - i - k : i + k);
            if (vertical_first) {
                rows[k] = passed + (size_t)k * between;
                vertical(from + first * stride, stride, weights, down->count[i + k], between - SLACK, passed + (size_t)k * between);
            } else {
                vertical(passed + first * line, line, weights, down->count[i + k], line, to[k]);
            }
        }
        if (!last) to[1] = to[0];
        if (vertical_first) horizontal(rows, across, width, mirrored, to);
    }
    return DECODED;
}
