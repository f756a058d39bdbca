// The object format: what is written is read, and anything else is refused with a reason.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <memory>

#include "cache/object.h"
#include "cache/sha256.h"

namespace torchkiln::cache {
namespace {

Object small_object() {
  return {{{"key", "k"}, {"registers", 40}},
          std::string("\x7f"
                      "ELF\0x",
                      6)};
}

// Corrects the digest after a change, so that the checks behind it are reached.
std::string sealed(std::string bytes) {
  Sha256 sha;
  sha.update(std::string_view(bytes).substr(0, 24)).update(std::string_view(bytes).substr(56));
  const auto digest = sha.digest();
  bytes.replace(24, 32, std::string(digest.begin(), digest.end()));
  return bytes;
}

std::string with_header(const std::string& header) {
  std::string bytes = encode_object(Object{nlohmann::json::object(), ""}).substr(0, 56) + header;
  for (std::size_t i = 0; i < 4; ++i) bytes[12 + i] = static_cast<char>(header.size() >> (8 * i));
  for (std::size_t i = 0; i < 8; ++i) bytes[16 + i] = static_cast<char>(bytes.size() >> (8 * i));
  return sealed(bytes);
}

// An allocation of exactly this length, so that a sanitizer sees a read past the end.
bool refused_with_reason(const std::string& bytes) {
  const std::unique_ptr<char[]> exact(new char[bytes.size()]);
  bytes.copy(exact.get(), bytes.size());
  std::string why;
  return !decode_object({exact.get(), bytes.size()}, why) && !why.empty();
}

TEST(ObjectTest, RoundTrip) {
  for (const std::string& payload :
       {std::string(), std::string("\0\r\n\xff", 4), std::string(70'000, 'p')}) {
    const Object object{{{"key", "k"}, {"log", "ä"}}, payload};
    std::string why;
    const auto decoded = decode_object(encode_object(object), why);
    ASSERT_TRUE(decoded) << why;
    EXPECT_EQ(decoded->header, object.header);
    EXPECT_EQ(decoded->payload, object.payload);
  }
}

TEST(ObjectTest, PayloadIsAlignedInTheFile) {
  for (std::size_t length = 0; length < 70; ++length) {
    const std::string bytes = encode_object(Object{{{"log", std::string(length, 'l')}}, "payload"});
    EXPECT_EQ((bytes.size() - 7) % 64, 0U);
  }
}

TEST(ObjectTest, ViewPointsIntoTheBytes) {
  const std::string bytes = encode_object(small_object());
  std::string why;
  const auto view = decode_object_view(bytes, why);
  ASSERT_TRUE(view) << why;
  EXPECT_EQ(view->payload.data() + view->payload.size(), bytes.data() + bytes.size());
}

TEST(ObjectTest, SameObjectGivesSameBytes) {
  EXPECT_EQ(encode_object(small_object()), encode_object(small_object()));
}

TEST(ObjectTest, EverySingleBitFlipIsRefused) {
  const std::string good = encode_object(small_object());
  for (std::size_t bit = 0; bit < good.size() * 8; ++bit) {
    std::string bad = good;
    bad[bit / 8] = static_cast<char>(bad[bit / 8] ^ (1 << (bit % 8)));
    ASSERT_TRUE(refused_with_reason(bad)) << "bit " << bit;
  }
}

TEST(ObjectTest, EveryTruncationAndExtensionIsRefused) {
  const std::string good = encode_object(small_object());
  for (std::size_t length = 0; length < good.size(); ++length) {
    ASSERT_TRUE(refused_with_reason(good.substr(0, length))) << length << " bytes";
  }
  EXPECT_TRUE(refused_with_reason(good + '\0'));
  EXPECT_TRUE(refused_with_reason(good + good));
}

TEST(ObjectTest, SealedNonsenseIsRefused) {
  std::string version = encode_object(small_object());
  version[8] = 2;
  EXPECT_TRUE(refused_with_reason(sealed(version)));
  std::string header_length = encode_object(small_object());
  header_length[14] = 1;  // 64 KiB more than there are
  EXPECT_TRUE(refused_with_reason(sealed(header_length)));
  for (const char* header :
       {"", "{", "[1]", "1", "{} {}", "{\"a\":1e999}", "\"\xff\"", "{\"a\":\"\xff\"}"}) {
    EXPECT_TRUE(refused_with_reason(with_header(header))) << header;
  }
}

TEST(ObjectTest, DepthIsLimited) {
  const auto nested = [](std::size_t depth) {
    return "{\"a\":" + std::string(depth, '[') + std::string(depth, ']') + "}";
  };
  EXPECT_FALSE(refused_with_reason(with_header(nested(8))));
  EXPECT_TRUE(refused_with_reason(with_header(nested(20))));
  EXPECT_TRUE(refused_with_reason(with_header(nested(1'000'000))));
}

TEST(ObjectTest, WriterRefusesWhatNoReaderAccepts) {
  EXPECT_THROW(encode_object(Object{nlohmann::json::array(), ""}), std::runtime_error);
  const Object large{{{"log", std::string(kMaxHeaderBytes, 'l')}}, ""};
  EXPECT_THROW(encode_object(large), std::runtime_error);
}

TEST(ObjectTest, LogThatIsNotUtf8IsStored) {
  std::string why;
  EXPECT_TRUE(decode_object(encode_object(Object{{{"log", "\xff\xfe"}}, "p"}), why)) << why;
}

}  // namespace
}  // namespace torchkiln::cache
