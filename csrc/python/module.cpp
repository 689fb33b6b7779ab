// The Python module mylayers._C: the entries of this folder, and facts about this build. Nothing
// outside the folder includes Python headers; a program without Python links the rest.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../cpu/gemm/plan.h"
#include "../cpu/gemm_aten.h"
#include "../cpu/huge_pages.h"
#include "../cpu/machine/tuning.h"
#include "chain.h"
#include "entries.h"
#include "forwards.h"
#include "frozen.h"
#include "optimizers.h"

namespace mylayers::python {
namespace {

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  return std::string("g++ ") + __VERSION__;
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::dict info;
  info["torch"] = MYLAYERS_TORCH_VERSION;
  info["compiler"] = compiler();
  info["cplusplus"] = static_cast<int64_t>(__cplusplus);
#if defined(__x86_64__)
  info["instruction_sets"] = py::make_tuple("generic", "avx2", "avx512");
#elif defined(__aarch64__)
  info["instruction_sets"] = py::make_tuple("neon");
#else
  info["instruction_sets"] = py::make_tuple("generic");
#endif
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#if defined(MYLAYERS_CUDA_VERSION)
  info["cuda"] = MYLAYERS_CUDA_VERSION;
#else
  info["cuda"] = py::none();
#endif
  info["cuda_detail"] = MYLAYERS_CUDA_DETAIL;
  info["kernels"] = cpu::kernels().name;
  const cpu::Tuning& machine = cpu::machine();
  info["tuned_for"] = machine.measured ? py::cast(machine.name) : py::none();
  info["products"] = cpu::has_aten_products() ? "torch" : "own";
  info["amx"] = machine.bf16 == cpu::Bf16Units::kAmx;
  info["bfloat16_units"] = machine.bf16 != cpu::Bf16Units::kNone;
  info["huge_pages"] = cpu::wants_huge_pages();
  return info;
}

py::dict task_plan(const cpu::TaskPlan& task) {
  py::dict told;
  told["path"] = cpu::path_name(task.path);
  told["kc"] = task.kc;
  told["copies_a"] = task.copies_a;
  told["packs_b"] = task.packs_b;
  told["keeps_a"] = task.keeps_a;
  told["keeps_b"] = task.keeps_b;
  return told;
}

py::tuple machines() {
  py::list names;
  for (const auto& row : cpu::tunings()) {
    names.append(row.name);
  }
  return py::tuple(names);
}

// The plan of a product on a row of the table; None: this machine, as it was found.
py::dict product_plan(
    int64_t m, int64_t n, int64_t k, const std::string& dtype, std::pair<int64_t, int64_t> a,
    std::pair<int64_t, int64_t> b, bool rounds, int64_t working_set_bytes, int64_t threads,
    const std::optional<std::string>& machine) {
  using namespace mylayers::cpu;
  const std::vector<std::string> dtypes = {"float32", "float64", "float16", "bfloat16"};
  const auto type = std::find(dtypes.begin(), dtypes.end(), dtype);
  const Tuning* row = machine ? find_tuning(*machine) : &cpu::machine();
  if (type == dtypes.end()) {
    throw py::value_error("plan: dtype must be one of those with a CPU kernel; got " + dtype);
  }
  if (row == nullptr) {
    throw py::value_error("plan: machine must be one of machines(); got '" + *machine + "'");
  }
  if (m <= 0 || n <= 0 || k < 0 || threads <= 0) {
    throw py::value_error(
        "plan: sizes and threads must be positive; got " + std::to_string(m) + "x" +
        std::to_string(k) + "x" + std::to_string(n) + " on " + std::to_string(threads));
  }
  ProductShape shape = {m,
                        n,
                        k,
                        {a.first, a.second},
                        {b.first, b.second},
                        static_cast<ValueType>(type - dtypes.begin())};
  shape.rounds = rounds && shape.type == ValueType::kFloat32 && may_round(n, k, *row);
  const auto chosen = cpu::plan(shape, working_set_bytes, threads, *row);
  py::dict told;
  told["machine"] = row->name;
  told["rounds"] = shape.rounds;
  told["memory"] = chosen.residency != Residency::kCache;
  told["threads"] = chosen.threads;
  told["rows"] = chosen.rows;
  told["columns"] = chosen.cols;
  told["row_blocks"] = chosen.row_blocks;
  told["column_blocks"] = chosen.col_blocks;
  told["task"] = task_plan(chosen.task(0, 0));
  told["last_task"] = task_plan(chosen.tasks[1][1]);
  return told;
}

}  // namespace
}  // namespace mylayers::python

PYBIND11_MODULE(_C, m) {
  using namespace mylayers::python;
  mylayers::cpu::has_aten_products();  // throws where the environment makes no sense
  m.doc() = "Compiled half of mylayers; use mylayers.functional and mylayers.MyLinear.";
  add_operators(m);
  add_chain(m);
  add_forwards(m);
  add_frozen(m);
  add_optimizers(m);
  m.def("build_info", build_info);
  m.def("machines", machines);
  m.def("plan", product_plan);
}
