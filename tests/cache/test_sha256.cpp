// SHA-256 against the vectors of NIST (FIPS 180-4 examples and CAVP).
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "cache/sha256.h"

namespace torchkiln::cache {
namespace {

struct Vector {
  std::string message;
  const char* digest;
};

TEST(Sha256Test, MatchesNistVectors) {
  const Vector vectors[] = {
      {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
      {"\xd3", "28969cdfa74a12c82f3bad960b0b000aca2ac329deea5c2328ebc6f2ba9802c1"},
      {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
      {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
       "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
      {"abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmnoijklmnopjklmnopqklmnopqrlmn"
       "opqrsmnopqrstnopqrstu",
       "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1"},
      {std::string(1'000'000, 'a'),
       "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"},
  };
  for (const Vector& vector : vectors) EXPECT_EQ(sha256_hex(vector.message), vector.digest);
}

TEST(Sha256Test, PiecesGiveTheDigestOfTheWhole) {
  // Lengths around the block and around the place of the length field.
  for (const std::size_t length : {1, 55, 56, 57, 63, 64, 65, 119, 120, 128, 200}) {
    const std::string text(length, 'x');
    for (std::size_t cut = 0; cut <= length; cut += 7) {
      Sha256 pieces;
      pieces.update(text.substr(0, cut)).update(text.substr(cut));
      EXPECT_EQ(pieces.digest(), Sha256().update(text).digest()) << length << " cut at " << cut;
    }
  }
}

TEST(Sha256Test, StartsAnewAfterDigest) {
  Sha256 sha;
  sha.update("first").digest();
  EXPECT_EQ(sha.update("abc").digest(), Sha256().update("abc").digest());
}

// The vectors above test what this processor uses; here the two ways meet.
TEST(Sha256Test, InstructionsOfTheProcessorAgreeWithPlainCode) {
  const Sha256Blocks x86 = sha256_blocks_x86();
  if (x86 == nullptr) GTEST_SKIP() << "this processor has no SHA instructions";
  std::string bytes;
  for (int i = 0; i < 64 * 9; ++i) bytes += static_cast<char>(i * 37 + i / 64);
  Sha256State fast{1, 2, 3, 4, 5, 6, 7, 0xffffffff}, plain = fast;
  for (const std::size_t blocks : {1, 2, 9}) {
    x86(fast, bytes.data(), blocks);
    sha256_blocks_portable(plain, bytes.data(), blocks);
    EXPECT_EQ(fast, plain) << blocks;
  }
}

}  // namespace
}  // namespace torchkiln::cache
