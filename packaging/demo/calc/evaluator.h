#pragma once
#include <string>

namespace calc {

// Throws std::exception when the text is no expression, or has no value.
double Evaluate(const std::string& text);

}  // namespace calc
