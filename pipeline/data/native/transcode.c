#include "transcode.h"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>
#include <jerror.h>

#include "jpeg.h"

struct transcoder {
    struct jpeg_decompress_struct from, again; /* the given file, and what was made of it */
    struct jpeg_compress_struct to;
    struct jpeg_error_mgr errors;
    struct jpeg_progress_mgr progress;
    struct jpeg_destination_mgr destination;
    jmp_buf failed;
    char *reason;
    uint8_t *bytes;
    size_t size;
};

static void give_up(struct transcoder *transcoder, const char *reason) {
    snprintf(transcoder->reason, MAX_REASON, "%s", reason);
    longjmp(transcoder->failed, 1);
}

static void on_error(j_common_ptr info) {
    struct transcoder *transcoder = info->client_data;
    info->err->format_message(info, transcoder->reason);
    longjmp(transcoder->failed, 1);
}

static void on_message(j_common_ptr info, int level) {
    if (level < 0) on_error(info); /* a warning: guessed coefficients, which must not be written as if they were there */
}

static void on_progress(j_common_ptr info) {
    if (((j_decompress_ptr)info)->input_scan_number > MAX_SCANS) give_up(info->client_data, "More scans than an image has");
}

/* ---- the result in memory; libjpeg's own destination loses what it holds when it fails ---- */

static void begin(j_compress_ptr to) {
    struct transcoder *transcoder = to->client_data;
    transcoder->bytes = malloc(transcoder->size);
    if (!transcoder->bytes) give_up(transcoder, "No memory");
    to->dest->next_output_byte = transcoder->bytes;
    to->dest->free_in_buffer = transcoder->size;
}

static boolean grow(j_compress_ptr to) {
    struct transcoder *transcoder = to->client_data;
    uint8_t *larger = realloc(transcoder->bytes, 2 * transcoder->size);
    if (!larger) give_up(transcoder, "No memory");
    transcoder->bytes = larger;
    to->dest->next_output_byte = larger + transcoder->size;
    to->dest->free_in_buffer = transcoder->size;
    transcoder->size *= 2;
    return TRUE;
}

static void end(j_compress_ptr to) {
    struct transcoder *transcoder = to->client_data;
    transcoder->size -= to->dest->free_in_buffer;
}

/* ---- from one file to the other ---- */

struct segment {
    int marker;
    const uint8_t *content;
    unsigned length;
};

static int is_called(const struct segment *segment, int marker, const char *name, unsigned length) {
    return segment->marker == marker && segment->length >= length && !memcmp(segment->content, name, length);
}

/* JFIF's and Adobe's are written by libjpeg itself, from what it read; an index of further pictures behind the end of the first
   (CIPA DC-007) goes with those, which are no part of a JPEG. */
static int is_copied(const struct segment *segment, const struct jpeg_compress_struct *to) {
    if (to->write_JFIF_header && is_called(segment, JPEG_APP0, "JFIF\0", 5)) return 0;
    if (to->write_Adobe_marker && is_called(segment, JPEG_APP0 + 14, "Adobe", 5)) return 0;
    if (is_called(segment, JPEG_APP0 + 2, "MPF\0", 4)) return 0;
    return segment->marker == JPEG_COM || (segment->marker >= JPEG_APP0 && segment->marker <= JPEG_APP0 + 15);
}

/* All other segments in their order, from the file, which libjpeg has read to its end: the list that it can make of them costs the
   square of their number. */
static void copy_segments(const uint8_t *at, const uint8_t *end, struct jpeg_compress_struct *to) {
    enum { ZERO = 0, TEM = 0x01, RST0 = 0xD0, SOI = 0xD8, EOI = 0xD9, FILL = 0xFF };
    while ((at = memchr(at, 0xFF, (size_t)(end - at))) && end - at >= 4) {
        int marker = at[1];
        if (marker == EOI) return;
        at += marker == FILL ? 1 : 2;
        if (marker == ZERO || marker == FILL || marker == TEM || (marker >= RST0 && marker <= SOI)) continue;
        struct segment segment = {marker, at + 2, 256u * at[0] + at[1]};
        if (segment.length < 2 || segment.length > (size_t)(end - at)) return;
        at += segment.length;
        segment.length -= 2;
        if (is_copied(&segment, to)) jpeg_write_marker(to, marker, segment.content, segment.length);
    }
}

