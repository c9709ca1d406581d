// One call, as Python fills it in (flashlib/launch/cpu/library.py has the same fields in the same order; sizes are compared).
#pragma once
#include <stdint.h>

struct Strides {  // in numbers, not bytes; channels lie next to each other
  int64_t batch, head, row;
};

struct Problem {
  const char *q, *k, *v;
  char* out;
  float* lse;                              // [B, Hq, Sq]
  const int32_t *first, *behind;           // [B or 1, Sq]: each row's interval of keys; null for a band
  const float* slopes;                     // null for no ALiBi
  const int32_t* offsets;                  // [B or 1, Sq]: the key at which a row sits, less the row; null for lengths - Sq
  const int32_t* lengths;                  // [B]: keys of each batch entry; null if all are there
  const int32_t* pages;                    // [B, ...]: the page of each page_size keys; null for a contiguous cache
  int64_t type;                            // Type
  int64_t batch, q_heads, kv_heads, q_len, kv_len, head_dim, v_head_dim;
  Strides q_at, k_at, v_at, out_at;        // of k and v with pages: batch is the page
  int64_t left, right;                     // the band, bottom-right; -1 for no limit
  int64_t interval_step, offset_step;      // from one batch entry to the next, 0 if they share one
  int64_t slope_batch, slope_head, slope_row;
  int64_t page_size, page_step, page_count;
  int64_t split;                           // keys of a split; 0 for one split of all
  float* partial_out;                      // [splits, B, Hq, Sq, Dv] and
  float* partial_lse;                      // [splits, B, Hq, Sq], in base 2: where splits meet
  int64_t threads;
  double scale, softcap;
  int64_t out_of_memory;                   // set to 1 by a thread that could not get its scratch memory
  int64_t bad_page;                        // 1 + the batch entry whose `pages` name one that does not exist; 0 for none
  // Backward. Gradients of k and v are summed in fp32.
  const char* grad_out;
  const float* grad_lse;                   // null for none
  Strides grad_out_at;
  char *dq, *dk, *dv;                      // contiguous, shaped like q, k, v
  float* workspace;                        // (backward.h says what is in it)
  int64_t parts;                           // how many units of work share the keys of a KV head
};
