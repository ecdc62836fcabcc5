#include "calc/parser.h"

#include <stdexcept>

#include "calc/lexer.h"

namespace calc {
namespace {

class Parser {
 public:
  explicit Parser(const std::string& text) : tokens_(Lex(text)) {}

  std::unique_ptr<Node> Whole() {
    auto node = Sum();
    if (Now().kind != Token::kEnd) throw std::runtime_error("left over: " + Now().text);
    return node;
  }

 private:
  const Token& Now() const { return tokens_[next_]; }

  bool Accept(const std::string& text) {
    if (Now().kind != Token::kOperator || Now().text != text) return false;
    ++next_;
    return true;
  }

  static std::unique_ptr<Node> Make(const std::string& text, std::unique_ptr<Node> a,
                                    std::unique_ptr<Node> b) {
    auto node = std::make_unique<Node>();
    node->text = text;
    node->arguments.push_back(std::move(a));
    node->arguments.push_back(std::move(b));
    return node;
  }

  std::unique_ptr<Node> Sum() {
    auto left = Product();
    for (;;) {
      if (Accept("+")) {
        left = Make("+", std::move(left), Product());
      } else if (Accept("-")) {
        left = Make("-", std::move(left), Product());
      } else {
        return left;
      }
    }
  }

  std::unique_ptr<Node> Product() {
    auto left = Factor();
    for (;;) {
      if (Accept("*")) {
        left = Make("*", std::move(left), Factor());
      } else if (Accept("/")) {
        left = Make("/", std::move(left), Factor());
      } else {
        return left;
      }
    }
  }

  std::unique_ptr<Node> Factor() {
    if (Accept("(")) {
      auto node = Sum();
      if (!Accept(")")) throw std::runtime_error("missing )");
      return node;
    }
    if (Now().kind != Token::kNumber && Now().kind != Token::kName) {
      throw std::runtime_error("a number or a function is missing");
    }
    auto node = std::make_unique<Node>();
    node->is_number = Now().kind == Token::kNumber;
    node->text = Now().text;
    ++next_;
    if (node->is_number) return node;
    if (!Accept("(")) throw std::runtime_error("missing ( after " + node->text);
    do {
      node->arguments.push_back(Sum());
    } while (Accept(","));
    if (!Accept(")")) throw std::runtime_error("missing )");
    return node;
  }

  std::vector<Token> tokens_;
  size_t next_ = 0;
};

}  // namespace

std::unique_ptr<Node> Parse(const std::string& text) { return Parser(text).Whole(); }

std::string ToString(const Node& node) {
  if (node.is_number) return node.text;
  std::string out = "(" + node.text;
  for (const auto& argument : node.arguments) out += " " + ToString(*argument);
  return out + ")";
}

}  // namespace calc
