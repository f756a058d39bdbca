// ELF files made by hand: cubins and libraries as small as they can be.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <elf.h>

#include <cstring>
#include <string>

#include "jit/driver/elf.h"

namespace torchkiln::jit::testing {

struct FakeCubin {
  int architecture = 90;
  int abi_version = 8;  // 7: the number is in the lowest byte of the flags
  int machine = kCudaMachine;
  std::string kernel = "_Z7forwardv";
  std::string text = "machine code";

  std::string bytes() const;
};

template <class T>
std::string raw(const T& value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof(value));
}

inline Elf64_Ehdr elf_header() {
  Elf64_Ehdr header{};
  std::memcpy(header.e_ident, ELFMAG, SELFMAG);
  header.e_ident[EI_CLASS] = ELFCLASS64;
  header.e_ident[EI_DATA] = ELFDATA2LSB;
  header.e_ident[EI_VERSION] = EV_CURRENT;
  header.e_version = EV_CURRENT;
  header.e_ehsize = sizeof(header);
  return header;
}

// Header, code, symbol table, strings, section headers: null, .text.<kernel>, .symtab, .strtab.
inline std::string FakeCubin::bytes() const {
  const std::string code_name = ".text." + kernel;
  // One table of strings for symbols and sections.
  const std::string strings =
      std::string(1, '\0') + code_name + '\0' + ".symtab" + '\0' + ".strtab" + '\0';
  const auto at = [&](const std::string& name) {
    return static_cast<Elf64_Word>(strings.find(name));
  };
  Elf64_Sym symbol{};
  symbol.st_name = at(code_name) + 6;  // after ".text."
  symbol.st_shndx = 1;
  const std::string symbols = raw(Elf64_Sym{}) + raw(symbol);

  Elf64_Shdr code_row{}, symbol_row{}, string_row{};
  code_row.sh_name = at(code_name);
  code_row.sh_type = SHT_PROGBITS;
  code_row.sh_offset = sizeof(Elf64_Ehdr);
  code_row.sh_size = text.size();
  symbol_row.sh_name = at(".symtab");
  symbol_row.sh_type = SHT_SYMTAB;
  symbol_row.sh_link = 3;
  symbol_row.sh_entsize = sizeof(Elf64_Sym);
  symbol_row.sh_offset = code_row.sh_offset + code_row.sh_size;
  symbol_row.sh_size = symbols.size();
  string_row.sh_name = at(".strtab");
  string_row.sh_type = SHT_STRTAB;
  string_row.sh_offset = symbol_row.sh_offset + symbol_row.sh_size;
  string_row.sh_size = strings.size();

  Elf64_Ehdr header = elf_header();
  header.e_ident[EI_ABIVERSION] = static_cast<unsigned char>(abi_version);
  header.e_machine = static_cast<Elf64_Half>(machine);
  const auto number = static_cast<Elf64_Word>(architecture);
  header.e_flags = abi_version == 8 ? number << 8 : number;
  header.e_shoff = string_row.sh_offset + string_row.sh_size;
  header.e_shentsize = sizeof(Elf64_Shdr);
  header.e_shnum = 4;
  header.e_shstrndx = 3;
  return raw(header) + text + symbols + strings + raw(Elf64_Shdr{}) + raw(code_row) +
         raw(symbol_row) + raw(string_row);
}

// A library with nothing but a build-id; without one when `id` is empty.
inline std::string fake_library(const std::string& id) {
  Elf64_Ehdr header = elf_header();
  Elf64_Nhdr note{4, static_cast<Elf64_Word>(id.size()), NT_GNU_BUILD_ID};
  const std::string notes = raw(note) + std::string("GNU\0", 4) + id;
  Elf64_Phdr segment{};
  segment.p_type = id.empty() ? PT_NULL : PT_NOTE;
  segment.p_offset = sizeof(header) + sizeof(segment);
  segment.p_filesz = notes.size();
  header.e_phoff = sizeof(header);
  header.e_phentsize = sizeof(segment);
  header.e_phnum = 1;
  return raw(header) + raw(segment) + notes;
}

}  // namespace torchkiln::jit::testing
