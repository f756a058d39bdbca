// Source, PTX and machine code of a specialisation as files.
//
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cctype>
#include <filesystem>
#include <fstream>
#include <string_view>

#include "jit/explain.h"

namespace torchkiln::jit {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

void write(const fs::path& file, std::string_view bytes) {
  std::error_code error;
  fs::create_directories(file.parent_path(), error);
  std::ofstream stream(file, std::ios::binary);
  stream.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  stream.close();
  if (!stream) {
    throw Error(TORCHKILN_ERROR_VALUE,
                "out must be a folder that can be written to; got " + file.string(), {}, "out");
  }
}

// detection_roi_align.forward_float_block_size_256__sm_90
std::string folder_name(const std::string& label) {
  std::string name;
  for (const char c : label) {
    const bool plain = std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '.';
    if (plain) name += c;
    if (!plain && !name.empty() && name.back() != '_') name += '_';
  }
  return name;
}

// The program and every header of its closure, laid out so that the folder is an include path.
std::string write_source(Engine& engine, const Specialization& s, const fs::path& folder) {
  const fs::path file = folder / (s.entry + ".cu");
  write(file, s.program());
  for (const SourceFile& source : engine.sources().closure(s.path))
    write(folder / source.path, source.text);
  return file.string();
}

std::string write_ptx(Engine& engine, const Specialization& s, Target target,
                      const fs::path& folder) {
  target.ptx = true;
  const Found found = engine.objects().get(s, target, Priority::kPrewarm);
  const fs::path file = folder / "kernel.ptx";
  std::string_view text = found.object->payload;
  if (text.ends_with('\0')) text.remove_suffix(1);  // the driver wants it, readers do not
  write(file, text);
  return file.string();
}

}  // namespace

json dump(Engine& engine, const json& request) {
  const auto s = Specialization::from_json(request.at("specialization"));
  Target target = Target::parse(request.at("target").get<std::string>());
  target.specific = s.architecture_specific;
  const auto what = request.at("what").get<std::vector<std::string>>();
  const auto wants = [&](const char* name) {
    return std::find(what.begin(), what.end(), name) != what.end();
  };
  const fs::path folder = fs::path(request.at("folder").get<std::string>()) /
                          folder_name(s.text() + "@" + target.text());
  json files = json::object();
  json reply = {{"text", s.text()}, {"target", target.text()}, {"folder", folder.string()}};
  if (wants("source")) files["source"] = write_source(engine, s, folder);
  if (wants("ptx")) files["ptx"] = write_ptx(engine, s, target, folder);
  if (wants("cubin")) {
    const Found found = engine.objects().get(s, target, Priority::kPrewarm);
    write(folder / "kernel.cubin", found.object->payload);
    write(folder / "kernel.json", found.object->header.dump(2) + "\n");
    files["cubin"] = (folder / "kernel.cubin").string();
    files["facts"] = (folder / "kernel.json").string();
    reply["layer"] = layer_name(found.layer);
  }
  reply["files"] = files;
  return reply;
}

}  // namespace torchkiln::jit
