// A small reader of 64-bit little-endian ELF files.
// SPDX-License-Identifier: Apache-2.0
#include "jit/driver/elf.h"

#include <elf.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cache/sha256.h"

namespace torchkiln::jit {
namespace {

// Headers and notes of real libraries are a few hundred bytes; a damaged file must not make us
// read gigabytes.
constexpr std::size_t kMaxNoteBytes = std::size_t{64} << 10;
constexpr std::size_t kIdentityBytes = std::size_t{64} << 10;
constexpr std::size_t kMaxProgramHeaders = 256;

class File {
 public:
  explicit File(const std::string& path) : descriptor_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    struct stat facts{};
    if (descriptor_ >= 0 && ::fstat(descriptor_, &facts) == 0 && S_ISREG(facts.st_mode)) {
      size_ = static_cast<std::uint64_t>(facts.st_size);
    }
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File() {
    if (descriptor_ >= 0) ::close(descriptor_);
  }

  std::uint64_t size() const { return size_; }

  // What lies there, cut at the end of the file.
  std::string read(std::uint64_t offset, std::size_t bytes) const {
    if (offset >= size_) return "";
    std::string text(static_cast<std::size_t>(std::min<std::uint64_t>(bytes, size_ - offset)), 0);
    std::size_t done = 0;
    while (done < text.size()) {
      const ssize_t got = ::pread(descriptor_, text.data() + done, text.size() - done,
                                  static_cast<off_t>(offset + done));
      if (got <= 0) break;
      done += static_cast<std::size_t>(got);
    }
    text.resize(done);
    return text;
  }

 private:
  int descriptor_;
  std::uint64_t size_ = 0;
};

// By memcpy: nothing in a damaged file is aligned.
template <class T>
bool read_at(std::string_view bytes, std::uint64_t offset, T& out) {
  if (offset > bytes.size() || bytes.size() - offset < sizeof(T)) return false;
  std::memcpy(&out, bytes.data() + offset, sizeof(T));
  return true;
}

bool read_header(std::string_view bytes, Elf64_Ehdr& header) {
  return read_at(bytes, 0, header) && std::memcmp(header.e_ident, ELFMAG, SELFMAG) == 0 &&
         header.e_ident[EI_CLASS] == ELFCLASS64 && header.e_ident[EI_DATA] == ELFDATA2LSB;
}

std::string hex(std::string_view bytes) {
  std::string digits;
  for (const char c : bytes) {
    const auto byte = static_cast<unsigned char>(c);
    digits += "0123456789abcdef"[byte >> 4];
    digits += "0123456789abcdef"[byte & 15];
  }
  return digits;
}

// A note segment is a row of: three words (bytes of name, bytes of value, type), name, value, each
// padded to four bytes.
std::optional<std::string> build_id_of_notes(std::string_view notes) {
  const auto padded = [](std::uint64_t size) { return (size + 3) / 4 * 4; };
  Elf64_Nhdr note{};
  std::uint64_t at = 0;
  while (read_at(notes, at, note)) {
    const std::uint64_t name = at + sizeof(note);
    const std::uint64_t value = name + padded(note.n_namesz);
    const std::uint64_t end = value + note.n_descsz;
    if (end > notes.size()) break;
    if (note.n_type == NT_GNU_BUILD_ID && note.n_descsz > 0 &&
        notes.substr(name, note.n_namesz) == std::string_view("GNU", 4)) {
      return hex(notes.substr(value, note.n_descsz));
    }
    at = value + padded(note.n_descsz);
  }
  return std::nullopt;
}

std::optional<std::string> build_id_of(const File& file) {
  Elf64_Ehdr header{};
  if (!read_header(file.read(0, sizeof(header)), header)) return std::nullopt;
  if (header.e_phentsize != sizeof(Elf64_Phdr)) return std::nullopt;
  const std::size_t count = std::min<std::size_t>(header.e_phnum, kMaxProgramHeaders);
  const std::string table = file.read(header.e_phoff, count * sizeof(Elf64_Phdr));
  Elf64_Phdr segment{};
  for (std::size_t i = 0; i < count && read_at(table, i * sizeof(segment), segment); ++i) {
    if (segment.p_type != PT_NOTE) continue;
    const auto bytes = std::min<std::uint64_t>(segment.p_filesz, kMaxNoteBytes);
    const auto id = build_id_of_notes(file.read(segment.p_offset, bytes));
    if (id) return id;
  }
  return std::nullopt;
}

// Checked views into the sections of a cubin.
class Sections {
 public:
  Sections(std::string_view bytes, const Elf64_Ehdr& header) : bytes_(bytes), header_(header) {
    Elf64_Shdr names{};
    if (get(header.e_shstrndx, names)) names_ = contents(names);
  }

