#include "jpeg.h"

#include <math.h>
#include <setjmp.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>
#include <jerror.h>

#include "entropy.h"
#include "resize.h"

/* Chroma of a neighbour shines into the last pixel on each side, where it is stored at half the width or height. */
#define MARGIN 2

uint8_t *room(struct buffer *buffer, size_t size) {
    if (buffer->size < size) {
        free(buffer->bytes);
        buffer->size = 0;
        buffer->bytes = calloc(1, size);
        if (buffer->bytes) buffer->size = size;
    }
    return buffer->bytes;
}

void shrink_scratch(struct scratch *scratch, size_t most) {
    struct buffer *all[] = {&scratch->encoded,  &scratch->pixels, &scratch->resized, &scratch->turned,
                            &scratch->unpacked, &scratch->tables, &scratch->weights};
    size_t held = 0, number = sizeof all / sizeof *all;
    for (size_t i = 0; i < number; i++) held += all[i]->size;
    if (held <= most) return;
    for (size_t i = 0; i < number; i++) {
        free(all[i]->bytes);
        all[i]->bytes = NULL;
        all[i]->size = 0;
    }
}

/* ---- what the file says of itself ---- */

enum marker {
    SOF0 = 0xC0,
    SOF2 = 0xC2,
    DHT = 0xC4,
    JPG = 0xC8,
    DAC = 0xCC,
    RST0 = 0xD0,
    RST7 = 0xD7,
    SOI = 0xD8,
    EOI = 0xD9,
    SOS = 0xDA,
    APP1 = 0xE1
};

static uint32_t number(const uint8_t *bytes, int length, int little) {
    uint32_t value = 0;
    for (int i = 0; i < length; i++) value |= (uint32_t)bytes[i] << 8 * (little ? i : length - 1 - i);
    return value;
}

static int contains(const uint8_t *bytes, size_t size, const char *text) {
    size_t length = strlen(text);
    for (size_t i = 0; i + length <= size; i++)
        if (!memcmp(bytes + i, text, length)) return 1;
    return 0;
}

/* The orientation in an EXIF segment, 1 where there is none, 0 where it is written in an unusual way (TIFF 6.0, section 2). */
static int read_orientation(const uint8_t *tiff, size_t size) {
    if (size < 8) return 0;
    int little = tiff[0] == 'I';
    if (memcmp(tiff, little ? "II" : "MM", 2) || number(tiff + 2, 2, little) != 42) return 0;
    size_t entry = number(tiff + 4, 4, little);
    if (entry > size || size - entry < 2) return 0;
    int num_entries = (int)number(tiff + entry, 2, little), orientation = 1, found = 0;
    entry += 2;
    if (size - entry < 12 * (size_t)num_entries) return 0;
    for (int i = 0; i < num_entries; i++, entry += 12) {
        if (number(tiff + entry, 2, little) != 0x0112) continue;
        int is_short = number(tiff + entry + 2, 2, little) == 3, count = (int)number(tiff + entry + 4, 4, little);
        orientation = (int)number(tiff + entry + 8, 2, little);
        if (found++ || !is_short || count != 1 || orientation < 1 || orientation > 8) return 0;
    }
    return orientation;
}

static enum status read_frame(const uint8_t *segment, size_t size, struct header *header) {
    if (size < 6) return BROKEN;
    header->height = (int)number(segment + 1, 2, 0);
    header->width = (int)number(segment + 3, 2, 0);
    header->num_components = segment[5];
    int known = header->num_components == 1 || header->num_components == 3 || header->num_components == 4;
    if (segment[0] != 8 || !known || !header->height || !header->width) return NOT_SUPPORTED;
    if (size < 6 + 3 * (size_t)header->num_components) return BROKEN;
    int across = 1, down = 1, has_half = 0;
    for (int i = 0; i < header->num_components; i++) {
        int factors = segment[7 + 3 * i];
        if (factors >> 4 > across) across = factors >> 4;
        if ((factors & 15) > down) down = factors & 15;
        has_half |= factors >> 4 == 2;
    }
    /* 4:1:0 and the like: libjpeg makes other pixels of some windows than of the whole image. */
    if (header->num_components > 1 && (across * down > 4 || (across == 4 && has_half))) return NOT_SUPPORTED;
    header->mcu_width = header->num_components == 1 ? 8 : 8 * across; /* one component is never interleaved */
    header->mcu_height = header->num_components == 1 ? 8 : 8 * down;
    return DECODED;
}

