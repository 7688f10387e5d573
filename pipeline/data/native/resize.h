/* The resize of training images: a triangle filter that widens as the image shrinks (Pillow's BILINEAR, torch's `antialias`). */
#ifndef SHARDLINE_RESIZE_H
#define SHARDLINE_RESIZE_H

#include "jpeg.h"

/* What may be read behind the last pixel of an image that is resized, in bytes. */
#define SLACK 64

/* A window of decoded pixels, three bytes each, and the box in it that is wanted, in fractions of its pixels. */
struct window {
    const uint8_t *pixels;
    int width, height;
    double top, left, box_height, box_width;
};

/* Writes height x width pixels, rows from the last to the first where `upside_down`, each from right to left where `mirrored`.
   NOT_SUPPORTED where one pixel would be the mean of more than MAX_TAPS in a row. */
#define MAX_TAPS 256
enum status resize(const struct window *window, int height, int width, int mirrored, int upside_down, struct scratch *scratch,
                   uint8_t *out);

/* 1 for AVX2, 0 for portable C; both give the same pixels. Setting it is for tests. */
int uses_avx2(void);
void use_avx2(int wanted);

#endif
