// Prints a header with all prime numbers up to a limit.
#include <cstdio>
#include <cstdlib>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s LIMIT\n", argv[0]);
    return 2;
  }
  int limit = std::atoi(argv[1]);
  std::vector<bool> composite(limit + 1);
  int count = 0;
  std::printf("#pragma once\nstatic const long kPrimes[] = {");
  for (int i = 2; i <= limit; ++i) {
    if (composite[i]) continue;
    std::printf("%d,", i);
    ++count;
    for (int j = 2 * i; j <= limit; j += i) composite[j] = true;
  }
  std::printf("};\nstatic const long kPrimeCount = %d;\n", count);
}
