#include "train_body.h"

namespace bitspike {
const TrainKernels train_avx512 = BITSPIKE_TRAIN_KERNELS("avx512");
}  // namespace bitspike
