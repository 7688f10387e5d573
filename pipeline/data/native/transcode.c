#include "transcode.h"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>
#include <jerror.h>

struct transcoder {
    struct jpeg_decompress_struct from;
    struct jpeg_compress_struct to;
    struct jpeg_error_mgr errors;
    jmp_buf failed;
    char *reason;
    unsigned char *bytes;
    unsigned long size;
};

static void on_error(j_common_ptr info) {
    struct transcoder *transcoder = info->client_data;
    info->err->format_message(info, transcoder->reason);
    longjmp(transcoder->failed, 1);
}

static void on_message(j_common_ptr info, int level) {
    if (level < 0) on_error(info); /* a warning: guessed coefficients, which must not be written as if they were there */
}

/* All other segments in their order; JFIF's and Adobe's are written by libjpeg itself, from what it read. */
static void copy_segments(struct jpeg_decompress_struct *from, struct jpeg_compress_struct *to) {
    for (jpeg_saved_marker_ptr marker = from->marker_list; marker; marker = marker->next) {
        int is_jfif = marker->marker == JPEG_APP0 && marker->data_length >= 5 && !memcmp(marker->data, "JFIF\0", 5);
        int is_adobe = marker->marker == JPEG_APP0 + 14 && marker->data_length >= 5 && !memcmp(marker->data, "Adobe", 5);
        if ((is_jfif && to->write_JFIF_header) || (is_adobe && to->write_Adobe_marker)) continue;
        jpeg_write_marker(to, marker->marker, marker->data, marker->data_length);
    }
}

static void transcode(struct transcoder *transcoder, const uint8_t *jpeg, size_t size, unsigned interval) {
    struct jpeg_decompress_struct *from = &transcoder->from;
    struct jpeg_compress_struct *to = &transcoder->to;
    jpeg_create_decompress(from);
    jpeg_create_compress(to);
    jpeg_mem_src(from, jpeg, (unsigned long)size);
    jpeg_save_markers(from, JPEG_COM, 0xFFFF);
    for (int number = 0; number < 16; number++) jpeg_save_markers(from, JPEG_APP0 + number, 0xFFFF);
    jpeg_read_header(from, TRUE);
    jvirt_barray_ptr *coefficients = jpeg_read_coefficients(from);
    jpeg_copy_critical_parameters(from, to);
    to->restart_interval = interval;
    to->restart_in_rows = 0;
    to->optimize_coding = TRUE; /* its own Huffman tables win back what the markers cost */
    jpeg_mem_dest(to, &transcoder->bytes, &transcoder->size);
    jpeg_write_coefficients(to, coefficients);
    copy_segments(from, to);
    jpeg_finish_compress(to);
    jpeg_finish_decompress(from);
}

void add_restarts(const uint8_t *jpeg, size_t size, unsigned interval, uint8_t **out, size_t *out_size, char *reason) {
    struct transcoder transcoder;
    memset(&transcoder, 0, sizeof transcoder);
    transcoder.from.err = transcoder.to.err = jpeg_std_error(&transcoder.errors);
    transcoder.from.client_data = transcoder.to.client_data = &transcoder;
    transcoder.errors.error_exit = on_error;
    transcoder.errors.emit_message = on_message;
    transcoder.reason = reason;
    int succeeded = !setjmp(transcoder.failed);
    if (succeeded) transcode(&transcoder, jpeg, size, interval);
    jpeg_destroy_compress(&transcoder.to);
    jpeg_destroy_decompress(&transcoder.from);
    if (succeeded) {
        *out = transcoder.bytes;
        *out_size = transcoder.size;
    } else {
        free(transcoder.bytes);
    }
}
