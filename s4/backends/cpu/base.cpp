#define S4_LEVEL "base"
#define S4_BYTES 16  // what every processor has
#include "native.h"
