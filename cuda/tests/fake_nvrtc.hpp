#pragma once

// A stand-in for libnvrtc, opened by dlopen as the real one is. It compiles nothing: the image that
// it gives names the source and the options. It does check what the real one would need: that every
// header which a source includes, itself or through another, was handed over, and that the library
// it compiles with is open (libnvrtc-builtins.so, of its own version; those of 12.9 and 1.0 lie
// beside it). What stands between #if and #endif is for other compilers and not followed.
//
// What it offers besides NVRTC's own entry points; tests find these by dlsym.
extern "C" {

/// Forgets what was compiled; version 12.9 again, for compute capabilities 8.0, 9.0 and 10.0.
using FakeNvrtcReset = void();
/// What nvrtcVersion gives.
using FakeNvrtcVersion = void(int major, int minor);
/// What was compiled since the reset, a line each: the source's name and the options.
using FakeNvrtcCompiled = const char*();
/// Makes the next compilation fail with that text in its log.
using FakeNvrtcFail = void(const char* log);
/// How many programs are held.
using FakeNvrtcHeld = int();

}  // extern "C"
