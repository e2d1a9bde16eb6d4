// The room attention as Python sees it: sphinx_fast._C.attention.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "attention/math.h"
#include "attention/rows.h"
#include "common/borrow.h"
#include "common/dispatch.h"
#include "common/parallel.h"

namespace py = pybind11;

namespace sphinx::attention {
namespace {

void expect_dense_heads(const TensorView& view) {
  const int last = view.rank - 1;
  check(view.shape[last] <= 1 || view.strides[last] == 1, view.name,
        ": expected the last dimension without gaps, got stride ", view.strides[last]);
}

// [rows, heads, head_dim] like `on`; rows and heads of any stride.
Heads checked_heads(const TensorView& view, const TensorView& on, int64_t heads) {
  view.expect_dtype({on.dtype}).expect_shape({on.shape[0], heads, on.shape[2]}).expect_device_of(on);
  expect_dense_heads(view);
  return {view.data, view.strides[0], view.strides[1]};
}

// What is written to must not lie in itself: from the nearest elements outwards, every step leaves what is inside.
void expect_no_overlap(const TensorView& view) {
  std::vector<std::pair<int64_t, int64_t>> steps;  // stride and extent
  for (int d = 0; d < view.rank; ++d) {
    if (view.shape[d] > 1) steps.emplace_back(view.strides[d], view.shape[d]);
  }
  std::sort(steps.begin(), steps.end());
  int64_t inside = 1;
  for (const auto& [stride, extent] : steps) {
    check(stride >= inside || view.numel() == 0, view.name, ": expected elements that do not overlap, got stride ",
          stride, " over ", inside);
    inside = checked_add(checked_mul(extent - 1, stride, "stride"), inside, "stride");
  }
}

// Keys, values and lengths of a cache; they live as long as the call.
struct BorrowedCache {
  BorrowedCache(const py::object& key_object, const py::object& value_object, const py::object& lengths_object,
                const char* of)
      : name(of), key(key_object, of), value(value_object, of), lengths(lengths_object, of) {}

  Cache checked(const TensorView& query, int64_t kv_heads) const {
    check(bool(key) == bool(value), name, ": expected keys and values, or neither");
    check(key || !lengths, name, ": expected no lengths without keys and values");
    if (!key) return {};
    for (const TensorView* one : {&*key, &*value}) {
      one->expect_dtype({query.dtype}).expect_shape({kAny, kv_heads, kAny, query.shape[2]}).expect_device_of(query);
      expect_dense_heads(*one);
    }
    check(key->shape == value->shape, name, ": expected keys and values of one shape, got ", key->shape_text(), " and ",
          value->shape_text());
    lengths.expect(query, DType::i32, {key->shape[0]});
    return {key->data,
            value->data,
            key->shape[0],
            key->shape[2],
            key->strides[0],
            key->strides[1],
            key->strides[2],
            value->strides[0],
            value->strides[1],
            value->strides[2],
            static_cast<const int32_t*>(lengths.data())};
  }

