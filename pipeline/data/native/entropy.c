#include "entropy.h"

#include <string.h>

/* What the next bits are, in one number. Where they hold two coefficients, both: each with how far it is from the one before, and
   the length of their bits. Where they hold one, the second is the same again, no further. Where they do not hold all of it:
   PARTIAL, with the symbol as the value and the length of its code, 0 where that is longer than LOOKAHEAD. */
#define LENGTH(entry) ((int)((entry) & 63))
#define FIRST_LENGTH(entry) ((int)((entry) >> 6 & 63))
#define FIRST_ADVANCE(entry) ((int)((entry) >> 12 & 127))
#define SECOND_ADVANCE(entry) ((int)((entry) >> 20 & 127))
#define PARTIAL (UINT64_C(1) << 31)
#define FIRST(entry) ((int16_t)((entry) >> 32))
#define SECOND(entry) ((int16_t)((entry) >> 48))
#define END_OF_BLOCK 64
#define NO_CODE (UINT64_C(127) << 12)

enum { MARKER_RST0 = 0xD0, MARKER_EOI = 0xD9 };

static const uint8_t natural_order[64] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6,  7,  14, 21, 28,
    35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
};

/* Of the `size` bits `extra`; those of a number below zero begin with a 0. No branch, for nobody could foresee it. */
static inline int value_of(int size, uint32_t extra) {
    int is_positive = (int)(extra << 1 >> size);
    return (int)extra + (1 - is_positive) * (1 - (1 << size));
}

static uint64_t entry_of(int symbol, int length, uint32_t extra) {
    int run = symbol >> 4, size = symbol & 15;
    int value = value_of(size, extra);
    uint64_t advance = size ? (uint64_t)run + 1 : run == 15 ? 16 : END_OF_BLOCK, bits = (uint64_t)(length + size);
    return (uint64_t)(uint16_t)value * (UINT64_C(1) << 32 | UINT64_C(1) << 48) | advance << 12 | bits << 6 | bits;
}

static uint64_t pair_of(uint64_t first, uint64_t second) {
    uint64_t length = (uint64_t)(FIRST_LENGTH(first) + FIRST_LENGTH(second));
    return (uint64_t)(uint16_t)FIRST(second) << 48 | (first & UINT64_C(0xFFFF00000000)) | (uint64_t)FIRST_ADVANCE(second) << 20 |
           (uint64_t)FIRST_ADVANCE(first) << 12 | (uint64_t)FIRST_LENGTH(first) << 6 | length;
}

/* `is_whole`: with the coefficients, two where they fit; else all are PARTIAL. */
static void make_table(struct huffman *table, const JHUFF_TBL *source, int is_whole) {
    int is_same = table->is_made && !memcmp(table->counts + 1, source->bits + 1, 16) &&
                  !memcmp(table->symbols, source->huffval, sizeof table->symbols);
    if (is_same) return;
    memcpy(table->counts, source->bits, sizeof table->counts);
    memcpy(table->symbols, source->huffval, sizeof table->symbols);
    table->is_made = 1;
    enum { NUM = 1 << LOOKAHEAD };
    for (int i = 0; i < NUM; i++) table->quick[i] = PARTIAL;
    int code = 0, place = 0;
    for (int length = 1; length <= 16; length++, code *= 2) {
        table->offset[length] = place - code;
        for (int i = 0; i < table->counts[length]; i++, code++) {
            int symbol = table->symbols[place++], size = symbol & 15, rest = LOOKAHEAD - length;
            uint64_t partial = (uint64_t)symbol << 32 | PARTIAL | (uint64_t)length;
            for (int more = 0; rest >= 0 && more < 1 << rest; more++) {
                int fits = is_whole && size <= rest;
                table->quick[(code << rest) + more] = fits ? entry_of(symbol, length, (uint32_t)more >> (rest - size)) : partial;
            }
        }
        table->limit[length] = code << (16 - length);
    }
    for (int i = 0; is_whole && i < NUM; i++) { /* whatever is a pair already keeps what is first */
        uint64_t first = table->quick[i], second = table->quick[i << FIRST_LENGTH(first) & (NUM - 1)];
        int is_pair = !((first | second) & PARTIAL) && FIRST_ADVANCE(first) != END_OF_BLOCK;
        if (is_pair && FIRST_LENGTH(first) + FIRST_LENGTH(second) <= LOOKAHEAD) table->quick[i] = pair_of(first, second);
    }
}

/* ---- bits ---- */

