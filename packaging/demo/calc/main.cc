#include <exception>
#include <iostream>

#include "calc/evaluator.h"

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: " << argv[0] << " EXPRESSION\n";
    return 2;
  }
  try {
    std::cout << calc::Evaluate(argv[1]) << "\n";
  } catch (const std::exception& error) {
    std::cerr << argv[1] << ": " << error.what() << "\n";
    return 1;
  }
}