  const char* name;
  Optional key, value, lengths;
};

void check_number(bool ok, const char* name, int64_t row, int64_t most, int64_t got) {
  check(ok, name, ": expected 0 to ", most, " for row ", row, ", got ", got);
}

// On the CPU every index and length is looked at before the first key is; a GPU's kernel looks itself.
void check_rows(const Args& args) {
  std::vector<bool> taken(args.key.data ? args.suffix.slots : 0);  // by another row's new token
  for (int64_t r = 0; r < args.rows; ++r) {
    const Row row = row_of(args, r);
    check(row.picture >= -1 && row.picture < args.prefix.slots, "pictures: expected -1 to ", args.prefix.slots - 1,
          " for row ", r, ", got ", row.picture);
    if (args.suffix.slots) {
      check_number(row.question >= 0 && row.question < args.suffix.slots, "questions", r, args.suffix.slots - 1,
                   row.question);
      check(!args.key.data || !taken[row.question], "questions: expected another slot for each row, got ", row.question,
            " for row ", r, " again");
      if (args.key.data) taken[row.question] = true;
    }
    if (row.valid) continue;
    const int64_t appended = args.key.data ? 1 : 0;
    check_number(row.prefix >= 0 && row.prefix <= args.prefix.capacity, "prefix lengths", r, args.prefix.capacity,
                 row.prefix);
    check_number(row.suffix >= appended && row.suffix <= args.suffix.capacity, "suffix lengths", r,
                 args.suffix.capacity - appended, row.suffix - appended);
    check_number(false, "positions", r, args.rope.positions - 1, row.position);
  }
}

void run_attention(const py::object& query_object, const py::object& prefix_key, const py::object& prefix_value,
                   const py::object& prefix_lengths, const py::object& suffix_key, const py::object& suffix_value,
                   const py::object& suffix_lengths, const py::object& key_object, const py::object& value_object,
                   const py::object& pictures_object, const py::object& questions_object,
                   const py::object& positions_object, const py::object& cos_object, const py::object& sin_object,
                   bool interleaved, const py::object& mask_object, double scale, const py::object& out_object,
                   const py::object& lse_object, const py::object& partial_object, const py::object& arrived_object,
                   const std::optional<std::string>& isa_name, int64_t thread_count) {
  const Isa isa = checked_isa(isa_name);
  const int threads = checked_threads(thread_count);
  const Borrow query_borrow(query_object.ptr(), "query");
  const TensorView& query = *query_borrow;
  check_backend(query);
  query.expect_dtype({DType::f32, DType::f16, DType::bf16}).expect_shape({kAny, kAny, kAny});
  const Optional key(key_object, "key"), value(value_object, "value");
  const Optional pictures(pictures_object, "pictures"), questions(questions_object, "questions");
  const Optional positions(positions_object, "positions"), mask(mask_object, "mask"), lse(lse_object, "lse");
  const Optional cos(cos_object, "rope cos"), sin(sin_object, "rope sin");
  const Borrow out(out_object.ptr(), "out");
  const BorrowedCache prefix(prefix_key, prefix_value, prefix_lengths, "prefix");
  const BorrowedCache suffix(suffix_key, suffix_value, suffix_lengths, "suffix");

  Args args{};
  args.rows = query.shape[0], args.heads = query.shape[1], args.head_dim = query.shape[2];
  check(args.head_dim >= 16 && args.head_dim <= kMostHeadDim && args.head_dim % 16 == 0,
        "query: expected a head_dim of 16 to ", kMostHeadDim, " in steps of 16, got ", args.head_dim);
  check(prefix.key || suffix.key, "prefix, suffix: expected at least one of them");
  const TensorView& cache = prefix.key ? *prefix.key : *suffix.key;
  cache.expect_shape({kAny, kAny, kAny, args.head_dim});
  args.kv_heads = cache.shape[1];
  check(args.kv_heads >= 1 && args.heads >= 1 && args.heads % args.kv_heads == 0 &&
            args.heads / args.kv_heads <= kMostQueries,
        "query: expected 1 to ", kMostQueries, " query heads for each of ", args.kv_heads, " key heads, got ",
        args.heads);
  args.prefix = prefix.checked(query, args.kv_heads);
  args.suffix = suffix.checked(query, args.kv_heads);
  args.query = checked_heads(query, query, args.heads);
  args.out = checked_heads(*out, query, args.heads);
  expect_no_overlap(*out);

  check(bool(key) == bool(value), "key, value: expected both or neither");
  if (key) {
    check(bool(suffix.key), "key: expected a suffix to append to");
    check(bool(suffix.lengths), "suffix: expected lengths where a key is appended");
    args.key = checked_heads(*key, query, args.kv_heads);
    args.value = checked_heads(*value, query, args.kv_heads);
    expect_no_overlap(*suffix.key);
    expect_no_overlap(*suffix.value);
  }
  check(pictures || !prefix.key || args.rows <= args.prefix.slots, "prefix: expected a slot for each of ", args.rows,
        " rows without pictures, got ", args.prefix.slots);
  check(questions || !suffix.key || args.rows <= args.suffix.slots, "suffix: expected a slot for each of ", args.rows,
        " rows without questions, got ", args.suffix.slots);
  check(!prefix.key || args.prefix.slots > 0 || args.rows == 0, "pictures: expected a prefix, got one without slots");
  check(!suffix.key || args.suffix.slots > 0 || args.rows == 0, "questions: expected a suffix, got one without slots");
  for (const Optional* one : {&pictures, &questions, &positions}) one->expect(query, DType::i32, {args.rows});
  args.pictures = static_cast<const int32_t*>(pictures.data());
  args.questions = static_cast<const int32_t*>(questions.data());
  args.positions = static_cast<const int32_t*>(positions.data());

  check(bool(cos) == bool(sin), "rope: expected cos and sin");
  if (cos) {
    cos->expect_shape({kAny, kAny});
    const int64_t half = cos->shape[1];
    check(half >= 1 && 2 * half <= args.head_dim, "rope cos: expected 1 to ", args.head_dim / 2, " angles, got ", half);
    for (const Optional* one : {&cos, &sin}) one->expect(query, DType::f32, {cos->shape[0], half});
    check(cos->shape[0] >= 1, "positions: expected a rope of at least one, got an empty table");
    args.rope = {static_cast<const float*>(cos.data()), static_cast<const float*>(sin.data()), cos->shape[0], half,
                 interleaved};
  }
  if (mask) {
    check(bool(prefix.key), "mask: expected a prefix to mask");
    mask->expect_dtype({DType::u8}).expect_shape({args.rows, args.prefix.capacity}).expect_device_of(query);
    check(args.prefix.capacity <= 1 || mask->strides[1] == 1, "mask: expected rows without gaps");
    args.mask = mask->as<uint8_t>();
    args.mask_step = mask->strides[0];
  }
  lse.expect(query, DType::f32, {args.rows, args.heads});
  args.lse = static_cast<float*>(lse.data());
  args.scale = static_cast<float>(scale);
  args.dtype = query.dtype;
  if (args.rows == 0) return;
  if (query.device == DeviceKind::cpu) {
    check_rows(args);
    const py::gil_scoped_release released;
    return run_cpu(args, isa, threads);
  }
#ifdef SPHINX_WITH_CUDA
  const Optional partial(partial_object, "workspace partial"), arrived(arrived_object, "workspace arrived");
  check(partial && arrived, "workspace: expected one on a GPU");
  for (const Optional* one : {&partial, &arrived}) (*one)->expect_contiguous().expect_device_of(query);
  partial->expect_dtype({DType::f32});
  arrived->expect_dtype({DType::i32});
  check(partial->numel() >= partial_floats(args) && arrived->numel() >= args.rows * args.kv_heads,
        "workspace: expected at least ", partial_floats(args), " floats and ", args.rows * args.kv_heads,
        " counters, got ", partial->numel(), " and ", arrived->numel());
  const py::gil_scoped_release released;
  run_cuda(args, partial->as<float>(), arrived->as<int32_t>(), query.device_id, query.stream);
#endif
}

}  // namespace

void bind(py::module_& module) {
  module.def("attention", &run_attention, py::arg("query"), py::kw_only(), py::arg("prefix_key"),
             py::arg("prefix_value"), py::arg("prefix_lengths"), py::arg("suffix_key"), py::arg("suffix_value"),
             py::arg("suffix_lengths"), py::arg("key"), py::arg("value"), py::arg("pictures"), py::arg("questions"),
             py::arg("positions"), py::arg("cos"), py::arg("sin"), py::arg("interleaved"), py::arg("mask"),
             py::arg("scale"), py::arg("out"), py::arg("lse"), py::arg("partial"), py::arg("arrived"), py::arg("isa"),
             py::arg("threads"));
#ifdef SPHINX_WITH_CUDA
  module.def(
      "attention_partial_floats",
      [](int64_t rows, int64_t heads, int64_t head_dim, int64_t prefix_capacity, int64_t suffix_capacity) {
        Args args{};
        args.rows = rows, args.heads = heads, args.head_dim = head_dim;
        args.prefix.capacity = prefix_capacity, args.suffix.capacity = suffix_capacity;
        return partial_floats(args);
      },
      py::arg("rows"), py::arg("heads"), py::arg("head_dim"), py::arg("prefix_capacity"), py::arg("suffix_capacity"));
#endif
}

}  // namespace sphinx::attention