enum status read_header(const uint8_t *jpeg, size_t size, struct header *header) {
    memset(header, 0, sizeof *header);
    header->orientation = 1;
    if (size < 4 || jpeg[0] != 0xFF || jpeg[1] != SOI) return NOT_SUPPORTED;
    int num_exif = 0, has_frame = 0;
    for (size_t at = 2;;) {
        if (size - at < 4) return BROKEN;
        if (jpeg[at] != 0xFF) return BROKEN;
        if (jpeg[at + 1] == 0xFF) { /* a fill byte */
            at++;
            continue;
        }
        int marker = jpeg[at + 1];
        size_t length = number(jpeg + at + 2, 2, 0);
        if (marker < SOF0 || (marker >= RST0 && marker <= EOI)) return BROKEN;
        if (length < 2 || length > size - at - 2) return BROKEN;
        const uint8_t *segment = jpeg + at + 4;
        size_t content = length - 2;
        if (marker == SOS) return has_frame ? DECODED : BROKEN;
        if (marker <= DAC && marker != DHT && marker != JPG && marker != DAC) {
            if (has_frame++ || marker > SOF2) return NOT_SUPPORTED; /* lossless, hierarchical or arithmetic coding */
            enum status status = read_frame(segment, content, header);
            if (status != DECODED) return status;
        } else if (marker == APP1 && content >= 6 && !memcmp(segment, "Exif\0", 6)) {
            header->orientation = read_orientation(segment + 6, content - 6);
            if (num_exif++ || !header->orientation) return NOT_SUPPORTED;
        } else if (marker == APP1 && contains(segment, content, "tiff:Orientation")) {
            return NOT_SUPPORTED; /* XMP, which Pillow reads */
        }
        at += 2 + length;
    }
}

void upright_size(const struct header *header, int *height, int *width) {
    int turned = header->orientation >= 5;
    *height = turned ? header->width : header->height;
    *width = turned ? header->height : header->width;
}

/* ---- decoding a window ---- */

/* What libjpeg declares for itself alone. It begins so in every release of libjpeg and libjpeg-turbo. */
struct jpeg_entropy_decoder {
    void (*start_pass)(j_decompress_ptr);
    boolean (*decode_mcu)(j_decompress_ptr, JBLOCKROW *);
};

/* libjpeg reports by calls that may not return. Whatever changes after `setjmp` lives in here. */
struct decoder {
    struct jpeg_decompress_struct info;
    struct jpeg_error_mgr errors;
    struct jpeg_progress_mgr progress;
    jmp_buf failed;
    enum status status;
    const uint8_t *jpeg;
    size_t size;
    struct scan scan; /* as far as we read it, and not libjpeg */
    int by_libjpeg;   /* this time libjpeg reads all */
    int is_unusual;   /* we could not go on: libjpeg has to read it again from the start */
};

static void give_up(struct decoder *decoder, enum status status) {
    decoder->status = status;
    longjmp(decoder->failed, 1);
}

static void on_error(j_common_ptr info) {
    give_up((struct decoder *)info->client_data, info->err->msg_code == JERR_OUT_OF_MEMORY ? NO_MEMORY : BROKEN);
}

static void on_message(j_common_ptr info, int level) {
    if (level < 0) give_up((struct decoder *)info->client_data, BROKEN); /* a warning: guessed pixels */
}

