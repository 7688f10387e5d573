/* From the bytes of a JPEG to the pixels of a crop: no more rows, columns and frequencies are decoded than it needs.

   Nothing here knows Python, so that a fuzzer can call it. All memory is the caller's `struct scratch`, one for each thread. */
#ifndef SHARDLINE_JPEG_H
#define SHARDLINE_JPEG_H

#include <stddef.h>
#include <stdint.h>

/* A progressive file of a few kilobytes can make a decoder pass over all of its pixels thousands of times. */
#define MAX_SCANS 500

/* Anything but DECODED leaves the image to a general decoder, which finds the reason in words or decodes it after all. The
   names are those of `pipeline.data.native.STATUSES`. */
enum status { DECODED, NOT_SUPPORTED, TOO_LARGE, BROKEN, CUT_SHORT, NO_MEMORY };

/* A rectangle of the upright image, in pixels. */
struct box {
    int top, left, height, width;
};

/* What becomes of it. */
struct target {
    int height, width;   /* of the result */
    int mirrored;        /* left and right change places */
    uint64_t max_pixels; /* of the whole image */
};

/* What a JPEG says of itself before its first scan (ITU T.81, annex B). */
struct header {
    int width, height; /* as stored */
    int orientation;   /* EXIF's, 1 to 8 */
    int num_components;
    int mcu_width, mcu_height;
};

struct buffer {
    uint8_t *bytes;
    size_t size;
};

struct scratch {
    struct buffer encoded, pixels, resized, turned, unpacked, tables, weights;
};

enum status read_header(const uint8_t *jpeg, size_t size, struct header *header);
/* Height and width as a person sees the image. */
void upright_size(const struct header *header, int *height, int *width);
/* Writes target->height x target->width RGB pixels. `header` is that of `jpeg`, `box` lies in the upright image. */
enum status decode_crop(const uint8_t *jpeg, size_t size, const struct header *header, const struct box *box,
                        const struct target *target, struct scratch *scratch, uint8_t *out);

/* Who reads Huffman codes: we, and libjpeg where something is unusual; for comparisons only one of them. */
enum readers { BOTH, ONLY_WE, ONLY_LIBJPEG };
void read_codes_by(enum readers readers);

/* At least `size` bytes, all zero at first, or NULL; what was in a smaller room is lost. */
uint8_t *room(struct buffer *buffer, size_t size);
/* Gives it all back where that is more than `most` bytes; it can be used again. */
void shrink_scratch(struct scratch *scratch, size_t most);

/* Of a progressive JPEG that was read: whether its low frequencies are all there. Where not, libjpeg smooths what it shows. */
struct jpeg_decompress_struct;
int has_all_scans(const struct jpeg_decompress_struct *info);

#endif
