// One process of the torch-free core, for tests that need many of them, or one that is killed, starved or lied to:
//   torchkiln_attack_worker <command> [name=value]...
// Prints one line of JSON. Exit codes: 0 fine, 1 a wrong kernel or an unexpected error, 2 usage.
// SPDX-License-Identifier: Apache-2.0
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <map>
#include <numeric>
#include <random>
#include <thread>

#include "cache/sha256.h"
#include "jit/control.h"
#include "jit/deploy/bundles.h"
#include "jit/deploy/recorder.h"
#include "jit/driver/dynamic_library.h"
#include "jit/driver/nvrtc_finder.h"
#include "jit/log.h"
#include "tests/jit/support/fake_nvrtc.h"

namespace torchkiln::jit {
namespace {

using nlohmann::json;
using Clock = std::chrono::steady_clock;
namespace fs = std::filesystem;

constexpr Target kTarget{.architecture = 90};
const std::string kCompiler = "fake-1.0";

class Arguments {
 public:
  Arguments(int count, char** values) {
    for (int i = 2; i < count; ++i) {
      const std::string text = values[i];
      const std::size_t equals = text.find('=');
      if (equals == text.npos) throw std::invalid_argument(text + " must be name=value");
      values_[text.substr(0, equals)] = text.substr(equals + 1);
    }
  }
  std::string text(const std::string& name) const {
    const auto found = values_.find(name);
    if (found == values_.end()) throw std::invalid_argument(name + "=... is missing");
    return found->second;
  }
  int number(const std::string& name, int otherwise) const {
    const auto found = values_.find(name);
    return found == values_.end() ? otherwise : std::stoi(found->second);
  }

 private:
  std::map<std::string, std::string> values_;
};

// Objects of a process that starts now, with the fake compiler; warnings are collected.
struct Core {
  explicit Core(const Arguments& arguments)
      : nvrtc(arguments.text("work"), std::chrono::milliseconds(arguments.number("compile_ms", 0)),
              fs::path(arguments.text("work")) / "compiles") {
    settings.cache_dir = arguments.text("root");
    if (settings.cache_dir == "default") settings.cache_dir.clear();
    settings.compile_jobs = 1;
    set_log_sink(
        [](void* self, std::int32_t level, const char* sentence) {
          if (level >= TORCHKILN_LOG_WARNING)
            static_cast<Core*>(self)->warnings.emplace_back(sentence);
        },
        this);
    objects.emplace(settings, sources, nvrtc.source(sources), statistics);
  }

