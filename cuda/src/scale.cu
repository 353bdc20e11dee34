// Multiplies in place; see scale.hpp. Any grid will do: threads stride over what is left.
extern "C" __global__ void pipelive_scale_f32(float* values, float factor,
                                              unsigned long long count) {
  const unsigned long long stride = static_cast<unsigned long long>(gridDim.x) * blockDim.x;
  for (unsigned long long i =
           static_cast<unsigned long long>(blockIdx.x) * blockDim.x + threadIdx.x;
       i < count; i += stride) {
    values[i] *= factor;
  }
}