static void on_progress(j_common_ptr info) {
    if (((j_decompress_ptr)info)->input_scan_number > MAX_SCANS) give_up((struct decoder *)info->client_data, NOT_SUPPORTED);
}

/* In eighths: 8, 4, 2 or 1. Scaling in the frequencies loses nothing where the crop is to become half as large or smaller; but of
   chroma that is stored smaller in one direction alone (4:2:2) libjpeg drops frequencies in both, as many as of the light. */
static int scale_for(const struct box *box, int height, int width, const struct header *header) {
    int eighths = 8, across = header->mcu_width, down = header->mcu_height;
    while (eighths > 1 && box->height / height >= 16 / eighths && box->width / width >= 16 / eighths) eighths /= 2;
    eighths *= across > down ? across / down : down / across;
    return eighths < 8 ? eighths : 8;
}

static void to_rgb(const uint8_t *inverted, size_t length, uint8_t *rgb) {
    /* As Pillow does: Adobe's files hold 255 minus each ink, and black paper times a lack of ink is what shines. */
    for (size_t i = 0; i < length; i++, inverted += 4, rgb += 3)
        for (int channel = 0; channel < 3; channel++) {
            uint32_t product = (255u - inverted[channel]) * inverted[3] + 128;
            int dark = (int)((product + (product >> 8)) >> 8), light = inverted[3] - dark;
            rgb[channel] = (uint8_t)(light < 0 ? 0 : light);
        }
}

int has_all_scans(const struct jpeg_decompress_struct *info) {
    for (int component = 0; info->coef_bits && component < info->num_components; component++)
        for (int i = 0; i < 10; i++)
            if (info->coef_bits[component][i]) return 0;
    return 1;
}

static void leave_to_libjpeg(struct decoder *decoder) {
    decoder->is_unusual = 1;
    give_up(decoder, BROKEN);
}

static boolean on_mcu(j_decompress_ptr info, JBLOCKROW *blocks) {
    struct decoder *decoder = info->client_data;
    if (!read_mcu(&decoder->scan, info, blocks)) leave_to_libjpeg(decoder);
    return TRUE;
}

static int ends_whole(const struct decoder *decoder) {
    return decoder->size >= 2 && decoder->jpeg[decoder->size - 2] == 0xFF && decoder->jpeg[decoder->size - 1] == EOI;
}

static atomic_int code_readers = BOTH;

void read_codes_by(enum readers readers) { code_readers = readers; }

/* Has the Huffman codes read by us, where there is one scan of them; rows and columns are those of the output. */
static void read_codes(struct decoder *decoder, const struct header *header, int first, int end, int from, int until,
                       struct scratch *scratch) {
    struct jpeg_decompress_struct *info = &decoder->info;
    /* Without its last marker libjpeg finds some files cut off and some not, by how far ahead it has read. */
    if (decoder->by_libjpeg || !ends_whole(decoder) || jpeg_has_multiple_scans(info) || info->arith_code) {
        if (code_readers == ONLY_WE) give_up(decoder, NOT_SUPPORTED);
        return;
    }
    size_t size = info->src->bytes_in_buffer;
    uint8_t *unpacked = room(&scratch->unpacked, size + OVERRUN), *tables = room(&scratch->tables, sizeof(struct tables));
    if (!unpacked || !tables) give_up(decoder, NO_MEMORY);
    int height = header->mcu_height * (int)info->scale_num / 8, width = header->mcu_width * (int)info->scale_num / 8;
    /* libjpeg reads a row above and below for the chroma of its neighbours, and one component in as many rows at once as that has. */
    int more = info->num_components == 1 ? info->max_v_samp_factor : 1;
    struct mcus wanted = {first / height - more, (end + height - 1) / height + more, from / width, (until + width - 1) / width};
    begin_scan(&decoder->scan, info, (struct tables *)tables, &wanted, info->src->next_input_byte, size, unpacked);
    info->entropy->decode_mcu = on_mcu;
}

