#pragma once

// What the stand-in for libcuda offers besides the driver's own entry points. Tests find these by
// dlsym, since the library is opened, not linked.
extern "C" {

/// Forgets the calls so far, and the failure that was asked for.
using FakeDriverReset = void();
/// The calls since the reset, each followed by a newline, without those for versions and errors.
using FakeDriverCalls = const char*();
/// Makes the next call of `symbol` return `result`.
using FakeDriverFail = void(const char* symbol, int result);
/// How many contexts, modules and buffers are held.
using FakeDriverHeld = int();
/// How many devices there are; 1 after a reset.
using FakeDriverDevices = void(int count);

}  // extern "C"
