#pragma once
#include <memory>
#include <string>
#include <vector>

namespace calc {

struct Node {
  // A number, or the name of an operator or function.
  std::string text;
  bool is_number = false;
  std::vector<std::unique_ptr<Node>> arguments;
};

// Throws std::runtime_error when the text is no expression.
std::unique_ptr<Node> Parse(const std::string& text);

// In prefix form, such as "(+ 1 (* 2 3))".
std::string ToString(const Node& node);

}  // namespace calc
