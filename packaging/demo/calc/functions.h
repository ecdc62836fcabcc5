#pragma once

namespace calc {

long Gcd(long a, long b);

// The n-th prime number, from 1; throws std::out_of_range beyond the table.
long Prime(long n);

}  // namespace calc