static void decode_window(struct decoder *decoder, const struct header *header, const struct box *box, int height, int width,
                          struct scratch *scratch, struct window *window) {
    struct jpeg_decompress_struct *info = &decoder->info;
    jpeg_read_header(info, TRUE);
    if ((int)info->image_width != header->width || (int)info->image_height != header->height ||
        info->num_components != header->num_components || info->data_precision != 8)
        give_up(decoder, NOT_SUPPORTED);
    info->out_color_space = info->num_components == 4 ? JCS_CMYK : JCS_RGB;
    info->scale_num = (unsigned)scale_for(box, height, width, header);
    info->scale_denom = 8;
    info->dct_method = JDCT_ISLOW;
    jpeg_start_decompress(info);
    if (!has_all_scans(info)) give_up(decoder, NOT_SUPPORTED); /* what is missing is guessed from all blocks around */
    double scale = info->scale_num / 8.0;
    double top = box->top * scale, left = box->left * scale;
    double box_height = box->height * scale, box_width = box->width * scale;
    int first = (int)floor(top) - MARGIN, end = (int)ceil(top + box_height) + MARGIN;
    int from = (int)floor(left) - MARGIN, until = (int)ceil(left + box_width) + MARGIN;
    if (first < 0) first = 0;
    if (end > (int)info->output_height) end = (int)info->output_height;
    if (from < 0) from = 0;
    if (until > (int)info->output_width) until = (int)info->output_width;
    JDIMENSION column = (JDIMENSION)from, columns = (JDIMENSION)(until - from);
    jpeg_crop_scanline(info, &column, &columns);
    read_codes(decoder, header, first, end, (int)column, until, scratch);
    if (first > 0) first = (int)jpeg_skip_scanlines(info, (JDIMENSION)first);
    size_t stride = 3 * (size_t)columns, num_rows = (size_t)(end - first), inks = info->num_components == 4 ? 4 * (size_t)columns : 0;
    uint8_t *pixels = room(&scratch->pixels, stride * num_rows + SLACK);
    uint8_t *row_of_inks = inks ? room(&scratch->turned, inks + SLACK) : NULL;
    if (!pixels || (inks && !row_of_inks)) give_up(decoder, NO_MEMORY);
    memset(pixels + stride * num_rows, 0, SLACK);
    for (size_t row = 0; row < num_rows;) {
        JSAMPROW rows[4];
        size_t at_once = inks ? 1 : num_rows - row < 4 ? num_rows - row : 4;
        for (size_t i = 0; i < at_once; i++) rows[i] = inks ? row_of_inks : pixels + stride * (row + i);
        size_t read = jpeg_read_scanlines(info, rows, (JDIMENSION)at_once);
        if (!read) give_up(decoder, BROKEN);
        if (inks) to_rgb(row_of_inks, columns, pixels + stride * row);
        row += read;
    }
    *window = (struct window){pixels, (int)columns, (int)num_rows, top - first, left - column, box_height, box_width};
}

/* Refuses a file that was cut off behind the rows that were read: to skip to the very end would decode nothing, to read the last
   row decodes all before it. And one that lost restart markers before them, so that other rows were read. */
static void require_whole(struct decoder *decoder, struct scratch *scratch) {
    struct jpeg_decompress_struct *info = &decoder->info;
    if (decoder->scan.tables && !ends_in_turn(&decoder->scan, info)) leave_to_libjpeg(decoder);
    if (ends_whole(decoder)) return;
    JDIMENSION left = info->output_height - info->output_scanline;
    if (!left) return;
    JSAMPROW row = room(&scratch->turned, (size_t)info->output_width * (size_t)info->output_components + SLACK);
    if (!row) give_up(decoder, NO_MEMORY);
    if (left > 1) jpeg_skip_scanlines(info, left - 1);
    jpeg_read_scanlines(info, &row, 1);
}

