#include "calc/parser.h"

#include <exception>

#include "calc/check.h"

int main() {
  CHECK(calc::ToString(*calc::Parse("1+2*3")) == "(+ 1 (* 2 3))");
  CHECK(calc::ToString(*calc::Parse("(1+2)*3")) == "(* (+ 1 2) 3)");
  bool refused = false;
  try {
    calc::Parse("1+");
  } catch (const std::exception&) {
    refused = true;
  }
  CHECK(refused);
}