  std::vector<std::string> warnings;
  Settings settings;
  TemplateSources sources = testing::scale_sources();
  Statistics statistics;
  testing::FakeNvrtc nvrtc;
  std::optional<Objects> objects;
};

double microseconds_since(Clock::time_point start) {
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

int print(const json& reply, int code) {
  std::cout << reply.dump() << std::endl;
  return code;
}

// keys=N seed=S wait=1: gets N kernels in random order; with wait=1 says "ready" and begins when its input ends.
int get(const Arguments& arguments) {
  Core core(arguments);
  std::vector<int> indices(static_cast<std::size_t>(arguments.number("keys", 1)));
  std::iota(indices.begin(), indices.end(), 1);
  std::shuffle(indices.begin(), indices.end(),
               std::mt19937(static_cast<unsigned>(arguments.number("seed", 0))));
  if (arguments.number("wait", 0) != 0) {
    std::cout << "ready" << std::endl;
    char byte;
    while (::read(STDIN_FILENO, &byte, 1) > 0) continue;
  }
  const auto start = Clock::now();
  int wrong = 0;
  for (const int index : indices) {
    const Found found =
        core.objects->get(testing::scale_specialization(index), kTarget, Priority::kInteractive);
    if (!testing::is_right_kernel(*found.object, index)) ++wrong;
  }
  const double microseconds = microseconds_since(start);
  return print({{"wrong", wrong},
                {"compiles", core.statistics.compiles.load()},
                {"hits", core.statistics.hits_disk.load()},
                {"damaged", core.objects->store().counters().damaged},
                {"milliseconds", microseconds / 1e3},
                {"warnings", core.warnings}},
               wrong == 0 ? 0 : 1);
}

// keys=N: which of N kernels are stored; none may be wrong. Compiles nothing.
int check(const Arguments& arguments) {
  Core core(arguments);
  int hits = 0, wrong = 0;
  const int keys = arguments.number("keys", 1);
  for (int index = 1; index <= keys; ++index) {
    const auto found = core.objects->find(testing::scale_specialization(index), kTarget);
    if (!found) continue;
    ++hits;
    if (!testing::is_right_kernel(*found->object, index)) ++wrong;
  }
  const auto counters = core.objects->store().counters();
  return print({{"hits", hits},
                {"wrong", wrong},
                {"damaged", counters.damaged},
                {"stored", core.objects->store().list().size()},
                {"warnings", core.warnings}},
               wrong == 0 && counters.damaged == 0 ? 0 : 1);
}

// keys=N bytes=B: the store alone, without threads; prints how many were published.
int publish(const Arguments& arguments) {
  std::vector<std::string> warnings;
  cache::Store store(arguments.text("root"),
                     [&](const std::string& sentence) { warnings.push_back(sentence); });
  int published = 0;
  for (int i = 1; i <= arguments.number("keys", 1); ++i) {
    const std::string payload(static_cast<std::size_t>(arguments.number("bytes", 5000)), 'p');
    const auto done =
        store.publish(cache::sha256_hex(std::to_string(i)), kCompiler, {json::object(), payload});
    if (done != cache::Store::Published::kNo) ++published;
  }
  return print({{"published", published}, {"warnings", warnings}}, 0);
}

// limit=B: removes the oldest.
int evict(const Arguments& arguments) {
  cache::Store store(arguments.text("root"), nullptr);
  const auto freed = store.prune(static_cast<std::uint64_t>(arguments.number("limit", 0)));
  return print({{"freed", freed}, {"stored", store.list().size()}}, 0);
}

// keys=N: what `publish` stored: a whole object or none. Never writes but to set damage aside.
int find(const Arguments& arguments) {
  cache::Store store(arguments.text("root"), nullptr);
  int hits = 0;
  for (int i = 1; i <= arguments.number("keys", 1); ++i) {
    const auto found = store.find(cache::sha256_hex(std::to_string(i)), kCompiler, true, nullptr);
    hits += found && found->payload.find_first_not_of('p') == std::string::npos ? 1 : 0;
  }
  const auto damaged = store.counters().damaged;
  return print({{"hits", hits}, {"damaged", damaged}}, damaged == 0 ? 0 : 1);
}

// An engine with the fake compiler and without a driver; it says what goes wrong by exceptions.
struct FakeEngine {
  explicit FakeEngine(const Arguments& arguments)
      : nvrtc(arguments.text("work"), {}, fs::path(arguments.text("work")) / "compiles") {
    Settings settings;
    settings.cache_dir = arguments.text("root");
    settings.compile_jobs = 1;
    engine.emplace(Engine::Parts{.settings = settings,
                                 .templates = testing::scale_files(),
                                 .open_driver = [] { return CudaApi(); },
                                 .compilers = nvrtc.source(sources)});
  }

  TemplateSources sources = testing::scale_sources();
  testing::FakeNvrtc nvrtc;
  std::optional<Engine> engine;
};

// out=F first=I keys=N: a bundle of N kernels from number I on, which are compiled when they are not stored.
int bundle(const Arguments& arguments) {
  FakeEngine fake(arguments);
  json items = json::array();
  const int first = arguments.number("first", 1);
  for (int i = first; i < first + arguments.number("keys", 1); ++i) {
    items.push_back({{"specialization", testing::scale_specialization(i).to_json()},
                     {"target", kTarget.text()}});
    json request = items.back();
    request["own_compiler"] = true;
    control(*fake.engine, "compile", request);
  }
  return print(
      control(*fake.engine, "bundle.create", {{"out", arguments.text("out")}, {"items", items}}),
      0);
}

// out=F a=F b=F
int merge(const Arguments& arguments) {
  FakeEngine fake(arguments);
  const json inputs = {arguments.text("a"), arguments.text("b")};
  return print(
      control(*fake.engine, "bundle.merge", {{"out", arguments.text("out")}, {"inputs", inputs}}),
      0);
}

// file=F keys=N: which of N kernels the bundle serves; none may be wrong, nothing in it damaged.
int served(const Arguments& arguments) {
  FakeEngine fake(arguments);
  const json verdict = control(*fake.engine, "bundle.verify", {{"path", arguments.text("file")}});
  const auto opened = open_bundle(arguments.text("file"));
  int hits = 0, wrong = 0;
  for (int i = 1; i <= arguments.number("keys", 1); ++i) {
    const auto key = fake.engine->objects().key_of(testing::scale_specialization(i), kTarget);
    for (const auto& object : opened->find(key, nullptr)) {
      ++hits;
      if (!testing::is_right_kernel(object, i)) ++wrong;
    }
  }
  const bool is_sound = verdict.at("problems").empty() && wrong == 0;
  return print({{"hits", hits}, {"wrong", wrong}, {"problems", verdict.at("problems")}},
               is_sound ? 0 : 1);
}

// file=F keys=N: notes N specialisations, one after the other, as launches do.
int record(const Arguments& arguments) {
  std::vector<std::string> warnings;
  set_log_sink(
      [](void* list, std::int32_t, const char* sentence) {
        static_cast<std::vector<std::string>*>(list)->emplace_back(sentence);
      },
      &warnings);
  Recorder recorder(arguments.text("file"));
  for (int i = 1; i <= arguments.number("keys", 1); ++i) {
    recorder.note(testing::scale_specialization(i).text());
  }
  set_log_sink(nullptr, nullptr);
  return print({{"warnings", warnings}}, 0);
}

// rounds=N: a warm lookup with all checks, of a process that has nothing in memory but knows its compiler.
int lookup(const Arguments& arguments) {
  Core core(arguments);
  const auto specialization = testing::scale_specialization(1);
  core.objects->get(specialization, kTarget, Priority::kInteractive);
  std::vector<double> microseconds;
  std::size_t bytes = 0;
  const std::string key = core.objects->get(specialization, kTarget, Priority::kInteractive).key;
  const std::string identity = core.nvrtc.source(core.sources).identity();
  for (int i = 0; i < arguments.number("rounds", 1000); ++i) {
    const auto start = Clock::now();
    const auto found = core.objects->store().find(key, identity, false, [](const cache::Object& o) {
      return validate_code(o.header, o.payload, kTarget);
    });
    microseconds.push_back(microseconds_since(start));
    if (!found || !testing::is_right_kernel({found->header, found->payload}, 1))
      return print({{"wrong", 1}}, 1);
    bytes = found->payload.size();
  }
  std::sort(microseconds.begin(), microseconds.end());
  const auto libraries = mapped_libraries();
  const auto mapped = [&](const char* name) {
    return std::any_of(libraries.begin(), libraries.end(), [&](const std::string& library) {
      return library.find(name) != library.npos;
    });
  };
  return print({{"microseconds",
                 {{"median", microseconds[microseconds.size() / 2]},
                  {"p90", microseconds[microseconds.size() * 9 / 10]}}},
                {"payload_bytes", bytes},
                {"libnvrtc_opened", mapped("libnvrtc")},
                {"libcuda_opened", mapped("libcuda")}},
               0);
}

// Real NVRTC: exit() by the main or another thread, `us` into the first compile of the process.
int exit_while_compiling(const Arguments& arguments) {
  static const TemplateSources sources = testing::scale_sources();
  const auto candidates = find_nvrtc(Settings::from_environment(), {});
  auto* compiler = new Compiler(load_first(candidates), sources);
  auto* pool = new CompilePool(2);  // never destroyed, as the engine's
  for (int i = 1; i <= 4; ++i) {
    pool->submit(Priority::kInteractive, [=] {
      compiler->compile(testing::scale_specialization(i), kTarget, cache::sha256_hex("k"),
                        {"std=c++17"});
    });
  }
  const auto leave = [&] {
    std::this_thread::sleep_for(std::chrono::microseconds(arguments.number("us", 0)));
    std::exit(7);
  };
  if (arguments.text("from") == "main") leave();
  std::thread(leave).join();
  return 1;
}

int run(int count, char** values) try {
  const std::map<std::string, int (*)(const Arguments&)> commands = {
      {"get", &get},
      {"check", &check},
      {"publish", &publish},
      {"evict", &evict},
      {"find", &find},
      {"bundle", &bundle},
      {"merge", &merge},
      {"served", &served},
      {"record", &record},
      {"lookup", &lookup},
      {"exit", &exit_while_compiling}};
  const auto command = commands.find(count > 1 ? values[1] : "");
  if (command == commands.end()) throw std::invalid_argument("no such command");
  return command->second(Arguments(count, values));
} catch (const std::invalid_argument& error) {
  std::cerr << error.what() << '\n';
  return 2;
} catch (const std::exception& error) {  // one clear sentence
  return print({{"error", error.what()}}, 1);
}

}  // namespace
}  // namespace torchkiln::jit

int main(int count, char** values) { return torchkiln::jit::run(count, values); }
