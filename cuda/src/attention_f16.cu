#include "attention_body.cuh"

#define PIPELIVE_TYPE Float16
#define PIPELIVE_TYPE_NAME f16
#include "attention_tensor.inl"
