/* Restart markers, so that a decoder can begin in the middle. */
#ifndef SHARDLINE_TRANSCODE_H
#define SHARDLINE_TRANSCODE_H

#include <stddef.h>
#include <stdint.h>

#define MAX_REASON 200

/* The same JPEG, coefficient for coefficient and with all of its other segments, with a restart marker every `interval` MCUs; malloc'ed.
   NULL with a reason where it cannot be read. */
void add_restarts(const uint8_t *jpeg, size_t size, unsigned interval, uint8_t **out, size_t *out_size, char *reason);

#endif
