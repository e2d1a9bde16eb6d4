// The room views on the CPU: pictures over threads, loops for the processor's instruction set.
//
// A picture's rows are resized horizontally into planar uint8 rows; every canvas row is then one vertical sum of those,
// and, while it is in the cache, everything that depends on it alone is written: its part of the crops, normalised for
// each encoder. The global view follows from the finished canvas. No picture of floats is ever stored.
#include <vector>

#include "common/parallel.h"
#include "views/cut.h"
#include "views/plan.h"
#include "views/resize.h"

namespace sphinx::views {
namespace {

void interleave_canvas(const PlanarRows& canvas, int size, uint8_t* result) {
  for (int y = 0; y < size; ++y) {
    for (int x = 0; x < size; ++x) {
      for (int c = 0; c < 3; ++c) *result++ = canvas.channel(y, c)[x];
    }
  }
}

void run(const Job& job, const Plans& plans, const Cut& cut, const Rows& loops, Team& team) {
  const int size = cut.size();
  const PlanarRows canvas(size, size);
  const auto finished = [&](int y) {
    if (!job.out.clip) return;
    thread_local std::vector<uint8_t> picked;
    cut.crop_rows(canvas, job.out, y, picked);
  };
  const auto resize =
      job.geometry.vertical_first ? resize_columns_first<decltype(finished)> : resize_rows_first<decltype(finished)>;
  resize(job, plans, canvas, loops, size, team, finished);
  if (job.out.clip) cut.resampled_views(canvas, job.out, team);
  if (job.canvas) interleave_canvas(canvas, size, job.canvas);
}

}  // namespace

void run_cpu(const Job* jobs, int64_t count, Isa isa, int threads) {
  if (count == 0) return;
  const Rows& loops = loops_for(isa, kRows);
  const Cut cut(jobs[0].out, loops);
  std::vector<Plans> plans;  // here, not in the threads: they are kept per thread, and those threads do not last
  plans.reserve(count);
  for (int64_t i = 0; i < count; ++i) plans.emplace_back(jobs[i].geometry, cut.size());

  // A picture a thread while there are enough of them, then a picture's rows over all threads.
  const int64_t whole = threads > 1 ? count / threads * threads : 0;
  Team team(threads);
  team.each(whole, 1, [&](int64_t begin, int64_t end) {
    Team alone(1);
    for (int64_t i = begin; i < end; ++i) run(jobs[i], plans[i], cut, loops, alone);
  });
  for (int64_t i = whole; i < count; ++i) run(jobs[i], plans[i], cut, loops, team);
}

}  // namespace sphinx::views
