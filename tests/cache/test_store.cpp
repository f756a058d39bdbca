// The store: finding, damage and quarantine, use-stamps, listing and pruning.
// SPDX-License-Identifier: Apache-2.0
#include <atomic>
#include <thread>

#include "cache/store.h"
#include "tests/cache/support.h"

namespace torchkiln::cache {
namespace {

using std::chrono::hours;
using support::encoded;
using support::files_in;
using support::kCompiler;
using support::key_of;
using support::kOtherCompiler;
using support::object_with;
using support::write_file;
namespace fs = std::filesystem;
using Published = Store::Published;

class StoreTest : public ::testing::Test {
 protected:
  fs::path path_of(const std::string& key, const std::string& compiler = kCompiler) const {
    return support::object_path(root_, key, compiler);
  }
  // Without the cost and the checks of publish.
  void plant(const std::string& key, const std::string& compiler, const std::string& bytes) const {
    const fs::path path = path_of(key, compiler);
    fs::create_directories(path.parent_path());
    write_file(path, bytes);
  }
  void plant(const std::string& key, const std::string& compiler = kCompiler) const {
    plant(key, compiler, encoded(key, compiler, "payload"));
  }
  std::optional<Object> find(const std::string& key, const std::string& preferred = kCompiler,
                             bool exact = false) {
    return store_.find(key, preferred, exact, nullptr);
  }
  fs::path quarantine() const { return root_ / "v1" / "quarantine"; }

