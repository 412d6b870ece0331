// How fast the core that calls runs: cycles are what arithmetic costs, whatever the clock does.
#pragma once

namespace gossamer {

// Cycles a second of the calling core now, from a chain of additions that each wait for the one before. Takes
// some milliseconds; what else runs on that core is left out by taking the fastest of several runs.
double cycles_per_second();

}  // namespace gossamer
