// Products by cuBLASLt, with bias and relu in its epilogue.
//
// cuBLASLt counts in columns. A row-major matrix read by columns is its transpose, so what is asked
// for is out' (n, m) = b' (n, k) @ a' (k, m): nothing is copied or transposed, and its bias, one
// value for each row of out', is ours.
//
// Which algorithm computes a problem is looked up once and kept (Plan). There relu raises a
// question: a maximum that takes the number for the larger of a number and NaN turns NaN into 0,
// and whether an algorithm's epilogue does is documented nowhere. So each is asked: it multiplies
// the problem at hand by alpha = NaN, and unless all that comes out is NaN, its relu is left to
// a kernel of ours. That takes one more product and a wait for the device, once for an algorithm;
// while a graph is captured nothing can be waited for, and algorithms that were not asked before
// do not get the relu.
#include "gemm.h"

#include <ATen/Context.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/cuda/CUDAEvent.h>
#include <ATen/Dispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/isnan.h>
#include <ATen/ops/mm.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>
#include <cublasLt.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <limits>
#include <map>
#include <mutex>
#include <string_view>
#include <vector>

#include "kernels.h"

namespace mylayers::cuda {
namespace {

// Plans that are kept; at the next they are all looked up anew.
constexpr size_t kMostPlans = 4096;
// Algorithms that autotuning tries, with relu in the epilogue and without, and how often.
constexpr int kTried = 8, kRepeats = 5;

void check(cublasStatus_t status, const char* call) {
  TORCH_CHECK(
      status == CUBLAS_STATUS_SUCCESS, "linear_act: ", call,
      " failed: ", cublasLtGetStatusString(status));
}
#define CHECK_LT(call) check(call, #call)

bool is_capturing() {
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

// Whether to race algorithms at the first call of each problem: MYLAYERS_CUDA_AUTOTUNE=1.
bool wants_tuning() {
  static const bool wanted = [] {
    const char* value = std::getenv("MYLAYERS_CUDA_AUTOTUNE");
    return value != nullptr && std::string_view(value) == "1";
  }();
  return wanted;
}

cudaDataType_t data_type(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return CUDA_R_32F;
    case at::kDouble:
      return CUDA_R_64F;
    case at::kHalf:
      return CUDA_R_16F;
    case at::kBFloat16:
      return CUDA_R_16BF;
    default:
      TORCH_INTERNAL_ASSERT(false, "no CUDA kernel for ", dtype);
  }
}

// Up to 256 bytes, the most that cuBLASLt asks about.
uint32_t alignment(const void* p) {
  const auto address = reinterpret_cast<uintptr_t>(p) | 256;
  return static_cast<uint32_t>(address & (~address + 1));
}

// A matrix of more than one row and column as cuBLASLt takes it: one stride is 1, the other (ld)
// long enough that rows or columns do not overlap. A copy where strides are others.
struct Operand {
  at::Tensor owner;
  bool by_columns;
  int64_t ld;

  explicit Operand(const at::Tensor& t) : owner(t), by_columns(false), ld(t.stride(0)) {
    if (t.stride(1) == 1 && t.stride(0) >= t.size(1)) {
      return;
    }
    if (t.stride(0) == 1 && t.stride(1) >= t.size(0)) {
      by_columns = true;
      ld = t.stride(1);
      return;
    }
    owner = t.contiguous();
    ld = t.size(1);
  }

