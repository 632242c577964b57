// What a bundle says of itself: manifest.json, read with suspicion.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "detect.hpp"
#include "preprocess.hpp"

struct Bundle {
  Contract contract;
  std::vector<std::string> labels;
  bool untrained = false;
  std::vector<std::uint8_t> model;  // the artifact's bytes, those whose hash was compared
  std::string input_name;
  std::vector<std::string> output_names;
  std::optional<Detection> detection;  // of a detector
  std::int64_t batch = 1;  // that the artifact takes
};

// Throws Problem: no bundle, another schema, no such artifact, not one that this program runs, or a changed file.
Bundle read_bundle(const std::string& folder, const std::string& kind);
