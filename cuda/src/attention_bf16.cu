#include "attention_body.cuh"

#define PIPELIVE_TYPE BFloat16
#define PIPELIVE_TYPE_NAME bf16
#include "attention_tensor.inl"
