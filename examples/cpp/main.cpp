// Runs an exported network without Python: run_network NETWORK.pt2 < rows > results
//
// A row is a line of numbers, the network's inputs; its result is printed as one. All rows are
// one batch.
#include <ATen/ops/tensor.h>
#include <c10/util/Exception.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <iostream>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

namespace {

at::Tensor read_rows(std::istream& in) {
  std::vector<float> values;
  int64_t rows = 0, columns = 0;
  for (std::string line; std::getline(in, line);) {
    std::istringstream numbers(line);
    const auto before = static_cast<int64_t>(values.size());
    for (float value; numbers >> value;) {
      values.push_back(value);
    }
    const auto count = static_cast<int64_t>(values.size()) - before;
    columns = rows == 0 ? count : columns;
    ++rows;
    TORCH_CHECK(numbers.eof(), "line ", rows, " is not a line of numbers: ", line);
    TORCH_CHECK(
        count == columns, "line ", rows, " has ", count, " numbers; the first has ", columns);
  }
  return at::tensor(values).view({rows, columns});
}

void print_rows(const at::Tensor& output) {
  const auto values = output.accessor<float, 2>();
  std::cout.precision(std::numeric_limits<float>::max_digits10);
  for (int64_t i = 0; i < output.size(0); ++i) {
    for (int64_t j = 0; j < output.size(1); ++j) {
      std::cout << (j ? " " : "") << values[i][j];
    }
    std::cout << '\n';
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: " << argv[0] << " NETWORK.pt2 < rows > results\n";
    return 2;
  }
  try {
    const c10::InferenceMode no_gradients;
    torch::inductor::AOTIModelPackageLoader network(argv[1]);
    print_rows(network.run({read_rows(std::cin)}).at(0));
  } catch (const std::exception& error) {
    const std::string text = error.what();  // libtorch's goes on with a backtrace
    std::cerr << argv[0] << ": " << text.substr(0, text.find('\n')) << '\n';
    return 1;
  }
}
