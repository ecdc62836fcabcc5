#pragma once
#include <string>
#include <vector>

namespace calc {

struct Token {
  enum Kind { kNumber, kName, kOperator, kEnd } kind;
  std::string text;
};

// Throws std::runtime_error at the first character that starts no token.
std::vector<Token> Lex(const std::string& text);

}  // namespace calc