  std::size_t count() const { return header_.e_shnum; }

  bool get(std::size_t index, Elf64_Shdr& section) const {
    if (header_.e_shentsize != sizeof(section) || index >= header_.e_shnum) return false;
    // No overflow: an offset past the end is refused first.
    return header_.e_shoff <= bytes_.size() &&
           read_at(bytes_, header_.e_shoff + index * sizeof(section), section);
  }

  std::string_view contents(const Elf64_Shdr& section) const {
    const bool inside = section.sh_type != SHT_NOBITS && section.sh_offset <= bytes_.size() &&
                        section.sh_size <= bytes_.size() - section.sh_offset;
    return inside ? bytes_.substr(section.sh_offset, section.sh_size) : std::string_view();
  }

  std::string_view name(const Elf64_Shdr& section) const { return text(names_, section.sh_name); }

  // The zero-terminated string at `offset` of a string table; "" when it runs out of the table.
  static std::string_view text(std::string_view table, std::size_t offset) {
    if (offset >= table.size()) return "";
    const std::size_t end = table.find('\0', offset);
    return end == std::string_view::npos ? "" : table.substr(offset, end - offset);
  }

 private:
  std::string_view bytes_;
  Elf64_Ehdr header_;
  std::string_view names_;
};

bool defines(const Sections& sections, const Elf64_Shdr& table, std::string_view symbol) {
  Elf64_Shdr strings{};
  if (!sections.get(table.sh_link, strings)) return false;
  const std::string_view names = sections.contents(strings);
  const std::string_view rows = sections.contents(table);
  Elf64_Sym row{};
  for (std::size_t at = 0; read_at(rows, at, row); at += sizeof(row)) {
    if (row.st_shndx != SHN_UNDEF && Sections::text(names, row.st_name) == symbol) return true;
  }
  return false;
}

// Cubins of ABI version 7 (CUDA 12, up to sm_90) keep the number in the lowest byte of the flags,
// those of version 8 (CUDA 13; sm_100 and later in 12.8 and 12.9) in the byte above.
int architecture_of(const Elf64_Ehdr& header) {
  switch (header.e_ident[EI_ABIVERSION]) {
    case 7:
      return static_cast<int>(header.e_flags & 0xff);
    case 8:
      return static_cast<int>((header.e_flags >> 8) & 0xff);
    default:
      return 0;
  }
}

}  // namespace

std::optional<std::string> build_id(const std::string& path) { return build_id_of(File(path)); }

std::optional<std::string> file_identity(const std::string& path) {
  const File file(path);
  if (file.size() == 0) return std::nullopt;
  if (auto id = build_id_of(file)) return id;
  return cache::sha256_hex(std::to_string(file.size()) + ":" + file.read(0, kIdentityBytes));
}

CubinFacts inspect_cubin(std::string_view bytes, std::string_view symbol) {
  CubinFacts facts;
  Elf64_Ehdr header{};
  if (!read_header(bytes, header)) return facts;
  facts.is_elf = true;
  facts.machine = header.e_machine;
  facts.architecture = architecture_of(header);
  if (symbol.empty()) return facts;

  const Sections sections(bytes, header);
  const std::string text_name = ".text." + std::string(symbol);
  bool seen_table = false;
  Elf64_Shdr section{};
  for (std::size_t i = 0; i < sections.count() && sections.get(i, section); ++i) {
    // One table is enough, and a damaged file may claim that every section is one.
    if (section.sh_type == SHT_SYMTAB && !seen_table) {
      seen_table = true;
      facts.has_symbol = defines(sections, section, symbol);
    }
    if (section.sh_type == SHT_PROGBITS && sections.name(section) == text_name) {
      facts.text_bytes = std::max(facts.text_bytes, sections.contents(section).size());
    }
  }
  return facts;
}

}  // namespace torchkiln::jit
