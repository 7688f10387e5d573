/* What no JPEG may do to the decoder, for libFuzzer: `make fuzz` builds it with the sanitizers and lets it search.

   The last bytes of an input choose the crop, what comes before them is the JPEG. Beyond memory errors, an input is a finding
   where two ways to the same pixels differ: AVX2 and portable C, our reader of Huffman codes and libjpeg's, fresh and used memory, a
   window and the whole image, a crop and what is cut out of it, the file and the same with restart markers. */
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

#include "jpeg.h"
#include "resize.h"
#include "transcode.h"

#define MAX_PIXELS (1 << 16) /* more costs time and shows nothing new */

struct choices {
    uint8_t top, left, height, width, target_height, target_width, mirrored, orientation, interval;
};

static void require(int holds, const char *what) {
    if (holds) return;
    fprintf(stderr, "finding: %s\n", what);
    abort();
}

static int part_of(uint8_t choice, int length) { return choice * length / 255; }

static struct box chosen_box(const struct choices *choices, int height, int width) {
    int top = part_of(choices->top, height - 1), left = part_of(choices->left, width - 1);
    int tall = 1 + part_of(choices->height, height - top - 1), wide = 1 + part_of(choices->width, width - left - 1);
    return (struct box){top, left, tall, wide};
}

/* ---- the plain way: all rows and columns, then the same resize ---- */

struct plain {
    struct jpeg_decompress_struct info;
    struct jpeg_error_mgr errors;
    jmp_buf failed;
    uint8_t *pixels;
};

static void on_error(j_common_ptr info) { longjmp(((struct plain *)info->client_data)->failed, 1); }

static void on_message(j_common_ptr info, int level) {
    if (level < 0) on_error(info);
}

static int decode_all(struct plain *plain, const uint8_t *jpeg, size_t size, unsigned eighths) {
    struct jpeg_decompress_struct *info = &plain->info;
    info->err = jpeg_std_error(&plain->errors);
    info->client_data = plain;
    plain->errors.error_exit = on_error;
    plain->errors.emit_message = on_message;
    if (setjmp(plain->failed)) return 0;
    jpeg_create_decompress(info);
    jpeg_mem_src(info, jpeg, (unsigned long)size);
    jpeg_read_header(info, TRUE);
    info->out_color_space = JCS_RGB;
    info->scale_num = eighths;
    info->scale_denom = 8;
    jpeg_start_decompress(info);
    plain->pixels = calloc(1, 3 * (size_t)info->output_width * info->output_height + SLACK);
    while (info->output_scanline < info->output_height) {
        JSAMPROW row = plain->pixels + 3 * (size_t)info->output_width * info->output_scanline;
        jpeg_read_scanlines(info, &row, 1);
    }
    return 1;
}

static void compare_with_whole(const uint8_t *jpeg, size_t size, const struct header *header, const struct box *box,
                               const struct target *target, const uint8_t *pixels) {
    unsigned eighths = 8, across = (unsigned)header->mcu_width, down = (unsigned)header->mcu_height;
    while (eighths > 1 && box->height * (int)eighths >= 16 * target->height && box->width * (int)eighths >= 16 * target->width)
        eighths /= 2;
    eighths *= across > down ? across / down : down / across;
    if (eighths > 8) eighths = 8;
    struct plain plain;
    memset(&plain, 0, sizeof plain);
    if (decode_all(&plain, jpeg, size, eighths)) {
        double scale = eighths / 8.0;
        struct window window = {plain.pixels,     (int)plain.info.output_width, (int)plain.info.output_height, box->top * scale,
                                box->left * scale, box->height * scale,          box->width * scale};
        struct scratch scratch;
        memset(&scratch, 0, sizeof scratch);
        size_t length = 3 * (size_t)target->height * (size_t)target->width;
        uint8_t *expected = malloc(length);
        resize(&window, target->height, target->width, target->mirrored, 0, &scratch, expected);
        require(!memcmp(expected, pixels, length), "a window has other pixels than the whole image");
        free(expected);
        shrink_scratch(&scratch, 0);
    }
    free(plain.pixels);
    jpeg_destroy_decompress(&plain.info);
}

/* ---- the same without a filter: a crop at its own size is cut out of the whole image ---- */

static void compare_with_cut(const uint8_t *jpeg, size_t size, const struct header *header, const struct box *box, int mirrored,
                             struct scratch *scratch) {
    int height, width;
    upright_size(header, &height, &width);
    struct box all = {0, 0, height, width};
    struct target whole = {height, width, 0, MAX_PIXELS}, part = {box->height, box->width, mirrored, MAX_PIXELS};
    size_t row = 3 * (size_t)box->width;
    uint8_t *pixels = calloc(3 * (size_t)height, (size_t)width), *cut = calloc(row, (size_t)box->height);
    if (decode_crop(jpeg, size, header, &all, &whole, scratch, pixels) == DECODED) {
        require(decode_crop(jpeg, size, header, box, &part, scratch, cut) == DECODED, "a part of an image cannot be decoded");
        for (int y = 0; y < box->height; y++)
            for (int x = 0; x < box->width; x++) {
                int from = box->left + (mirrored ? box->width - 1 - x : x);
                const uint8_t *expected = pixels + 3 * ((size_t)(box->top + y) * (size_t)width + (size_t)from);
                require(!memcmp(cut + row * (size_t)y + 3 * (size_t)x, expected, 3), "a crop has other pixels than the image");
            }
    }
    free(pixels);
    free(cut);
}

