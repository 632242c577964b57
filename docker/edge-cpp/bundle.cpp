#include "bundle.hpp"

#include <openssl/evp.h>

#include <nlohmann/json.hpp>

#include "problem.hpp"

namespace {

constexpr int kSchemaVersion = 3;

std::string sha256(const std::vector<std::uint8_t>& data) {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int size = 0;
  if (!EVP_Digest(data.data(), data.size(), digest, &size, EVP_sha256(), nullptr)) throw Problem("SHA-256 is missing");
  std::string text;
  for (unsigned int i = 0; i < size; ++i) {
    text += "0123456789abcdef"[digest[i] >> 4];
    text += "0123456789abcdef"[digest[i] & 15];
  }
  return text;
}

Contract read_contract(const nlohmann::json& given) {
  Contract contract;
  given.at("height_px").get_to(contract.height_px);
  given.at("width_px").get_to(contract.width_px);
  given.at("resize").get_to(contract.resize);
  given.at("crop_pct").get_to(contract.crop_pct);
  given.at("interpolation").get_to(contract.interpolation);
  given.at("channel_order").get_to(contract.channel_order);
  given.at("mean").get_to(contract.mean);
  given.at("std").get_to(contract.std);
  const auto one_of = [](const std::string& value, std::vector<std::string> known) {
    for (const auto& name : known) {
      if (value == name) return;
    }
    throw Problem("preprocessing '" + value + "': unknown", "update this program");
  };
  one_of(contract.resize, {"crop", "stretch", "letterbox"});
  one_of(contract.interpolation, {"bilinear", "bicubic", "nearest"});
  one_of(contract.channel_order, {"rgb", "bgr"});
  for (double std : contract.std) {
    if (!(std > 0)) throw Problem("std: expected positive numbers");
  }
  const auto side = [](int px) { return px >= 1 && px <= 8192; };
  if (!side(contract.height_px) || !side(contract.width_px) || !(contract.crop_pct > 0 && contract.crop_pct <= 1)) {
    throw Problem("preprocessing: size or crop out of range");
  }
  return contract;
}

Detection read_detection(const nlohmann::json& given, const nlohmann::json& decode) {
  Detection detection;
  for (const auto& one : given.at("heads")) {
    Head head;
    one.at("output").get_to(head.output);
    one.at("stride_px").get_to(head.stride_px);
    one.at("anchors").get_to(head.anchors);
    one.at("scale_x_y").get_to(head.scale_x_y);
    one.at("new_coords").get_to(head.new_coords);
    detection.heads.push_back(head);
  }
  decode.get_to(detection.decode);
  const auto& rule = given.at("suppression");
  rule.at("score_threshold").get_to(detection.suppression.score_threshold);
  rule.at("iou_threshold").get_to(detection.suppression.iou_threshold);
  rule.at("max_detections").get_to(detection.suppression.max_detections);
  check_detection(detection);
  return detection;
}

const nlohmann::json& find_artifact(const nlohmann::json& manifest, const std::string& kind) {
  std::string kinds;
  for (const auto& artifact : manifest.at("artifacts")) {
    if (artifact.at("kind") == kind) return artifact;
    kinds += (kinds.empty() ? "" : ", ") + artifact.at("kind").get<std::string>();
  }
  throw Problem("no artifact '" + kind + "', it has " + kinds, "--artifact onnx");
}

Bundle read(const std::string& folder, const nlohmann::json& manifest, const std::string& kind) {
  const auto& version = manifest.at("schema_version");
  if (version != kSchemaVersion) {
    throw Problem("schema_version " + version.dump() + ", expected " + std::to_string(kSchemaVersion),
                  "export the bundle again, or update this program");
  }
  const auto& spec = manifest.at("spec");
  const bool detects = spec.at("task") == "detect";
  if (spec.at("task") != "classify" && !detects) {
    throw Problem("gives neither classes nor boxes", "read its outputs with an application of yours");
  }
  // "onnx@320x320": of a further input size of the bundle, and the contract read here is of its own.
  if (kind.find('@') != std::string::npos) {
    throw Problem("'" + kind + "' is of a further input size, this program takes the bundle's own", "--artifact onnx");
  }
  const auto& artifact = find_artifact(manifest, kind);
  if (artifact.at("format") != "onnx" || !artifact.at("frontend").is_null()) {
    throw Problem("'" + kind + "' takes no float tensor from ONNX Runtime", "--artifact onnx");
  }
  Bundle bundle;
  bundle.contract = read_contract(spec.at("preprocess"));
  bundle.untrained = spec.at("provenance").at("source") == "random";
  manifest.at("labels").get_to(bundle.labels);
  const auto file = artifact.at("file").get<std::string>();
  if (file.empty() || file == "." || file == ".." || file.find_first_of("/\\") != std::string::npos) {
    throw Problem("file name '" + file + "' leaves the bundle's folder", "do not use this bundle");
  }
  bundle.model = read_file(folder + "/" + file);
  if (sha256(bundle.model) != artifact.at("sha256")) {
    throw Problem(file + ": not the file of the manifest (SHA-256 differs)", "copy the bundle again", kCheckFailed);
  }
  const auto& input = artifact.at("inputs").at(0);
  input.at("name").get_to(bundle.input_name);
  for (const auto& output : artifact.at("outputs")) bundle.output_names.push_back(output.at("name"));
  if (bundle.output_names.empty()) throw Problem("'" + kind + "' has no output", "export the bundle again");
  if (detects) bundle.detection = read_detection(spec.at("detection"), artifact.at("decode"));
  const auto& batch = input.at("shape").at(0);
  if (batch.is_number_integer()) bundle.batch = batch.get<std::int64_t>();
  return bundle;
}

}  // namespace

Bundle read_bundle(const std::string& folder, const std::string& kind) {
  const std::string path = folder + "/manifest.json";
  const auto data = read_file(path);
  try {
    return read(folder, nlohmann::json::parse(data), kind);
  } catch (const Problem& problem) {
    throw Problem(folder + ": " + problem.what(), problem.fix, problem.code);
  } catch (const nlohmann::json::exception& error) {
    throw Problem(path + ": " + error.what(), "export the bundle again");
  }
}