  const void* data() const { return owner.const_data_ptr(); }
};

// How a problem is computed; there is a problem that is not, and left to ATen.
struct Plan {
  bool supported = false;
  bool relu = false;  // in the epilogue
  cublasLtMatmulAlgo_t algorithm{};
  size_t workspace = 0;
};

// One problem: its descriptors, as they are for these pointers.
class Problem {
 public:
  Problem(
      const at::Tensor& a, const at::Tensor& b, const at::Tensor& bias, bool relu,
      const at::Tensor& out)
      : a_(a),
        b_(b),
        out_(out),
        bias_(bias.defined() ? bias.const_data_ptr() : nullptr),
        m_(out.size(0)),
        n_(out.size(1)),
        k_(a.size(1)),
        relu_(relu) {
    const auto dtype = a.scalar_type();
    is_double_ = dtype == at::kDouble;
    operand_ = data_type(dtype);
    result_ = data_type(out.scalar_type());
    const bool tf32 = dtype == at::kFloat && at::globalContext().float32Precision(
                                                 at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
                                                 at::Float32Precision::TF32;
    compute_ = is_double_ ? CUBLAS_COMPUTE_64F
               : tf32     ? CUBLAS_COMPUTE_32F_FAST_TF32
                          : CUBLAS_COMPUTE_32F;
    // What is contiguous by rows is, read by columns, what cuBLASLt calls not transposed.
    const auto layout = [](cublasLtMatrixLayoutOpaque_t& made, cudaDataType_t type, int64_t rows,
                           int64_t cols, bool by_columns, int64_t ld) {
      CHECK_LT(cublasLtMatrixLayoutInit(
          &made, type, by_columns ? rows : cols, by_columns ? cols : rows, ld));
    };
    layout(layout_a_, operand_, m_, k_, a_.by_columns, a_.ld);
    layout(layout_b_, operand_, k_, n_, b_.by_columns, b_.ld);
    layout(layout_out_, result_, m_, n_, false, n_);
    workspace_limit_ = at::cuda::getCUDABlasLtWorkspaceSize();
  }

  // Everything that decides the choice of a plan.
  using Key = std::array<int64_t, 18>;
  Key key() const {
    return {
        out_.get_device(),
        operand_,
        result_,
        compute_,
        m_,
        n_,
        k_,
        a_.by_columns,
        a_.ld,
        b_.by_columns,
        b_.ld,
        alignment(a_.data()),
        alignment(b_.data()),
        alignment(out_.const_data_ptr()),
        bias_ != nullptr,
        relu_,
        static_cast<int64_t>(workspace_limit_),
        at::globalContext().deterministicAlgorithms()};
  }

  Plan plan();
  // False if cuBLASLt declines after all.
  bool run(const Plan& plan, double alpha = 1);

 private:
  using Operation = cublasLtMatmulDescOpaque_t;

  Operation operation(bool relu) const {
    Operation op;
    CHECK_LT(cublasLtMatmulDescInit(&op, compute_, is_double_ ? CUDA_R_64F : CUDA_R_32F));
    const auto set = [&](cublasLtMatmulDescAttributes_t attribute, const auto& value) {
      CHECK_LT(cublasLtMatmulDescSetAttribute(&op, attribute, &value, sizeof(value)));
    };
    set(CUBLASLT_MATMUL_DESC_TRANSA, b_.by_columns ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(CUBLASLT_MATMUL_DESC_TRANSB, a_.by_columns ? CUBLAS_OP_T : CUBLAS_OP_N);
    const bool bias = bias_ != nullptr;
    set(CUBLASLT_MATMUL_DESC_EPILOGUE,
        relu   ? (bias ? CUBLASLT_EPILOGUE_RELU_BIAS : CUBLASLT_EPILOGUE_RELU)
        : bias ? CUBLASLT_EPILOGUE_BIAS
               : CUBLASLT_EPILOGUE_DEFAULT);
    if (bias) {
      set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias_);
      set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, operand_);
    }
    return op;
  }

  std::vector<Plan> candidates(bool relu, int most);
  bool keeps_nan(const Plan& plan);
  float milliseconds(const Plan& plan);

