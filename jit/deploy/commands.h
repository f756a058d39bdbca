// Control commands about manifests, bundles and the mode of compiling. Requests and replies stand above each function.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nlohmann/json.hpp>

#include "jit/engine.h"

namespace torchkiln::jit {

// A number of an object's header as it is, null where it is not known (registers of PTX).
nlohmann::json number_field(const nlohmann::json& header, const char* name);

// {paths: [...]} -> {specializations: [{..., operator}], unknown: [{text, error}]}
nlohmann::json expand_manifests(Engine& engine, const nlohmann::json& request);

// {path} -> {recording}; {recording} -> {kernels}
nlohmann::json start_recording(Engine& engine, const nlohmann::json& request);
nlohmann::json stop_recording(Engine& engine, const nlohmann::json& request);

// {mode: allow | warn | forbid} -> {before}
nlohmann::json seal(Engine& engine, const nlohmann::json& request);

// {} -> {bundles: [{path, objects, bytes}], refused: [{path, why}]}
nlohmann::json bundles_in_use(Engine& engine, const nlohmann::json& request);

// {out, items: [{specialization, target}]} -> {path, objects, bytes}. Writes what this process's compiler made, all of
// it in memory or in the cache already; Error(VALUE) when one is missing.
nlohmann::json create_bundle(Engine& engine, const nlohmann::json& request);
// {out, inputs: [...]} -> {path, objects, bytes}
nlohmann::json merge_bundles(Engine& engine, const nlohmann::json& request);
// {path} -> {path, bytes, objects: [{specialization, arch, compiler, registers, spill_bytes, shared_bytes, bytes}]}
nlohmann::json list_bundle(Engine& engine, const nlohmann::json& request);
// {path, manifest?, architectures?} -> {path, objects, bytes, architectures, compilers, specializations, spilling:
// [{specialization, arch, spill_bytes}], missing: [{specialization, arch}], problems: [{object, why}]}. Without a
// manifest every specialisation of the bundle must be there for every architecture; without architectures, those of the
// bundle.
nlohmann::json verify_bundle(Engine& engine, const nlohmann::json& request);

}  // namespace torchkiln::jit
