// Arrays as raw files, which is how the tests hand tensors to a program and take them back.

#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

template <typename Value>
std::vector<Value> read_array(const std::string& path) {
  std::FILE* file = std::fopen(path.c_str(), "rb");
  if (!file) std::exit(4);
  std::fseek(file, 0, SEEK_END);
  std::vector<Value> values(std::ftell(file) / sizeof(Value));
  std::rewind(file);
  if (std::fread(values.data(), sizeof(Value), values.size(), file) != values.size()) std::exit(4);
  std::fclose(file);
  return values;
}

template <typename Value>
void write_array(const std::string& path, const std::vector<Value>& values) {
  std::FILE* file = std::fopen(path.c_str(), "wb");
  if (!file || std::fwrite(values.data(), sizeof(Value), values.size(), file) != values.size()) std::exit(4);
  std::fclose(file);
}
