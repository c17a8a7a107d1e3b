#include "train_body.h"

namespace bitspike {
const TrainKernels train_base = BITSPIKE_TRAIN_KERNELS("base");
}  // namespace bitspike
