/* What the C files of this folder share: registers of float32 as GCC's vectors, as wide as the CPU has them. */

#include <stdint.h>

#define BLOCK 4      /* rows that products take at a time */
#define HEAD_SIZE 64 /* features of a head of GPT-2 */

#if defined __AVX512F__
#define LANES 16  /* floats in a register */
#define VECTORS 4 /* BLOCK x VECTORS sums stay in registers: there are 32 here, */
#elif defined __AVX__
#define LANES 8
#define VECTORS 2 /* 16 here */
#else
#define LANES 4
#define VECTORS 2
#endif

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t integers __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
