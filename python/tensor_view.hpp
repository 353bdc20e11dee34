#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "dlpack.hpp"
#include "pipelive/device/device.hpp"
#include "pipelive/kv/spec.hpp"

namespace pipelive::bindings {

/// The element types that cross the binding, in DLPack's terms.
namespace dtypes {
inline constexpr dlpack::DataType float32{dlpack::kFloat, 32, 1};
inline constexpr dlpack::DataType float16{dlpack::kFloat, 16, 1};
inline constexpr dlpack::DataType bfloat16{dlpack::kBfloat, 16, 1};
inline constexpr dlpack::DataType int64{dlpack::kInt, 64, 1};
inline constexpr dlpack::DataType int32{dlpack::kInt, 32, 1};
inline constexpr dlpack::DataType uint64{dlpack::kUInt, 64, 1};
inline constexpr dlpack::DataType uint16{dlpack::kUInt, 16, 1};
inline constexpr dlpack::DataType uint8{dlpack::kUInt, 8, 1};
}  // namespace dtypes

/// "bfloat16", "int64", ...
[[nodiscard]] std::string name_of(dlpack::DataType dtype);
/// The inverse of name_of; throws Error(invalid_argument) naming the value and `argument`.
[[nodiscard]] dlpack::DataType dtype_from_name(const std::string& name, const char* argument);
[[nodiscard]] dlpack::DataType to_dlpack(DType dtype);
/// The KV element type of that name; empty where it is none (integers, float64, ...).
[[nodiscard]] std::optional<DType> to_kv_dtype(dlpack::DataType dtype);

/// "[2, 3, 4]", for messages.
[[nodiscard]] std::string format_shape(std::span<const std::int64_t> shape);

/// A tensor borrowed from a Python object, without a copy: anything with `__dlpack__` (torch,
/// numpy, cupy, our own views), else anything with the buffer protocol (bytes, array, memoryview).
///
/// The object's memory stays alive as long as the TensorView does. Borrow with the GIL held;
/// reading the fields needs no GIL, so they may be used while it is released; the destructor takes
/// the GIL itself. Move-only. For memory of a CUDA device the producer makes `consumer`, the handle
/// of a stream as DLPack counts them, wait for what it has not finished; without one nothing is
/// ordered (which a stream under capture needs).
class TensorView {
 public:
  /// `argument` is the parameter's name, for the messages. Throws TypeError where the object lends
  /// no memory, Error(invalid_argument) where the tensor is of a kind that we do not read
  /// (vector lanes, bits that are no whole bytes, a later DLPack major version).
  [[nodiscard]] static TensorView borrow(pybind11::handle object, const char* argument,
                                         std::optional<std::intptr_t> consumer = std::nullopt);

  TensorView(TensorView&&) noexcept = default;
  TensorView& operator=(TensorView&&) noexcept = default;
  TensorView(const TensorView&) = delete;
  TensorView& operator=(const TensorView&) = delete;
  ~TensorView() = default;

  [[nodiscard]] const std::string& argument() const noexcept { return argument_; }
  [[nodiscard]] std::byte* data() const noexcept { return data_; }
  template <typename T>
  [[nodiscard]] T* data_as() const noexcept {
    return reinterpret_cast<T*>(data_);
  }
  [[nodiscard]] dlpack::Device device() const noexcept { return device_; }
  [[nodiscard]] bool on_cpu() const noexcept { return device_.type == dlpack::kCpu; }
  [[nodiscard]] dlpack::DataType dtype() const noexcept { return dtype_; }
  [[nodiscard]] std::size_t item_bytes() const noexcept { return dtype_.bits / 8u; }
  [[nodiscard]] bool read_only() const noexcept { return read_only_; }
  [[nodiscard]] std::size_t ndim() const noexcept { return shape_.size(); }
  [[nodiscard]] std::int64_t shape(std::size_t axis) const { return shape_.at(axis); }
  [[nodiscard]] const std::vector<std::int64_t>& shape() const noexcept { return shape_; }
  /// In elements, not bytes; always present.
  [[nodiscard]] std::int64_t stride(std::size_t axis) const { return strides_.at(axis); }
  [[nodiscard]] const std::vector<std::int64_t>& strides() const noexcept { return strides_; }
  [[nodiscard]] std::int64_t num_elements() const noexcept;
  [[nodiscard]] std::size_t num_bytes() const noexcept {
    return static_cast<std::size_t>(num_elements()) * item_bytes();
  }
  [[nodiscard]] bool contiguous() const noexcept;

  // Each of these throws Error(invalid_argument) naming the argument, what it is and what was
  // expected.
  void require_cpu() const;
  void require_dtype(dlpack::DataType dtype) const;
  void require_ndim(std::size_t ndim) const;
  /// Compares every axis; -1 in `shape` stands for any length.
  void require_shape(std::span<const std::int64_t> shape) const;
  void require_contiguous() const;
  void require_writable() const;

  /// A contiguous tensor on the CPU of that type, of any shape, as a span of T.
  template <typename T>
  [[nodiscard]] std::span<T> flat(dlpack::DataType dtype) const {
    require_cpu();
    require_dtype(dtype);
    require_contiguous();
    return {data_as<T>(), static_cast<std::size_t>(num_elements())};
  }

 private:
  TensorView() = default;
  void adopt(const dlpack::Tensor& tensor);
  void from_capsule(pybind11::object capsule);
  void from_buffer(pybind11::handle object);

  std::string argument_;
  std::byte* data_ = nullptr;
  dlpack::Device device_;
  dlpack::DataType dtype_;
  bool read_only_ = false;
  std::vector<std::int64_t> shape_;
  std::vector<std::int64_t> strides_;
  std::shared_ptr<void> owner_;
};

/// Memory of ours that Python may see as a tensor: what `__dlpack__` exports.
struct TensorExport {
  std::byte* data = nullptr;
  dlpack::Device device;
  dlpack::DataType dtype;
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> strides;  ///< in elements
  std::shared_ptr<void> owner;        ///< keeps the memory alive; dropped without the GIL needed
  /// Makes a stream of the consumer wait for work on the memory; empty where there is never any.
  std::function<void(Stream)> order_consumer;
};

/// "cpu", "cuda:1", ...
[[nodiscard]] std::string name_of(dlpack::Device device);

/// The body of a `__dlpack__(*, stream, max_version, dl_device, copy)` method: a versioned capsule
/// where `max_version` is at least (1, 0), else a legacy one. Memory of a CUDA device is safe to
/// use in `stream` afterwards (None: the default stream; -1: the caller orders). Throws BufferError
/// for a copy or another device that the caller asked for, since these exports never copy.
[[nodiscard]] pybind11::object export_dlpack(const TensorExport& tensor, pybind11::handle stream,
                                             pybind11::handle max_version,
                                             pybind11::handle dl_device, pybind11::handle copy);

/// The body of `__dlpack_device__`.
[[nodiscard]] pybind11::tuple dlpack_device(const TensorExport& tensor);

/// A numpy array over the same memory (CPU only), seen as `dtype` of the same item size; writable,
/// and keeps the owner alive. Throws Error(invalid_argument) for a dtype that numpy lacks.
[[nodiscard]] pybind11::object export_numpy(const TensorExport& tensor, dlpack::DataType dtype);

}  // namespace pipelive::bindings