  support::TemporaryDirectory directory_;
  fs::path root_ = directory_.path() / "root";
  support::Warnings warnings_;
  Store store_{root_, warnings_.collector()};
  const std::string key_ = key_of("a");
};

TEST_F(StoreTest, PublishThenFind) {
  EXPECT_FALSE(find(key_));
  EXPECT_FALSE(fs::exists(root_)) << "nothing is made before the first publish";
  EXPECT_EQ(store_.publish(key_, kCompiler, object_with("payload")), Published::kYes);
  EXPECT_TRUE(store_.contains(key_));
  EXPECT_FALSE(store_.contains(key_of("b")));
  const auto found = find(key_);
  ASSERT_TRUE(found);
  EXPECT_EQ(found->payload, "payload");
  EXPECT_EQ(found->header["registers"], 32);
  EXPECT_EQ(found->header["key"], key_);
  EXPECT_EQ(found->header["compiler"], kCompiler);
  EXPECT_TRUE(fs::exists(root_ / "v1" / "CACHEDIR.TAG"));
  EXPECT_EQ(files_in(root_ / "v1" / "tmp"), 0U);
  EXPECT_EQ(warnings_.texts.size(), 0U);
}

TEST_F(StoreTest, FirstPublisherWins) {
  EXPECT_EQ(store_.publish(key_, kCompiler, object_with("first")), Published::kYes);
  EXPECT_EQ(store_.publish(key_, kCompiler, object_with("second")), Published::kAlreadyThere);
  EXPECT_EQ(store_.publish(key_, kOtherCompiler, object_with("third")), Published::kYes);
  EXPECT_EQ(find(key_)->payload, "first");
}

TEST_F(StoreTest, CountersAreExact) {
  store_.publish(key_, kCompiler, object_with("payload"));
  store_.publish(key_, kCompiler, object_with("payload"));
  find(key_);
  find(key_of("b"));
  store_.publish("not a key", kCompiler, object_with("payload"));
  const StoreCounters counters = store_.counters();
  EXPECT_EQ(counters.hits, 1U);
  EXPECT_EQ(counters.misses, 1U);
  EXPECT_EQ(counters.damaged, 0U);
  EXPECT_EQ(counters.published, 1U);
  EXPECT_EQ(counters.already_there, 1U);
  EXPECT_EQ(counters.publish_failures, 1U);
  EXPECT_EQ(counters.bytes_written, fs::file_size(path_of(key_)));
  EXPECT_EQ(counters.bytes_read, counters.bytes_written);
}

TEST_F(StoreTest, PrefersItsCompilerAndTakesOthersUnlessExact) {
  plant(key_, kOtherCompiler);
  EXPECT_FALSE(find(key_, kCompiler, true));
  EXPECT_EQ(find(key_)->header["compiler"], kOtherCompiler);
  EXPECT_EQ(find(key_, "")->header["compiler"], kOtherCompiler);
  plant(key_, kCompiler);
  EXPECT_EQ(find(key_)->header["compiler"], kCompiler);
  EXPECT_EQ(find(key_, kOtherCompiler, true)->header["compiler"], kOtherCompiler);
}

TEST_F(StoreTest, NamesThatCouldLeaveTheDirectoryAreRefused) {
  for (const std::string& compiler :
       {std::string("../x"), std::string("a/b"), std::string(".hidden"), std::string(),
        std::string(200, 'x')}) {
    EXPECT_EQ(store_.publish(key_, compiler, object_with("p")), Published::kNo) << compiler;
  }
  EXPECT_FALSE(fs::exists(root_));
  EXPECT_FALSE(find("../../etc/passwd"));
}

TEST_F(StoreTest, DamageIsAMissAndIsQuarantinedAndReportedOnce) {
  const std::string good = encoded(key_, kCompiler, "payload");
  std::uint64_t damaged = 0;
  for (std::size_t at = 0; at < good.size(); at += 16) {
    std::string bad = good;
    bad[at] = static_cast<char>(bad[at] ^ 1);
    for (const std::string& bytes : {bad, good.substr(0, at)}) {
      plant(key_, kCompiler, bytes);
      EXPECT_FALSE(find(key_));
      EXPECT_FALSE(fs::exists(path_of(key_)));
      ++damaged;
    }
  }
  EXPECT_EQ(store_.counters().damaged, damaged);
  ASSERT_EQ(warnings_.texts.size(), 1U);
  EXPECT_NE(warnings_.texts[0].find("moved out of the way"), std::string::npos);
  plant(key_);
  EXPECT_TRUE(find(key_));
}

TEST_F(StoreTest, AnotherCompilersObjectStandsInForADamagedOne) {
  plant(key_, kCompiler, "damaged");
  plant(key_, kOtherCompiler);
  EXPECT_EQ(find(key_)->header["compiler"], kOtherCompiler);
  EXPECT_EQ(files_in(quarantine()), 1U);
}

TEST_F(StoreTest, HeaderMustAgreeWithTheName) {
  const std::string other_key = key_of("b");
  plant(key_, kCompiler, encoded(other_key, kCompiler, "p"));
  EXPECT_FALSE(find(key_));
  plant(key_, kCompiler, encoded(key_, kOtherCompiler, "p"));
  EXPECT_FALSE(find(key_));
  plant(key_, kCompiler, encode_object(Object{{{"key", 7}, {"compiler", nullptr}}, "p"}));
  EXPECT_FALSE(find(key_));
  EXPECT_EQ(store_.counters().damaged, 3U);
}

TEST_F(StoreTest, SwappedFilesAreMisses) {
  const std::string b = key_of("b");
  plant(key_);
  plant(b);
  fs::rename(path_of(key_), root_ / "a");
  fs::rename(path_of(b), path_of(key_));
  fs::rename(root_ / "a", path_of(b));
  EXPECT_FALSE(find(key_));
  EXPECT_FALSE(find(b));
  EXPECT_EQ(files_in(quarantine()), 2U);
}

TEST_F(StoreTest, ValidateDecidesLast) {
  plant(key_);
  const auto refuse = [](const Object&) { return std::optional<std::string>("wrong machine"); };
  EXPECT_FALSE(store_.find(key_, kCompiler, false, refuse));
  ASSERT_EQ(warnings_.texts.size(), 1U);
  EXPECT_NE(warnings_.texts[0].find("wrong machine"), std::string::npos);
  EXPECT_EQ(files_in(quarantine()), 1U);
  plant(key_);
  const auto accept = [](const Object& object) -> std::optional<std::string> {
    return object.payload == "payload" ? std::nullopt : std::optional<std::string>("payload");
  };
  EXPECT_TRUE(store_.find(key_, kCompiler, false, accept));
}

TEST_F(StoreTest, ThrowingValidateIsAMissThatBlamesNobody) {
  plant(key_);
  const auto fail = [](const Object&) -> std::optional<std::string> { throw std::bad_alloc(); };
  EXPECT_FALSE(store_.find(key_, kCompiler, false, fail));
  EXPECT_TRUE(fs::exists(path_of(key_)));
}

TEST_F(StoreTest, SoundFileThatReplacedABadOneIsNotQuarantined) {
  plant(key_);
  const auto replace_and_refuse = [&](const Object&) {
    const std::string fresh = (root_ / "fresh").string();
    write_file(fresh, encoded(key_, kCompiler, "fresh"));
    fs::rename(fresh, path_of(key_));
    return std::optional<std::string>("the old one is bad");
  };
  EXPECT_FALSE(store_.find(key_, kCompiler, false, replace_and_refuse));
  EXPECT_EQ(find(key_)->payload, "fresh");
  EXPECT_EQ(files_in(quarantine()), 0U);
}

TEST_F(StoreTest, QuarantineKeepsTheNewestSixteen) {
  for (int i = 0; i < 20; ++i) {
    const std::string key = key_of(std::to_string(i));
    plant(key, kCompiler, "damaged");
    EXPECT_FALSE(find(key));
  }
  EXPECT_EQ(files_in(quarantine()), 16U);
  for (const auto& file : fs::directory_iterator(quarantine())) {
    EXPECT_EQ(file.path().string().find(key_of("0")), std::string::npos);
  }
}

TEST_F(StoreTest, DriversRefusalQuarantines) {
  plant(key_);
  store_.quarantine(key_, kCompiler, "the driver refused it");
  store_.quarantine(key_, kCompiler, "the driver refused it");
  EXPECT_FALSE(store_.contains(key_));
  EXPECT_EQ(store_.counters().damaged, 1U);
}

TEST_F(StoreTest, OnlyRegularFilesOfOursAreRead) {
  plant(key_);
  const fs::path path = path_of(key_);
  fs::rename(path, root_ / "elsewhere");
  fs::create_symlink(root_ / "elsewhere", path);
  EXPECT_FALSE(find(key_));
  ASSERT_EQ(::mkfifo(path.c_str(), 0600), 0);
  EXPECT_FALSE(find(key_));
  fs::create_directory(path);
  EXPECT_FALSE(find(key_));
  plant(key_);
  ::chmod(path.c_str(), 0666);
  EXPECT_FALSE(find(key_));
  EXPECT_EQ(store_.counters().damaged, 4U);
  if (::geteuid() != 0) return;
  plant(key_);
  ASSERT_EQ(::chown(path.c_str(), 54321, 54321), 0);
  EXPECT_FALSE(find(key_));
  EXPECT_EQ(store_.counters().damaged, 5U);
}

TEST_F(StoreTest, LinkedOrOpenDirectoryBelowTheRootIsNotEntered) {
  plant(key_);
  const fs::path shard = path_of(key_).parent_path();
  ::chmod(shard.c_str(), 0777);
  EXPECT_FALSE(find(key_));
  ::chmod(shard.c_str(), 0700);
  fs::rename(shard, root_ / "shard");
  fs::create_directory_symlink(root_ / "shard", shard);
  EXPECT_FALSE(find(key_));
  EXPECT_EQ(store_.publish(key_, kOtherCompiler, object_with("p")), Published::kNo);
  EXPECT_EQ(files_in(root_ / "shard"), 1U);
}

TEST_F(StoreTest, UseIsStampedAtMostEverySixHours) {
  plant(key_);
  support::set_age(path_of(key_), hours(5));
  const auto before = fs::last_write_time(path_of(key_));
  find(key_);
  EXPECT_EQ(fs::last_write_time(path_of(key_)), before);
  support::set_age(path_of(key_), hours(7));
  find(key_);
  EXPECT_GT(fs::last_write_time(path_of(key_)), before);
}

TEST_F(StoreTest, ListNamesWhatIsThere) {
  plant(key_, kOtherCompiler);
  plant(key_);
  write_file(path_of(key_).parent_path() / "notes.txt", "not ours");
  const auto entries = store_.list();
  ASSERT_EQ(entries.size(), 2U);
  EXPECT_EQ(entries[0].compiler, kOtherCompiler);
  EXPECT_EQ(entries[1].compiler, kCompiler);
  EXPECT_EQ(entries[1].key, key_);
  EXPECT_EQ(entries[1].path, path_of(key_));
  EXPECT_GT(entries[1].bytes, 0U);
}

TEST_F(StoreTest, ClearRemovesObjectsAndQuarantine) {
  plant(key_);
  plant(key_of("b"), kCompiler, "damaged");
  find(key_of("b"));
  const std::uint64_t listed = store_.list()[0].bytes;
  EXPECT_GT(store_.clear(), listed);
  EXPECT_TRUE(store_.list().empty());
  EXPECT_EQ(files_in(quarantine()), 0U);
}

TEST_F(StoreTest, PruneRemovesTheLeastRecentlyUsedDownToFourFifths) {
  for (int i = 0; i < 10; ++i) {
    plant(key_of(std::to_string(i)));
    support::set_age(path_of(key_of(std::to_string(i))), hours(2 + i));
  }
  const std::uint64_t each = store_.list()[0].bytes;
  EXPECT_EQ(store_.prune(10 * each), 0U);
  EXPECT_EQ(store_.prune(5 * each), 6 * each);
  for (int i = 0; i < 10; ++i) EXPECT_EQ(store_.contains(key_of(std::to_string(i))), i < 4) << i;
}

TEST_F(StoreTest, PruneSparesTheLastHour) {
  plant(key_of("old"));
  plant(key_of("new"));
  plant(key_of("future"));
  support::set_age(path_of(key_of("old")), hours(2));
  support::set_age(path_of(key_of("future")), -hours(24));
  EXPECT_GT(store_.prune(0), 0U);
  EXPECT_FALSE(store_.contains(key_of("old")));
  EXPECT_TRUE(store_.contains(key_of("new")));
  EXPECT_TRUE(store_.contains(key_of("future")));
}

TEST_F(StoreTest, StateIsASentenceForPeople) {
  EXPECT_NE(store_.state().find("first publish"), std::string::npos);
  EXPECT_TRUE(store_.readable());
  EXPECT_TRUE(store_.writable());
  plant(key_);
  EXPECT_NE(store_.state().find("readable and writable"), std::string::npos);
}

TEST_F(StoreTest, FolderThatCanNeverBeMadeIsNotCalledUsable) {
  const Store store("/proc/torchkiln/cache", [](const std::string&) {});
  EXPECT_FALSE(store.writable());
  EXPECT_NE(store.state().find("cannot be made"), std::string::npos) << store.state();
}

TEST_F(StoreTest, RefusedRootMeansMemoryOnlyWithOneWarning) {
  support::Warnings warnings;
  Store store("relative/root", warnings.collector());
  EXPECT_FALSE(store.readable());
  EXPECT_FALSE(store.writable());
  EXPECT_EQ(store.publish(key_, kCompiler, object_with("p")), Published::kNo);
  EXPECT_FALSE(store.find(key_, kCompiler, false, nullptr));
  EXPECT_FALSE(store.contains(key_));
  EXPECT_TRUE(store.list().empty());
  EXPECT_EQ(store.clear() + store.prune(0), 0U);
  ASSERT_EQ(warnings.texts.size(), 1U);
  EXPECT_NE(warnings.texts[0].find("relative"), std::string::npos);
  EXPECT_NE(store.state().find("memory only"), std::string::npos);
}

TEST_F(StoreTest, RootThatBecomesOpenIsIgnored) {
  plant(key_);
  EXPECT_TRUE(find(key_));
  ::chmod(root_.c_str(), 0777);
  EXPECT_FALSE(find(key_));
  ASSERT_EQ(warnings_.texts.size(), 1U);
  EXPECT_NE(warnings_.texts[0].find("writable by other users"), std::string::npos);
}

TEST_F(StoreTest, RootThatIsExchangedIsExaminedAgain) {
  plant(key_);
  EXPECT_TRUE(find(key_));
  // Another directory, whose ancestors changed meanwhile.
  fs::rename(root_, directory_.path() / "moved");
  plant(key_);
  ::chmod(directory_.path().c_str(), 0777);
  EXPECT_FALSE(find(key_));
  ASSERT_EQ(warnings_.texts.size(), 1U);
  EXPECT_NE(warnings_.texts[0].find("writable by other users"), std::string::npos);
  ::chmod(directory_.path().c_str(), 0700);
  EXPECT_TRUE(find(key_));
}

TEST_F(StoreTest, ThrowingWarnDoesNotEscape) {
  Store store("relative", [](const std::string&) { throw std::runtime_error("no"); });
  EXPECT_FALSE(store.readable());
}

TEST_F(StoreTest, ThreadsShareAStore) {
  std::atomic<int> published = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 5; ++i) {
        const std::string key = key_of(std::to_string(i));
        const auto result = store_.publish(key, kCompiler, object_with(std::to_string(i)));
        if (result == Published::kYes) ++published;
        const auto found = find(key);
        EXPECT_TRUE(found && found->payload == std::to_string(i));
        plant(key_of("bad" + std::to_string(i)), kCompiler, "damaged");
        EXPECT_FALSE(find(key_of("bad" + std::to_string(i))));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(published, 5);
  EXPECT_EQ(store_.counters().hits, 40U);
}

TEST_F(StoreTest, StaleHandleIsRetriedOnce) {
  plant(key_);
  static int stale_reads;
  const support::ScopedFault fault([](const char* step) {
    return std::string_view(step) == "read" && stale_reads-- > 0 ? ESTALE : 0;
  });
  stale_reads = 1;
  EXPECT_TRUE(find(key_));
  stale_reads = 2;
  EXPECT_FALSE(find(key_, kCompiler, true));
  EXPECT_TRUE(fs::exists(path_of(key_))) << "an unreadable file is not a bad one";
}

TEST_F(StoreTest, ReadErrorIsAMissWithAWarning) {
  plant(key_);
  const support::ScopedFault fault(
      [](const char* step) { return std::string_view(step) == "read" ? EIO : 0; });
  EXPECT_FALSE(find(key_));
  EXPECT_FALSE(find(key_));
  EXPECT_EQ(warnings_.texts.size(), 1U);
  EXPECT_TRUE(fs::exists(path_of(key_)));
}

}  // namespace
}  // namespace torchkiln::cache
