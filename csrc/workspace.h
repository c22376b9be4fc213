// Memory for one worker: planned once, kept between runs, handed out under a lock.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "buffer.h"
#include "threads.h"

namespace fastinv {

// Lends workspaces of one kind. Several callers may run the same engine at once; each worker of each has its own.
template <class Workspace>
class WorkspacePool {
 public:
  using Owned = std::unique_ptr<Workspace>;

  template <class Make>
  std::vector<Owned> take(int count, const Make& make) {
    std::vector<Owned> taken;
    {
      const std::lock_guard<std::mutex> lock(workspaces_mutex());
      while (static_cast<int>(taken.size()) < count && !idle_.empty()) {
        taken.push_back(std::move(idle_.back()));
        idle_.pop_back();
      }
    }
    while (static_cast<int>(taken.size()) < count) taken.push_back(make());
    return taken;
  }

  void give_back(std::vector<Owned> taken) {
    const std::lock_guard<std::mutex> lock(workspaces_mutex());
    for (Owned& workspace : taken) idle_.push_back(std::move(workspace));
  }

 private:
  std::vector<Owned> idle_;
};

}  // namespace fastinv
