// The text of a step in its parts (program.h has the grammar).
#pragma once

#include <c10/util/ArrayRef.h>
#include <c10/util/SmallVector.h>

#include <charconv>
#include <optional>
#include <string_view>

namespace mylayers {

using Texts = c10::SmallVector<std::string_view, 8>;

// "name(1,2)+a+b"
struct StepText {
  std::string_view head;  // "name(1,2)"
  std::string_view name;
  Texts arguments;
  Texts suffixes;

  bool has_arguments() const { return head != name; }
  bool is_bare() const { return !has_arguments() && suffixes.empty(); }
};

// Nothing if one of them is no number.
template <class Number>
std::optional<c10::SmallVector<Number, 2>> numbers_in(c10::ArrayRef<std::string_view> texts) {
  c10::SmallVector<Number, 2> numbers;
  for (const auto text : texts) {
    Number number = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    if (error != std::errc() || end != text.data() + text.size()) {
      return std::nullopt;
    }
    numbers.push_back(number);
  }
  return numbers;
}

}  // namespace mylayers
