// Preloaded: every tensor's memory ends at a page that nobody may touch, or begins behind one.
//
// Instrumented code looks before each load and store that the compiler sees; masked loads and
// stores, and code that is generated at run time, it does not. Here the processor looks, and what
// runs is the library as it is installed. PyTorch takes a tensor's memory by posix_memalign. The
// alignment is given up for the sake of the edge: in turn, a page that is not mapped stands right
// behind the last byte or right before the first. What was freed is never given out again.
#include <sys/mman.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>

extern "C" void __libc_free(void*);

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kPages = size_t{1} << 30;  // of addresses, not of memory

template <class T>
T* reserved(size_t count, int protection) {
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* const p = mmap(nullptr, count * sizeof(T), protection, kFlags, -1, 0);
  return p == MAP_FAILED ? nullptr : static_cast<T*>(p);
}

struct Page {
  char bytes[kPage];
};

struct Room {
  Page* pages = reserved<Page>(kPages, PROT_NONE);
  uint32_t* lengths = reserved<uint32_t>(kPages, PROT_READ | PROT_WRITE);  // by their first page
};

Room& room() {
  static Room once;
  return once;
}

std::atomic<size_t> used{1};
std::atomic<unsigned> turn{0};

}  // namespace

extern "C" {

int posix_memalign(void** result, size_t, size_t size) {
  const size_t count = size / kPage + (size % kPage != 0);
  const auto& [pages, lengths] = room();
  if (pages == nullptr || lengths == nullptr || count >= kPages / 2) {
    return ENOMEM;
  }
  const size_t first =
      used.fetch_add(count + 1);  // the next one's page before is this one's behind
  if (first + count >= kPages ||
      mprotect(pages + first, count * kPage, PROT_READ | PROT_WRITE) != 0) {
    return ENOMEM;
  }
  lengths[first] = static_cast<uint32_t>(count);
  *result = pages[first].bytes + (turn.fetch_add(1) % 2 == 0 ? 0 : count * kPage - size);
  return 0;
}

void free(void* pointer) {
  const auto& [pages, lengths] = room();
  if (pointer < pages || pointer >= pages + kPages) {
    __libc_free(pointer);
    return;
  }
  const size_t first = (static_cast<char*>(pointer) - pages->bytes) / kPage;
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
  mmap(pages + first, lengths[first] * kPage, PROT_NONE, kFlags, -1, 0);
}

}  // extern "C"