static inline void refill(struct bits *bits) {
    const uint8_t *next = bits->next;
    uint64_t loaded = (uint64_t)next[0] << 56 | (uint64_t)next[1] << 48 | (uint64_t)next[2] << 40 | (uint64_t)next[3] << 32 |
                      (uint64_t)next[4] << 24 | (uint64_t)next[5] << 16 | (uint64_t)next[6] << 8 | (uint64_t)next[7];
    bits->held |= loaded >> bits->count;
    bits->next += (63 - bits->count) >> 3;
    bits->count |= 56;
}

/* The rest of a PARTIAL entry, from at least 31 bits. */
static uint64_t finish(const struct huffman *table, uint64_t held, uint64_t entry) {
    int length = LENGTH(entry), symbol = FIRST(entry);
    if (!length) {
        int32_t code = (int32_t)(held >> 48);
        for (length = LOOKAHEAD + 1; length <= 16 && code >= table->limit[length];) length++;
        if (length > 16) return NO_CODE;
        symbol = table->symbols[((code >> (16 - length)) + table->offset[length]) & 255];
    }
    int size = symbol & 15;
    return entry_of(symbol, length, size ? (uint32_t)(held << length >> (64 - size)) : 0);
}

static inline uint64_t next_entry(struct bits *bits, const struct huffman *table) {
    if (bits->count < LOOKAHEAD) refill(bits);
    uint64_t entry = table->quick[bits->held >> (64 - LOOKAHEAD)];
    if (entry & PARTIAL) {
        refill(bits);
        entry = finish(table, bits->held, entry);
    }
    return entry;
}

static inline void pass(struct bits *bits, int length) {
    bits->held <<= length;
    bits->count -= length;
}

/* The first coefficient of a block, less that of the block before. Its bits and those of its code are often more than LOOKAHEAD, and
   as often not: only the code is looked up. Returns whether there was one. */
static inline int read_difference(struct bits *bits, const struct huffman *table, int32_t *difference) {
    refill(bits);
    uint64_t entry = table->quick[bits->held >> (64 - LOOKAHEAD)];
    if (!LENGTH(entry)) {
        entry = finish(table, bits->held, entry);
        pass(bits, LENGTH(entry));
        *difference = FIRST(entry);
        return entry != NO_CODE;
    }
    int length = LENGTH(entry), size = FIRST(entry) & 15;
    *difference = value_of(size, (uint32_t)(bits->held << length >> 1 >> (63 - size)));
    pass(bits, length + size);
    return 1;
}

/* All but the first coefficient of a block, which are put there or not; returns whether they were in order. */
static inline int frequencies(struct bits *at, const struct huffman *table, int is_wanted, JCOEF *block) {
    struct bits bits = *at;
    int k = 1, advance;
    do {
        uint64_t entry = next_entry(&bits, table);
        advance = FIRST_ADVANCE(entry);
        k += advance;
        if (k >= 64) { /* what comes second is another block's */
            pass(&bits, FIRST_LENGTH(entry));
            if (is_wanted && k == 64) block[63] = FIRST(entry);
            break;
        }
        pass(&bits, LENGTH(entry));
        if (is_wanted) block[natural_order[k - 1]] = FIRST(entry);
        advance = SECOND_ADVANCE(entry);
        k += advance;
        if (k > 64) break;
        if (is_wanted) block[natural_order[k - 1]] = SECOND(entry);
    } while (k < 64);
    *at = bits;
    return k == 64 || advance == END_OF_BLOCK;
}

/* Functions of their own: inlined into all that surrounds a block they are a tenth slower. */
#if defined(__GNUC__)
#define ALONE __attribute__((noinline))
#else
#define ALONE
#endif

ALONE static int read_frequencies(struct bits *bits, const struct huffman *table, JCOEF *block) {
    return frequencies(bits, table, 1, block);
}

ALONE static int pass_frequencies(struct bits *bits, const struct huffman *table) { return frequencies(bits, table, 0, NULL); }

/* ---- intervals ---- */

/* Copies what lies before the next marker without the zeros that follow each 0xFF. Returns where the marker begins. */
static const uint8_t *unpack(struct scan *scan) {
    const uint8_t *from = scan->data, *end = scan->file_end;
    uint8_t *to = scan->unpacked;
    for (;;) {
        const uint8_t *stop = from < end ? memchr(from, 0xFF, (size_t)(end - from)) : NULL;
        size_t length = (size_t)((stop ? stop : end) - from);
        memcpy(to, from, length);
        to += length;
        from += length;
        if (!stop || end - stop < 2 || stop[1]) break;
        *to++ = 0xFF;
        from = stop + 2;
    }
    memset(to, 0, OVERRUN);
    scan->bits = (struct bits){.next = scan->unpacked, .end = to};
    return from;
}