static void attempt(struct decoder *decoder, const struct header *header, const struct box *box, int height, int width,
                    struct scratch *scratch, struct window *window) {
    if (setjmp(decoder->failed)) return;
    jpeg_create_decompress(&decoder->info);
    decoder->info.progress = &decoder->progress;
    jpeg_mem_src(&decoder->info, decoder->jpeg, (unsigned long)decoder->size);
    decode_window(decoder, header, box, height, width, scratch, window);
    require_whole(decoder, scratch);
}

static enum status decode(const uint8_t *jpeg, size_t size, const struct header *header, const struct box *box, int height,
                          int width, int by_libjpeg, struct scratch *scratch, struct window *window) {
    struct decoder decoder;
    memset(&decoder, 0, sizeof decoder);
    decoder.info.err = jpeg_std_error(&decoder.errors);
    decoder.info.client_data = &decoder;
    decoder.errors.error_exit = on_error;
    decoder.errors.emit_message = on_message;
    decoder.progress.progress_monitor = on_progress;
    decoder.status = DECODED;
    decoder.jpeg = jpeg;
    decoder.size = size;
    decoder.by_libjpeg = by_libjpeg;
    attempt(&decoder, header, box, height, width, scratch, window);
    jpeg_destroy_decompress(&decoder.info);
    if (!decoder.is_unusual || code_readers == ONLY_WE) return decoder.status;
    return decode(jpeg, size, header, box, height, width, 1, scratch, window);
}

/* ---- a crop ---- */

/* How a stored image is read to be upright: its rows from below, its columns from the right, and then rows as columns. */
struct turn {
    int upside_down, mirrored, transposed;
};

static struct turn turn_of(int orientation) {
    struct turn turn = {
        .upside_down = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7,
        .mirrored = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8,
        .transposed = orientation >= 5,
    };
    return turn;
}

static struct box stored_box(const struct header *header, const struct box *box, struct turn turn) {
    struct box stored = *box;
    if (turn.transposed) stored = (struct box){box->left, box->top, box->width, box->height};
    if (turn.upside_down) stored.top = header->height - stored.top - stored.height;
    if (turn.mirrored) stored.left = header->width - stored.left - stored.width;
    return stored;
}

enum status decode_crop(const uint8_t *jpeg, size_t size, const struct header *header, const struct box *box,
                        const struct target *target, struct scratch *scratch, uint8_t *out) {
    if ((uint64_t)header->width * (uint64_t)header->height > target->max_pixels) return TOO_LARGE;
    int whole_height, whole_width;
    upright_size(header, &whole_height, &whole_width);
    if (box->height < 1 || box->width < 1 || box->top < 0 || box->left < 0 || box->top > whole_height - box->height ||
        box->left > whole_width - box->width)
        return NOT_SUPPORTED;
    struct turn turn = turn_of(header->orientation);
    struct box stored = stored_box(header, box, turn);
    int height = turn.transposed ? target->width : target->height, width = turn.transposed ? target->height : target->width;
    struct window window;
    enum status status = decode(jpeg, size, header, &stored, height, width, code_readers == ONLY_LIBJPEG, scratch,
                                &window);
    if (status != DECODED) return status;
    if (target->mirrored && turn.transposed) turn.upside_down ^= 1;
    if (target->mirrored && !turn.transposed) turn.mirrored ^= 1;
    if (!turn.transposed) return resize(&window, height, width, turn.mirrored, turn.upside_down, scratch, out);
    uint8_t *turned = room(&scratch->turned, 3 * (size_t)height * (size_t)width);
    if (!turned) return NO_MEMORY;
    status = resize(&window, height, width, turn.mirrored, turn.upside_down, scratch, turned);
    if (status != DECODED) return status;
    for (int row = 0; row < target->height; row++)
        for (int column = 0; column < target->width; column++, out += 3)
            memcpy(out, turned + 3 * ((size_t)column * (size_t)width + (size_t)row), 3);
    return DECODED;
}
