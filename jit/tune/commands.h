// Commands about tuning, as rows of the table in control.cpp.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nlohmann/json.hpp>

#include "jit/engine.h"

namespace torchkiln::jit {

// {"mode": "off"|"lookup"|"tune", "budget_ms": number, "total_ms": number}, each optional -> the three before.
nlohmann::json set_tuning(Engine& engine, const nlohmann::json& request);
// {"operators": [..]|null, "target": null|"sm_90"} -> {"spaces": [...]}: what can be tuned.
nlohmann::json list_spaces(Engine& engine, const nlohmann::json& request);
// {"since": n} -> {"next": m, "tuned": [...]}: what this process has tuned, numbered from 0.
nlohmann::json report_tuning(Engine& engine, const nlohmann::json& request);
// {} -> {"records": [{"device", "record"}], "digest"}: every record that this process would use.
nlohmann::json export_records(Engine& engine, const nlohmann::json& request);
// {"records": [...]} -> {"records": n, "digest"}: from now on exactly these are used.
nlohmann::json import_records(Engine& engine, const nlohmann::json& request);
// {} -> {"files": [{"file", "device", "records", "unreadable", "stale": [{"field", "recorded", "now", "records"}]}],
// "devices": those that are here, "writable", "state"}: the files as they are.
nlohmann::json examine_records(Engine& engine, const nlohmann::json& request);

}  // namespace torchkiln::jit
