#define S4_LEVEL "v3"
#define S4_BYTES 32  // x86-64-v3: AVX2 and multiply-adds
#include "native.h"