  Operand a_, b_;
  at::Tensor out_;
  const void* bias_;
  int64_t m_, n_, k_;
  bool relu_, is_double_;
  cudaDataType_t operand_, result_;
  cublasComputeType_t compute_;
  cublasLtMatrixLayoutOpaque_t layout_a_, layout_b_, layout_out_;
  size_t workspace_limit_;
};

// What cuBLASLt's heuristics propose, the best first.
std::vector<Plan> Problem::candidates(bool relu, int most) {
  cublasLtMatmulPreferenceOpaque_t preference;
  CHECK_LT(cublasLtMatmulPreferenceInit(&preference));
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    CHECK_LT(cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof(value)));
  };
  set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(workspace_limit_));
  // Never a sum of parts that were rounded to 16 bits.
  const bool is_narrow = operand_ == CUDA_R_16F || operand_ == CUDA_R_16BF;
  set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
      static_cast<uint32_t>(
          is_narrow ? CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE : CUBLASLT_REDUCTION_SCHEME_MASK));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment(b_.data()));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(a_.data()));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment(out_.const_data_ptr()));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment(out_.const_data_ptr()));

  Operation op = operation(relu);
  std::vector<cublasLtMatmulHeuristicResult_t> found(most);
  int count = 0;
  const auto status = cublasLtMatmulAlgoGetHeuristic(
      at::cuda::getCurrentCUDABlasLtHandle(), &op, &layout_b_, &layout_a_, &layout_out_,
      &layout_out_, &preference, most, found.data(), &count);
  std::vector<Plan> plans;
  for (int i = 0; status == CUBLAS_STATUS_SUCCESS && i < count; ++i) {
    if (found[i].state == CUBLAS_STATUS_SUCCESS) {
      plans.push_back({true, relu, found[i].algo, found[i].workspaceSize});
    }
  }
  return plans;
}

bool Problem::run(const Plan& plan, double alpha) {
  Operation op = operation(plan.relu);
  const double wide[] = {alpha, 0};
  const float narrow[] = {static_cast<float>(alpha), 0};
  const auto factor = [&](int i) {
    return is_double_ ? static_cast<const void*>(wide + i) : static_cast<const void*>(narrow + i);
  };
  c10::DataPtr workspace;
  if (plan.workspace > 0) {
    workspace = c10::cuda::CUDACachingAllocator::get()->allocate(plan.workspace);
  }
  void* result = out_.mutable_data_ptr();
  return cublasLtMatmul(
             at::cuda::getCurrentCUDABlasLtHandle(), &op, factor(0), b_.data(), &layout_b_,
             a_.data(), &layout_a_, factor(1), result, &layout_out_, result, &layout_out_,
             &plan.algorithm, workspace.get(), plan.workspace,
             c10::cuda::getCurrentCUDAStream()) == CUBLAS_STATUS_SUCCESS;
}

std::mutex mutex;  // of both maps
std::map<Problem::Key, Plan> plans;

// Whether NaN passes through the relu of an algorithm's epilogue: the device, the types, the
// epilogue and the algorithm, and the answer.
using Asked = std::array<uint64_t, 5 + sizeof(cublasLtMatmulAlgo_t) / sizeof(uint64_t)>;
std::map<Asked, bool> answers;

bool Problem::keeps_nan(const Plan& plan) {
  Asked asked{
      static_cast<uint64_t>(out_.get_device()), static_cast<uint64_t>(operand_),
      static_cast<uint64_t>(result_), static_cast<uint64_t>(compute_), bias_ != nullptr};
  std::copy(
      std::begin(plan.algorithm.data), std::end(plan.algorithm.data),
      asked.end() - std::size(plan.algorithm.data));
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (const auto known = answers.find(asked); known != answers.end()) {
      return known->second;
    }
  }
  if (is_capturing()) {
    return false;
  }
  const bool answer =
      run(plan, std::numeric_limits<double>::quiet_NaN()) && at::isnan(out_).all().item<bool>();
  const std::lock_guard<std::mutex> lock(mutex);
  if (answers.size() >= kMostPlans) {
    answers.clear();
  }
  answers.emplace(asked, answer);
  return answer;
}

