// Tells ThreadSanitizer how OpenMP's threads wait for each other.
//
// libgomp is not instrumented and waits by futexes, which ThreadSanitizer does not see: every value
// that passes from one thread of a region to another would be a race. Preloaded, these stand before
// libgomp's functions and say who waits for whom: threads of a region start after all that the
// caller did before, the caller goes on after all that they did, and what is behind a barrier comes
// after what any thread did before it. All else in a region is still a race.
#include <dlfcn.h>

extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}

namespace {

struct Region {
  void (*body)(void*);
  void* data;
  // Their addresses stand for what is waited for: one for all, and a thread that ends early would
  // seem to come before one that starts late.
  char begin, barrier, end;
};

thread_local Region* current = nullptr;

void run(void* given) {
  auto* region = static_cast<Region*>(given);
  __tsan_acquire(&region->begin);
  Region* const outer = current;
  current = region;
  region->body(region->data);
  current = outer;
  __tsan_release(&region->end);
}

template <class F>
F* next(const char* name) {
  return reinterpret_cast<F*>(dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" {

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags) {
  static auto* const real = next<void(void (*)(void*), void*, unsigned, unsigned)>("GOMP_parallel");
  Region region{body, data, 0, 0, 0};
  __tsan_release(&region.begin);
  real(run, &region, threads, flags);
  __tsan_acquire(&region.end);
}

void GOMP_barrier() {
  static auto* const real = next<void()>("GOMP_barrier");
  if (current != nullptr) {
    __tsan_release(&current->barrier);
  }
  real();
  if (current != nullptr) {
    __tsan_acquire(&current->barrier);
  }
}

}  // extern "C"