/* ---- one input ---- */

static int has_restarts(const uint8_t *jpeg, size_t size) {
    for (size_t i = 0; i + 1 < size; i++)
        if (jpeg[i] == 0xFF && jpeg[i + 1] == 0xDD) return 1;
    return 0;
}

static enum status crop(const uint8_t *jpeg, size_t size, const struct choices *choices, struct target *target, struct box *box,
                        struct header *header, struct scratch *scratch, uint8_t *out) {
    enum status status = read_header(jpeg, size, header);
    if (status != DECODED) return status;
    if (choices->orientation % 9) header->orientation = choices->orientation % 9;
    int height, width;
    upright_size(header, &height, &width);
    *box = chosen_box(choices, height, width);
    return decode_crop(jpeg, size, header, box, target, scratch, out);
}

static void compare_with_restarts(const uint8_t *jpeg, size_t size, const struct choices *choices, struct target *target,
                                  enum status status, const uint8_t *pixels, size_t length) {
    uint8_t *marked = NULL;
    size_t marked_size = 0;
    char reason[MAX_REASON] = "";
    add_restarts(jpeg, size, 1 + choices->interval, MAX_PIXELS, &marked, &marked_size, reason);
    require(marked ? marked_size > 0 : reason[0] != 0, "neither a JPEG with restart markers nor a reason");
    if (!marked) return;
    uint8_t *again = calloc(1, length), *exact = malloc(marked_size);
    memcpy(exact, marked, marked_size);
    struct scratch scratch;
    struct header header;
    struct box box;
    memset(&scratch, 0, sizeof scratch);
    enum status marked_status = crop(exact, marked_size, choices, target, &box, &header, &scratch, again);
    if (status == DECODED) {
        require(marked_status == DECODED, "with restart markers it cannot be decoded");
        require(!memcmp(pixels, again, length), "restart markers changed the pixels");
    }
    shrink_scratch(&scratch, 0);
    free(exact);
    free(again);
    free(marked);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t data_size) {
    static struct scratch used;
    struct choices choices;
    if (data_size < sizeof choices) return 0;
    size_t size = data_size - sizeof choices;
    memcpy(&choices, data + size, sizeof choices);
    uint8_t *jpeg = malloc(size ? size : 1); /* no byte more: reading one is an error */
    memcpy(jpeg, data, size);
    struct target target = {1 + choices.target_height % 80, 1 + choices.target_width % 80, choices.mirrored & 1, MAX_PIXELS};
    size_t length = 3 * (size_t)target.height * (size_t)target.width;
    uint8_t *pixels = malloc(length), *others = malloc(length);
    memset(pixels, 0, length);
    memset(others, 255, length); /* so that a pixel nobody writes differs */
    struct scratch fresh;
    struct header header;
    struct box box;
    memset(&fresh, 0, sizeof fresh);
    use_avx2(1);
    enum status status = crop(jpeg, size, &choices, &target, &box, &header, &fresh, pixels);
    use_avx2(0);
    enum status portable = crop(jpeg, size, &choices, &target, &box, &header, &used, others);
    use_avx2(1);
    require(status == portable, "AVX2 and portable C differ in their status");
    require(status != DECODED || !memcmp(pixels, others, length), "AVX2 and portable C differ in their pixels");
    read_codes_by(ONLY_LIBJPEG);
    memset(others, 255, length);
    enum status slow = crop(jpeg, size, &choices, &target, &box, &header, &used, others);
    read_codes_by(BOTH);
    if (status == DECODED) {
        /* Beside a crop, what lies between two restart markers may be broken. */
        int is_all = (uint64_t)box.height * (uint64_t)box.width == (uint64_t)header.height * (uint64_t)header.width;
        require(slow == DECODED || (has_restarts(jpeg, size) && !is_all), "libjpeg cannot read what we can");
        require(slow != DECODED || !memcmp(pixels, others, length), "libjpeg reads other coefficients than we do");
        if (header.orientation == 1 && header.num_components != 4) compare_with_whole(jpeg, size, &header, &box, &target, pixels);
        compare_with_cut(jpeg, size, &header, &box, target.mirrored, &used);
    }
    require(slow != DECODED || status == DECODED, "libjpeg can read what we cannot");
    uint64_t num_pixels = (uint64_t)header.width * (uint64_t)header.height;
    if (num_pixels && num_pixels <= MAX_PIXELS)
        compare_with_restarts(jpeg, size, &choices, &target, status, pixels, length);
    shrink_scratch(&fresh, 0);
    free(pixels);
    free(others);
    free(jpeg);
    return 0;
}