// out = relu(out), for a product whose epilogue has none.
void relu_in_place(const at::Tensor& out) {
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, out.scalar_type(), "linear_act_cuda", [&] {
        auto* y = static_cast<scalar_t*>(out.mutable_data_ptr());
        bias_act<scalar_t, scalar_t>(
            out.size(0), out.size(1), y, nullptr, Activation::kRelu, y,
            c10::cuda::getCurrentCUDAStream());
      });
}

float Problem::milliseconds(const Plan& plan) {
  at::cuda::CUDAEvent start(cudaEventDefault), end(cudaEventDefault);
  for (int i = -1; i < kRepeats; ++i) {
    if (i == 0) {  // after one to warm up
      start.record();
    }
    if (!run(plan)) {
      return std::numeric_limits<float>::infinity();
    }
    if (relu_ && !plan.relu) {
      relu_in_place(out_);
    }
  }
  end.record();
  end.synchronize();
  return start.elapsed_time(end);
}

Plan Problem::plan() {
  const Key wanted = key();
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (const auto known = plans.find(wanted); known != plans.end()) {
      return known->second;
    }
  }
  const bool capturing = is_capturing();
  const bool tunes = wants_tuning() && !capturing && !at::globalContext().deterministicAlgorithms();
  const int most = tunes ? kTried : 1;
  std::vector<Plan> found;
  if (relu_) {
    found = candidates(true, most);
    std::erase_if(found, [&](const Plan& plan) { return !keeps_nan(plan); });
  }
  if (tunes || found.empty()) {
    const auto others = candidates(false, most);
    found.insert(found.end(), others.begin(), others.end());
  }
  if (found.empty()) {
    found.emplace_back();
  }
  Plan best = found.front();
  if (tunes && found.size() > 1) {
    std::vector<float> times;
    for (const Plan& plan : found) {
      times.push_back(milliseconds(plan));
    }
    best = found[std::min_element(times.begin(), times.end()) - times.begin()];
  }
  if (capturing) {  // neither asked nor tuned: not for the calls after it
    return best;
  }
  const std::lock_guard<std::mutex> lock(mutex);
  if (plans.size() >= kMostPlans) {
    plans.clear();
  }
  return plans.emplace(wanted, best).first->second;
}

// The values where an epilogue may read them in vectors of 16 bytes: cuBLASLt's heuristics are told
// how all matrices are aligned, but have no such preference for the bias.
at::Tensor aligned(const at::Tensor& bias) {
  constexpr uint32_t kVectorBytes = 16;
  return alignment(bias.const_data_ptr()) % kVectorBytes == 0 && bias.is_contiguous()
             ? bias
             : bias.clone(at::MemoryFormat::Contiguous);
}

// Whether cuBLASLt has computed out, and relu with it or not.
bool lt_gemm(
    const at::Tensor& a, const at::Tensor& b, const at::Tensor& bias, bool relu,
    const at::Tensor& out) {
  Problem problem(a, b, bias, relu, out);
  const Plan plan = problem.plan();
  if (!plan.supported || !problem.run(plan)) {
    return false;
  }
  if (relu && !plan.relu) {
    relu_in_place(out);
  }
  return true;
}

}  // namespace

void gemm(
    const at::Tensor& a, const at::Tensor& b, const at::Tensor& bias, bool relu,
    const at::Tensor& out) {
  const int64_t m = out.size(0), n = out.size(1), k = a.size(1);
  if (m == 0 || n == 0) {
    return;
  }
  const at::Tensor bias_values = bias.defined() ? aligned(bias) : bias;
  if (m > 1 && n > 1 && k > 1 && lt_gemm(a, b, bias_values, relu, out)) {
    return;
  }
  at::Tensor result = out;
  if (k == 0) {
    bias.defined() ? result.copy_(bias.expand_as(out)) : result.zero_();
  } else if (bias.defined()) {
    at::addmm_out(result, bias_values, a, b);  // it may take the same epilogue
  } else {
    at::mm_out(result, a.to(out.scalar_type()), b.to(out.scalar_type()));
  }
  if (relu) {
    relu_in_place(out);
  }
}

}  // namespace mylayers::cuda
