#include "calc/functions.h"

#include "calc/check.h"

int main() {
  CHECK(calc::Gcd(12, 18) == 6);
  CHECK(calc::Prime(1) == 2);
  CHECK(calc::Prime(1229) == 9973);
}
