// Threads of our own that share the units of one call: they spin for a moment, then sleep until the next call.
//
// PyTorch's OpenMP threads cannot be had from here without linking a second OpenMP, and starting threads for each call costs as much
// as a short call. A forked process begins with an empty pool. Of two calls at once, the second does its work alone.
#pragma once
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>

#include "simd.h"

typedef void (*Work)(void* call, int64_t unit);

constexpr int64_t MOST_THREADS = 256;
constexpr int SPINS = 4000;  // some tens of microseconds: the time between two layers of a model
constexpr int WANTED_BITS = 16;

struct Pool {
  pthread_mutex_t lock;
  pthread_cond_t wake, done;
  int busy;         // whether a call is using the threads
  int64_t threads;  // that were started; the caller is one more
  int64_t round;    // how many calls there were, and in the low bits how many threads the last one wants. One word, so that a thread
                    // that was not wanted cannot mistake one call's number for another's
  int64_t working;  // threads that have not finished this round
  int64_t next, units;
  Work work;
  void* call;
};
static Pool pool = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, PTHREAD_COND_INITIALIZER, 0, 0, 0, 0, 0, 0, nullptr, nullptr};

INLINE void rest() { __builtin_ia32_pause(); }

static void take_units() {
  int64_t unit;
  while ((unit = __atomic_fetch_add(&pool.next, 1, __ATOMIC_RELAXED)) < pool.units) pool.work(pool.call, unit);
}

INLINE int64_t round_now() { return __atomic_load_n(&pool.round, __ATOMIC_ACQUIRE); }

static int64_t round_after(int64_t seen) {
  for (int spin = 0; spin < SPINS; spin++) {
    if (round_now() != seen) return round_now();
    rest();
  }
  pthread_mutex_lock(&pool.lock);
  while (round_now() == seen) pthread_cond_wait(&pool.wake, &pool.lock);
  pthread_mutex_unlock(&pool.lock);
  return round_now();
}

struct Start {
  int64_t number, seen;
};
static Start starts[MOST_THREADS];

static void* stand_by(void* argument) {
  const Start* start = (const Start*)argument;
  const int64_t number = start->number;
  for (int64_t seen = start->seen;;) {
    seen = round_after(seen);
    if (number >= (seen & ((1 << WANTED_BITS) - 1))) continue;
    take_units();
    if (__atomic_sub_fetch(&pool.working, 1, __ATOMIC_ACQ_REL) > 0) continue;
    pthread_mutex_lock(&pool.lock);
    pthread_cond_signal(&pool.done);
    pthread_mutex_unlock(&pool.lock);
  }
  return nullptr;
}

// As many threads as are wanted, or as the system gives. They leave signals to the threads that were there before.
static int64_t start_threads(int64_t wanted) {
  sigset_t all_signals, before;
  sigfillset(&all_signals);
  pthread_sigmask(SIG_SETMASK, &all_signals, &before);
  while (pool.threads < wanted) {
    pthread_t thread;
    starts[pool.threads] = {pool.threads, pool.round};
    if (pthread_create(&thread, nullptr, stand_by, &starts[pool.threads])) break;
    pthread_detach(thread);
    pool.threads++;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return wanted < pool.threads ? wanted : pool.threads;
}

// work(call, unit) for every unit, by at most so many threads, the caller among them. Units are begun in order.
static void share(Work work, void* call, int64_t units, int64_t threads) {
  threads = threads < units ? threads : units;
  threads = threads < MOST_THREADS ? threads : MOST_THREADS;
  if (threads < 2 || __atomic_exchange_n(&pool.busy, 1, __ATOMIC_ACQUIRE)) {
    for (int64_t unit = 0; unit < units; unit++) work(call, unit);
    return;
  }
  const int64_t helpers = start_threads(threads - 1);
  pool.work = work, pool.call = call, pool.units = units, pool.next = 0, pool.working = helpers;
  __atomic_store_n(&pool.round, ((pool.round >> WANTED_BITS) + 1) << WANTED_BITS | helpers, __ATOMIC_RELEASE);
  pthread_mutex_lock(&pool.lock);
  pthread_cond_broadcast(&pool.wake);
  pthread_mutex_unlock(&pool.lock);
  take_units();
  const auto working = [] { return __atomic_load_n(&pool.working, __ATOMIC_ACQUIRE) > 0; };
  for (int spin = 0; spin < SPINS && working(); spin++) rest();
  if (helpers > 0) {
    pthread_mutex_lock(&pool.lock);
    while (working()) pthread_cond_wait(&pool.done, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
  }
  __atomic_store_n(&pool.busy, 0, __ATOMIC_RELEASE);
}

static void begin_after_fork() {
  // The child has none of the threads, and the parent may have been in the middle of a call.
  pool = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, PTHREAD_COND_INITIALIZER, 0, 0, 0, 0, 0, 0, nullptr, nullptr};
}

__attribute__((constructor)) static void expect_forks() { pthread_atfork(nullptr, nullptr, begin_after_fork); }

// Memory of the calling thread, kept for its next call and freed when it ends. 64-byte aligned; null if there is none to be had.
struct Scratch {
  char* memory;
  size_t size;
};
static __thread Scratch scratch;
static pthread_key_t scratch_key;

static void free_scratch(void* memory) { free(memory); }

__attribute__((constructor)) static void make_scratch_key() { pthread_key_create(&scratch_key, free_scratch); }

static char* scratch_of(size_t size) {
  if (scratch.size < size) {
    free(scratch.memory);
    scratch = {nullptr, 0};
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, size) == 0) scratch = {(char*)memory, size};
    pthread_setspecific(scratch_key, scratch.memory);
  }
  return scratch.memory;
}
