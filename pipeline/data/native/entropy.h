/* The Huffman codes of a sequential JPEG (ITU T.81, annex F.2), read for a window: blocks outside it are passed over, and restart
   intervals that it does not touch are not even looked into.

   libjpeg reads them too, and decides about every file that is not in order: whatever is unusual is "not read" here. */
#ifndef SHARDLINE_ENTROPY_H
#define SHARDLINE_ENTROPY_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <jpeglib.h>

/* Bits that are looked up at once; most codes with the bits of their coefficient are shorter. */
#define LOOKAHEAD 10

/* A Huffman table, by what the next bits can be. */
struct huffman {
    int is_made;
    uint8_t counts[17], symbols[256]; /* what it was made of: it stays for the next image that has the same */
    uint64_t quick[1 << LOOKAHEAD];   /* see LENGTH */
    int32_t limit[17];                /* of each length: what 16 bits of a code are below */
    int32_t offset[17];               /* from the last code of a length to its place among the symbols */
};

/* What one thread keeps from image to image. */
struct tables {
    struct huffman dc[NUM_HUFF_TBLS], ac[NUM_HUFF_TBLS];
};

struct bits {
    const uint8_t *next, *end; /* without the zeros that follow each 0xFF in a file */
    uint64_t held;             /* the next bits, the first one highest */
    int count;                 /* how many are held, beside what was loaded in passing */
};

/* MCUs by row and column: from the first to before the end. */
struct mcus {
    int first_row, end_row, first_column, end_column;
};

struct scan {
    struct tables *tables;
    struct mcus wanted;
    const uint8_t *data, *file_end; /* what was not unpacked yet */
    uint8_t *unpacked;              /* room for an interval */
    struct bits bits;
    int row, column, left; /* of the next MCU, and of MCUs in its interval */
    int num_intervals, is_passed;
    int last_dc[MAX_COMPS_IN_SCAN];
};

/* Bytes behind an interval that may be loaded before it is noticed: a block of 64 x (16 + 15) bits, 7 that are held on top of it, and
   a load of 8 make 263. */
#define OVERRUN 264

/* Begins to read the scan of `info`, which has been started; `data` is what follows its header to the end of the file. `unpacked`
   has room for as many bytes and OVERRUN more. The Huffman tables are those that jpeg_start_decompress has checked. */
void begin_scan(struct scan *scan, const struct jpeg_decompress_struct *info, struct tables *tables, const struct mcus *wanted,
                const uint8_t *data, size_t size, uint8_t *unpacked);
/* Reads the next MCU into `blocks`, which are all zero, and stay so beside the wanted columns; NULL where nobody wants it. Returns
   whether it was in order, and not in an interval that was passed over. */
int read_mcu(struct scan *scan, const struct jpeg_decompress_struct *info, JBLOCKROW *blocks);
/* After the last wanted MCU: whether the file has all of its restart markers, in turn. An interval that was passed over ends where
   the next marker is; where eight were lost, the others would be of other places. */
int ends_in_turn(struct scan *scan, const struct jpeg_decompress_struct *info);

#endif
