#include "calc/evaluator.h"

#include "calc/check.h"

int main() {
  CHECK(calc::Evaluate("1 + 2 * 3") == 7);
  CHECK(calc::Evaluate("gcd(12, 18) / 4") == 1.5);
  CHECK(calc::Evaluate("prime(10) - 9") == 20);
}
