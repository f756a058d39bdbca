// Manifests, recording, the mode; making and merging bundles. (Looking into them is inspect.cpp.)
// SPDX-License-Identifier: Apache-2.0
#include "jit/deploy/commands.h"

#include <algorithm>

#include "cache/files.h"
#include "cache/replace_file.h"
#include "jit/deploy/manifest.h"
#include "jit/tune/ship.h"

namespace torchkiln::jit {
namespace {

using nlohmann::json;

// What differs between two builds of the same thing, and what only its maker wants to know.
constexpr const char* kVolatile = "milliseconds";

std::string operator_of(std::span<Kernel* const> kernels, const Specialization& specialization) {
  const Kernel* kernel = find_kernel(kernels, specialization.path, specialization.entry);
  return kernel == nullptr ? "" : kernel->declaration.operators[0];
}

json write_bundle(const std::string& path, const cache::BundleObjects& objects) {
  const std::string bytes = cache::encode_bundle(objects);
  if (const int error = cache::replace_file(path, bytes)) {
    throw Error(
        TORCHKILN_ERROR_VALUE,
        "out must be a file that can be written; got " + path + ": " + cache::error_text(error), {},
        "out");
  }
  return {{"path", path}, {"objects", objects.size()}, {"bytes", bytes.size()}};
}

}  // namespace

json number_field(const json& header, const char* name) {
  const auto field = header.find(name);
  return field != header.end() && field->is_number() ? *field : json();
}

json expand_manifests(Engine& engine, const json& request) {
  Manifest all;
  for (const json& path : request.at("paths")) {
    auto manifest = read_manifest(path.get<std::string>());
    if (!manifest) {
      throw Error(TORCHKILN_ERROR_VALUE,
                  "manifest must be a file that is there; got " + path.get<std::string>(), {},
                  "manifest");
    }
    all.merge(*manifest);
  }
  const auto kernels = engine.kernels();
  json list = json::array(), unknown = json::array();
  for (const std::string& text : all) {
    try {
      const Specialization specialization = parse_specialization(text, kernels);
      list.push_back(specialization.to_json());
      list.back()["operator"] = operator_of(kernels, specialization);
    } catch (const Error& error) {
      unknown.push_back({{"text", text}, {"error", error.what()}});
    }
  }
  add_winners(engine, request.value("architectures", std::vector<std::string>()), list);
  return {{"specializations", list}, {"unknown", unknown}};
}

json start_recording(Engine& engine, const json& request) {
  return {{"recording", engine.start_recording(request.at("path").get<std::string>())}};
}

json stop_recording(Engine& engine, const json& request) {
  return {{"kernels", engine.recorder().stop(request.at("recording").get<std::uint64_t>())}};
}

json seal(Engine& engine, const json& request) {
  const JitMode before = engine.objects().mode();
  engine.objects().set_mode(parse_jit_mode(request.at("mode").get<std::string>()));
  return {{"before", jit_mode_name(before)}};
}

json bundles_in_use(Engine& engine, const json&) {
  json list = json::array(), refused = json::array();
  for (const auto& bundle : engine.objects().bundles().list()) {
    list.push_back({{"path", bundle->path().string()},
                    {"objects", bundle->size()},
                    {"bytes", bundle->bytes()}});
  }
  for (const Bundles::Refused& r : engine.objects().bundles().refused()) {
    refused.push_back({{"path", r.path}, {"why", r.why}});
  }
  return {{"bundles", list}, {"refused", refused}};
}

json create_bundle(Engine& engine, const json& request) {
  cache::BundleObjects objects;
  for (const json& item : request.at("items")) {
    const auto specialization = Specialization::from_json(item.at("specialization"));
    Target target = Target::parse(item.at("target").get<std::string>());
    target.specific = specialization.architecture_specific;
    const auto found = engine.objects().find(specialization, target, Origin::kOwnCompiler);
    if (!found) {
      throw Error(TORCHKILN_ERROR_VALUE, "bundle must hold what was compiled before; got " +
                                             specialization.text() + "@" + target.text());
    }
    json header = found->object->header;
    header.erase(kVolatile);
    header["key"] = found->key;
    objects[{found->key, header.value("compiler", "")}] =
        cache::encode_object(header, found->object->payload);
  }
  add_records(engine, request.at("items"), objects);
  return write_bundle(request.at("out").get<std::string>(), objects);
}

json merge_bundles(Engine&, const json& request) {
  cache::BundleObjects objects;
  for (const json& path : request.at("inputs")) {
    const auto bundle = open_bundle(path.get<std::string>());
    for (std::size_t i = 0; i < bundle->size(); ++i) {
      std::string why;
      const auto item = bundle->item(i, why);
      if (!item) {
        throw Error(
            TORCHKILN_ERROR_VALUE,
            "bundle must be undamaged to be merged; got " + bundle->path().string() + ": " + why,
            {}, "bundle");
      }
      // Equal keys of one compiler are the same code: the first one stays. Records of both are kept.
      const auto compiler = item->object.header.value("compiler", "");
      const auto [place, added] = objects.try_emplace({item->key, compiler}, item->bytes);
      if (!added && is_record(item->object))
        place->second = merge_records(place->second, item->object);
    }
  }
  return write_bundle(request.at("out").get<std::string>(), objects);
}

}  // namespace torchkiln::jit