static int is_same_component(struct transcoder *transcoder, int number, jvirt_barray_ptr given, jvirt_barray_ptr written) {
    struct jpeg_decompress_struct *from = &transcoder->from, *again = &transcoder->again;
    jpeg_component_info *one = from->comp_info + number, *other = again->comp_info + number;
    if (one->width_in_blocks != other->width_in_blocks || one->height_in_blocks != other->height_in_blocks ||
        one->h_samp_factor != other->h_samp_factor || one->v_samp_factor != other->v_samp_factor)
        return 0;
    if (one->quant_table && memcmp(one->quant_table->quantval, other->quant_table->quantval, sizeof one->quant_table->quantval))
        return 0;
    for (JDIMENSION row = 0; row < one->height_in_blocks; row++) {
        JBLOCKARRAY blocks = from->mem->access_virt_barray((j_common_ptr)from, given, row, 1, FALSE);
        JBLOCKARRAY others = again->mem->access_virt_barray((j_common_ptr)again, written, row, 1, FALSE);
        if (memcmp(blocks[0], others[0], one->width_in_blocks * sizeof(JBLOCK))) return 0;
    }
    return 1;
}

/* Read what was written and hold it against what was read first. */
static void require_same(struct transcoder *transcoder, jvirt_barray_ptr *given) {
    struct jpeg_decompress_struct *from = &transcoder->from, *again = &transcoder->again;
    jpeg_mem_src(again, transcoder->bytes, (unsigned long)transcoder->size);
    jpeg_read_header(again, TRUE);
    jvirt_barray_ptr *written = jpeg_read_coefficients(again);
    int is_same = from->image_width == again->image_width && from->image_height == again->image_height &&
                  from->num_components == again->num_components && from->jpeg_color_space == again->jpeg_color_space;
    for (int number = 0; is_same && number < from->num_components; number++)
        is_same = is_same_component(transcoder, number, given[number], written[number]);
    if (!is_same) give_up(transcoder, "What was written is not what was read");
}

static void transcode(struct transcoder *transcoder, const uint8_t *jpeg, size_t size, unsigned interval, uint64_t max_pixels) {
    struct jpeg_decompress_struct *from = &transcoder->from;
    struct jpeg_compress_struct *to = &transcoder->to;
    jpeg_create_decompress(from);
    jpeg_create_decompress(&transcoder->again);
    jpeg_create_compress(to);
    from->progress = &transcoder->progress;
    jpeg_mem_src(from, jpeg, (unsigned long)size);
    jpeg_read_header(from, TRUE);
    if ((uint64_t)from->image_width * from->image_height > max_pixels) give_up(transcoder, "More pixels than an image may have");
    jvirt_barray_ptr *coefficients = jpeg_read_coefficients(from);
    if (!has_all_scans(from)) give_up(transcoder, "some of its progressive scans are missing");
    jpeg_copy_critical_parameters(from, to);
    to->restart_interval = interval;
    to->restart_in_rows = 0;
    to->optimize_coding = TRUE; /* its own Huffman tables win back what the markers cost */
    to->dest = &transcoder->destination;
    jpeg_write_coefficients(to, coefficients);
    copy_segments(jpeg, jpeg + size, to);
    jpeg_finish_compress(to);
    require_same(transcoder, coefficients);
}

static int attempt(struct transcoder *transcoder, const uint8_t *jpeg, size_t size, unsigned interval, uint64_t max_pixels) {
    if (setjmp(transcoder->failed)) return 0;
    transcode(transcoder, jpeg, size, interval, max_pixels);
    return 1;
}

void add_restarts(const uint8_t *jpeg, size_t size, unsigned interval, uint64_t max_pixels, uint8_t **out, size_t *out_size,
                  char *reason) {
    struct transcoder transcoder;
    memset(&transcoder, 0, sizeof transcoder);
    transcoder.from.err = transcoder.again.err = transcoder.to.err = jpeg_std_error(&transcoder.errors);
    transcoder.from.client_data = transcoder.again.client_data = transcoder.to.client_data = &transcoder;
    transcoder.errors.error_exit = on_error;
    transcoder.errors.emit_message = on_message;
    transcoder.progress.progress_monitor = on_progress;
    transcoder.destination.init_destination = begin;
    transcoder.destination.empty_output_buffer = grow;
    transcoder.destination.term_destination = end;
    transcoder.reason = reason;
    transcoder.size = size + 4096;
    int succeeded = attempt(&transcoder, jpeg, size, interval, max_pixels);
    jpeg_destroy_compress(&transcoder.to);
    jpeg_destroy_decompress(&transcoder.again);
    jpeg_destroy_decompress(&transcoder.from);
    if (succeeded) {
        *out = transcoder.bytes;
        *out_size = transcoder.size;
    } else {
        free(transcoder.bytes);
    }
}
