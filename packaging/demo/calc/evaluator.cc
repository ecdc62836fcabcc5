#include "calc/evaluator.h"

#include <functional>
#include <map>
#include <stdexcept>

#include "calc/functions.h"
#include "calc/parser.h"

namespace calc {
namespace {

double Value(const Node& node) {
  if (node.is_number) return std::stod(node.text);
  auto argument = [&](size_t i) {
    if (i >= node.arguments.size()) throw std::runtime_error(node.text + " lacks an argument");
    return Value(*node.arguments[i]);
  };
  static const std::map<std::string, std::function<double(double, double)>> kBinary = {
      {"+", [](double a, double b) { return a + b; }},
      {"-", [](double a, double b) { return a - b; }},
      {"*", [](double a, double b) { return a * b; }},
      {"/", [](double a, double b) { return a / b; }},
      {"gcd", [](double a, double b) { return static_cast<double>(Gcd(a, b)); }},
  };
  if (node.text == "prime") return Prime(argument(0));
  auto found = kBinary.find(node.text);
  if (found == kBinary.end()) throw std::runtime_error("no function " + node.text);
  return found->second(argument(0), argument(1));
}

}  // namespace

double Evaluate(const std::string& text) { return Value(*Parse(text)); }

}  // namespace calc
