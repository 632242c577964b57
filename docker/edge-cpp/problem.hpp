// What keeps the program from an answer: one line that says what is wrong, one that says what to do.
#pragma once

#include <stdexcept>
#include <string>

enum Exit { kDone = 0, kCheckFailed = 1, kBadInput = 2, kNoEngine = 3 };

class Problem : public std::runtime_error {
 public:
  explicit Problem(const std::string& message, std::string fix = "", Exit code = kBadInput)
      : std::runtime_error(message), fix(std::move(fix)), code(code) {}

  std::string fix;
  Exit code;
};
