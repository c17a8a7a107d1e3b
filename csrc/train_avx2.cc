#include "train_body.h"

namespace bitspike {
const TrainKernels train_avx2 = BITSPIKE_TRAIN_KERNELS("avx2");
}  // namespace bitspike
