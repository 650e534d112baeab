#define S4_LEVEL "v4"
#define S4_BYTES 64  // x86-64-v4: AVX-512
#include "native.h"
