#include "calc/lexer.h"

#include "calc/check.h"

int main() {
  auto tokens = calc::Lex("1.5 + gcd(4, 6)");
  CHECK(tokens.size() == 9);
  CHECK(tokens[0].text == "1.5");
  CHECK(tokens[2].kind == calc::Token::kName);
  CHECK(tokens.back().kind == calc::Token::kEnd);
}
