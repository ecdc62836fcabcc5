#include "calc/functions.h"

#include <stdexcept>

#include "calc/primes.h"

namespace calc {

long Gcd(long a, long b) { return b == 0 ? (a < 0 ? -a : a) : Gcd(b, a % b); }

long Prime(long n) {
  if (n < 1 || n > kPrimeCount) throw std::out_of_range("no such prime in the table");
  return kPrimes[n - 1];
}

}  // namespace calc
