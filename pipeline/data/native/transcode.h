/* Restart markers, so that a decoder can begin in the middle. */
#ifndef SHARDLINE_TRANSCODE_H
#define SHARDLINE_TRANSCODE_H

#include <stddef.h>
#include <stdint.h>

#define MAX_REASON 200

/* The same JPEG, coefficient for coefficient (read again and compared) and with all of its other segments, with a restart marker
   every `interval` MCUs, 1 to 65535; malloc'ed. NULL with a reason where there is none to be had. What lies behind the end of the
   JPEG is left out, and so is JFIF's thumbnail. */
void add_restarts(const uint8_t *jpeg, size_t size, unsigned interval, uint64_t max_pixels, uint8_t **out, size_t *out_size,
                  char *reason);

#endif
