/* What the stand-in compiler hands to the stand-in driver: this, and behind it so many bytes of a
 * shared library. Separate because both libraries must agree about it. */
#ifndef IMAGE_H
#define IMAGE_H

#include <stdint.h>

typedef struct {
    char magic[8];
    uint64_t bytes;
} Image;

/* In place of PTX, for a compute capability and all later ones, and of a binary for one. */
#define PORTABLE "tsd-ptx"
#define BINARY "tsd-bin"

#endif