static const uint8_t *next_marker(const uint8_t *from, const uint8_t *end) {
    while (from < end && (from = memchr(from, 0xFF, (size_t)(end - from)))) {
        if (end - from < 2) return end;
        if (from[1]) return from;
        from += 2;
    }
    return end;
}

/* Whether the interval that begins here has a wanted MCU; it may go on in the rows below. */
static int is_wanted(const struct scan *scan, int across) {
    const struct mcus *wanted = &scan->wanted;
    int first = scan->column;
    for (int row = scan->row, end = scan->column + scan->left; end > 0; row++, first = 0, end -= across) {
        int is_beside = first >= wanted->end_column || (end < across ? end : across) <= wanted->first_column;
        if (row >= wanted->first_row && row < wanted->end_row && !is_beside) return 1;
    }
    return 0;
}

/* Bits that are left of the interval; fewer than none where more were read. */
static int64_t bits_left(const struct bits *bits) { return 8 * (int64_t)(bits->end - bits->next) + bits->count; }

static int begin_interval(struct scan *scan, const struct jpeg_decompress_struct *info) {
    int interval = (int)info->restart_interval, across = (int)info->MCUs_per_row;
    if (scan->num_intervals) {
        if (!interval || (!scan->is_passed && bits_left(&scan->bits) >= 8)) return 0;
        int expected = MARKER_RST0 + (scan->num_intervals - 1) % 8;
        if (scan->file_end - scan->data < 2 || scan->data[0] != 0xFF || scan->data[1] != expected) return 0;
        scan->data += 2;
    }
    scan->num_intervals++;
    scan->left = interval ? interval : across * (int)info->MCU_rows_in_scan;
    memset(scan->last_dc, 0, sizeof scan->last_dc);
    scan->is_passed = !is_wanted(scan, across);
    scan->data = scan->is_passed ? next_marker(scan->data, scan->file_end) : unpack(scan);
    return 1;
}

void begin_scan(struct scan *scan, const struct jpeg_decompress_struct *info, struct tables *tables, const struct mcus *wanted,
                const uint8_t *data, size_t size, uint8_t *unpacked) {
    memset(scan, 0, sizeof *scan);
    scan->tables = tables;
    scan->wanted = *wanted;
    scan->data = data;
    scan->file_end = data + size;
    scan->unpacked = unpacked;
    for (int i = 0; i < info->comps_in_scan; i++) {
        const jpeg_component_info *component = info->cur_comp_info[i];
        make_table(&tables->dc[component->dc_tbl_no], info->dc_huff_tbl_ptrs[component->dc_tbl_no], 0);
        make_table(&tables->ac[component->ac_tbl_no], info->ac_huff_tbl_ptrs[component->ac_tbl_no], 1);
    }
}

int read_mcu(struct scan *scan, const struct jpeg_decompress_struct *info, JBLOCKROW *blocks) {
    if (!scan->left && !begin_interval(scan, info)) return 0;
    int is_used = blocks && scan->column >= scan->wanted.first_column && scan->column < scan->wanted.end_column;
    if (scan->is_passed && is_used) return 0;
    struct bits bits = scan->bits;
    for (int i = 0; !scan->is_passed && i < info->blocks_in_MCU; i++) {
        int place = info->MCU_membership[i];
        const jpeg_component_info *component = info->cur_comp_info[place];
        int32_t difference;
        if (!read_difference(&bits, &scan->tables->dc[component->dc_tbl_no], &difference)) return 0;
        int32_t dc = scan->last_dc[place] += difference;
        if (dc != (JCOEF)dc) return 0;
        const struct huffman *table = &scan->tables->ac[component->ac_tbl_no];
        if (is_used) (*blocks[i])[0] = (JCOEF)dc;
        int is_good = is_used ? read_frequencies(&bits, table, *blocks[i]) : pass_frequencies(&bits, table);
        if (!is_good || bits_left(&bits) < 0) return 0;
    }
    scan->bits = bits;
    scan->left--;
    if (++scan->column == (int)info->MCUs_per_row) {
        scan->column = 0;
        scan->row++;
    }
    return 1;
}

int ends_in_turn(struct scan *scan, const struct jpeg_decompress_struct *info) {
    int64_t num_mcus = (int64_t)info->MCUs_per_row * info->MCU_rows_in_scan, interval = info->restart_interval;
    if (!interval) return 1;
    scan->wanted.end_row = 0;
    scan->is_passed = 1; /* of an interval that was begun no more is wanted */
    while (scan->num_intervals * interval < num_mcus)
        if (!begin_interval(scan, info)) return 0;
    return scan->file_end - scan->data >= 2 && scan->data[0] == 0xFF && scan->data[1] == MARKER_EOI;
}
