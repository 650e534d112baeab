#define S4_LEVEL "v4"
#define S4_BYTES 64  // AVX-512 F, DQ, BW and VL, which x86-64-v4 has
#include "native.h"
