// What the stand-in for NVRTC wants to be open before it compiles: a library of that name, no more.
extern "C" __attribute__((visibility("default"))) int fake_nvrtc_builtins() {
  return 0;
}
