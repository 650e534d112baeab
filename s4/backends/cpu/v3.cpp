#define S4_LEVEL "v3"
#define S4_BYTES 32  // AVX2 and fused multiply-adds, which x86-64-v3 has
#include "native.h"
