#include "calc/lexer.h"

#include <cctype>
#include <stdexcept>

namespace calc {

std::vector<Token> Lex(const std::string& text) {
  std::vector<Token> tokens;
  size_t i = 0;
  auto take_while = [&](auto accept) {
    size_t start = i;
    while (i < text.size() && accept(static_cast<unsigned char>(text[i]))) ++i;
    return text.substr(start, i - start);
  };
  while (i < text.size()) {
    unsigned char c = text[i];
    if (std::isspace(c)) {
      ++i;
    } else if (std::isdigit(c)) {
      tokens.push_back({Token::kNumber, take_while([](unsigned char d) {
                          return std::isdigit(d) || d == '.';
                        })});
    } else if (std::isalpha(c)) {
      tokens.push_back(
          {Token::kName, take_while([](unsigned char d) { return std::isalnum(d) != 0; })});
    } else if (std::string("+-*/(),").find(c) != std::string::npos) {
      tokens.push_back({Token::kOperator, std::string(1, text[i++])});
    } else {
      throw std::runtime_error("unexpected character at " + std::to_string(i));
    }
  }
  tokens.push_back({Token::kEnd, ""});
  return tokens;
}

}  // namespace calc
