// The one check of a packed weight, made before any kernel touches it.
#pragma once
#include <string>

#include "packed.h"

namespace gossamer {

// An empty string, or a sentence saying what is wrong and in which panel and group. Sizes of the sections
// must have been checked already, but for `values` of the bitmap layout.
std::string check(const Packed& w, int threads);

}  // namespace gossamer
