// Which query rows a unit of work has, which keys they see, and where their tiles lie.
#pragma once
#include "problem.h"
#include "tile.h"

INLINE int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }
INLINE int32_t most(int32_t a, int32_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

INLINE int64_t group_size(const Problem& p) { return p.q_heads / p.kv_heads; }

// Rows of a KV head: those of all its query heads. Where a head has fewer rows than a panel has lanes, as in decoding, heads share panels.
INLINE bool heads_share(const Problem& p) { return p.q_len < WIDTH; }

INLINE int64_t row_blocks(const Problem& p, int64_t rows_of_a_block) {
  if (heads_share(p)) return ceil_div(group_size(p) * p.q_len, rows_of_a_block);
  return group_size(p) * ceil_div(p.q_len, rows_of_a_block);
}

INLINE Scoring scoring_of(const Problem& p) { return {(float)p.scale, (float)p.softcap, p.slopes != nullptr}; }

// A block of rows: `count` of them from `row`, of query head `head`; where heads share panels, row counts on into the next heads.
struct Block {
  int64_t batch, kv_head, head, row, count;
};

static Block block_of(const Problem& p, int64_t batch, int64_t kv_head, int64_t number, int64_t rows_of_a_block) {
  const int64_t first_head = kv_head * group_size(p);
  int64_t of_head = row_blocks(p, rows_of_a_block), rows = group_size(p) * p.q_len, head = first_head;
  if (!heads_share(p)) of_head = ceil_div(p.q_len, rows_of_a_block), rows = p.q_len, head += number / of_head;
  // Under a causal mask the last rows see most: they come first, so that no thread is left with them at the end.
  const int64_t row = (of_head - 1 - number % of_head) * rows_of_a_block;
  return {batch, kv_head, head, row, rows - row < rows_of_a_block ? rows - row : rows_of_a_block};
}

INLINE int32_t keys_of(const Problem& p, int64_t batch) {
  return (int32_t)(p.lengths ? (p.lengths[batch] < p.kv_len ? p.lengths[batch] : p.kv_len) : p.kv_len);
}

static void interval(const Problem& p, int64_t batch, int64_t row, int32_t* first, int32_t* behind) {
  const int32_t keys = keys_of(p, batch);
  int64_t from = 0, to = keys;
  if (p.first) {
    from = p.first[batch * p.interval_step + row], to = p.behind[batch * p.interval_step + row];
  } else {
    const int64_t at = row + keys - p.q_len;
    if (p.left >= 0 && at - p.left > from) from = at - p.left;
    if (p.right >= 0 && at + p.right + 1 < to) to = at + p.right + 1;
  }
  const bool sees = from < to;
  *first = sees ? (int32_t)from : 0, *behind = sees ? (int32_t)to : 0;
}

// Lanes of the panel from `lane` of the block on.
static void fill(Panel* panel, const Problem& p, const Block& block, int64_t lane) {
  const int64_t left_over = block.count - lane;
  panel->count = left_over < WIDTH ? left_over : WIDTH;
  panel->lowest = panel->all_from = 0, panel->highest = 0, panel->all_to = INT32_MAX;
  bool none = true;
  for (int64_t i = 0; i < WIDTH; i++) {
    const int64_t number = block.row + lane + (i < panel->count ? i : panel->count - 1);
    const int64_t row = number % p.q_len, head = block.head + number / p.q_len;
    panel->row[i] = row, panel->head[i] = head;
    int32_t from, to;
    interval(p, block.batch, row, &from, &to);
    panel->first[i] = from, panel->behind[i] = to;
    panel->all_from = most(panel->all_from, from), panel->all_to = least(panel->all_to, to);
    if (from < to) {
      panel->lowest = none ? from : least(panel->lowest, from), panel->highest = most(panel->highest, to);
      none = false;
    }
    panel->slope[i] = p.slopes ? p.slopes[block.batch * p.slope_batch + head * p.slope_head + row * p.slope_row] : 0;
    const int64_t offset = p.offsets ? p.offsets[block.batch * p.offset_step + row] : keys_of(p, block.batch) - p.q_len;
    panel->position[i] = (int32_t)(row + offset);
  }
}

// Keys that some row of the panels sees, in runs without a gap: what nobody sees may hold NaN, and is in no tile.
struct Run {
  int32_t from, to;
};

static Run next_run(const Panel* panels, int64_t count, int32_t behind_key) {
  Run run = {INT32_MAX, INT32_MAX};
  for (int64_t n = 0; n < count; n++)
    for (int i = 0; i < WIDTH; i++)
      if (panels[n].behind[i] > behind_key) run.from = least(run.from, most(panels[n].first[i], behind_key));
  if (run.from == INT32_MAX) return run;
  run.to = run.from;
  for (bool grows = true; grows;) {
    grows = false;
    for (int64_t n = 0; n < count; n++)
      for (int i = 0; i < WIDTH; i++)
        if (panels[n].first[i] <= run.to && panels[n].behind[i] > run.to) run.to = panels[n].behind[i], grows = true;
  }
  return run;
}

// Where a key lies: which batch entry or page of k and v, and which row of it.
struct Place {
  int64_t entry, row;
};

INLINE Place place_of(const Problem& p, int64_t batch, int32_t key) {
  if (!p.pages) return {batch, key};
  return {p.pages[batch * p.page_step + key / p.page_size], key % p.page_size};
}

// Whether the page of a key is one of those there are. If not, the call is given up, and its caller is told of which batch entry.
static bool page_exists(Problem& p, int64_t batch, int32_t key) {
  if (!p.pages || (uint64_t)place_of(p, batch, key).entry < (uint64_t)p.page_count) return true;
  __atomic_store_n(&p.bad_page, batch + 1, __ATOMIC_RELAXED);
  return false;
}

// Keys of one tile: where the first begins, and from one to the next in bytes.
struct Tile {
  const char* at;
  int64_t step;
  Tile behind(int64_t skipped) const { return {at + skipped * step, step}; }
  const float* numbers(int64_t key = 0) const { return (const float*)(at + key * step); }
};

INLINE const char* begin_of(const Problem& p, const char* x, const Strides& at, int64_t batch, int64_t head, int32_t key) {
  const Place place = place_of(p, batch, key);
  return x + (place.entry * at.batch + head * at.head + place.row * at.row) * size_of(p.type);
}

// Keys as fp32: where they lie if they are, else widened.
static Tile tile_of(const Problem& p, const char* x, const Strides& at, int64_t channels, int64_t batch, int64_t head, int32_t key, int64_t count, float* room) {
  const char* begin = begin_of(p, x, at, batch, head, key);
  const int64_t step = at.row * size_of(p.type);
  if (p.type == FP32) return {begin, step};
  for (int64_t i = 0; i < count; i++) widen(room + i * channels, begin + i * step, p.type, channels);
  return {(const char*)room, channels * (int64_t)sizeof(float)};
}

// The end of the tile that begins at `key`: at the end of the run, of the tile, or of the page.
INLINE int32_t tile_end(const Problem& p, int32_t key, int32_t run_end) {
  int32_t end = least(run_end, key + KEYS);
  if (p.pages) end = least(end, (int32_t)((key / p.page_size + 1) * p.page_size));
  return end;
}

// One row of x, where it lies if it is fp32, else widened into `room`.
INLINE const float* row_of(const Problem& p, const char* x, const Strides& at, int64_t batch, int64_t head, int64_t row, int64_t channels, float* room) {
  const char* begin = x + (batch * at.batch + head * at.head + row * at.row) * size_of(p.type);
  if (p.type == FP32) return (const float*)begin;
  widen(room, begin, p.type, channels);
  return room;
}

// to[channel][row of the panel] from eight rows from the i-th on.
static void transpose_in(float* to, int64_t i, const float* const (&rows)[8], int64_t channels) {
  int64_t c = 0;
  for (; c + 8 <= channels; c += 8) {
    float* columns[8];
    const float* from[8];
    for (int j = 0; j < 8; j++) columns[j] = to + (c + j) * WIDTH + i, from[j] = rows[j] + c;
    transpose_8(columns, from);
  }
  for (; c < channels; c++)
    for (int j = 0; j < 8; j++) to[c * WIDTH + i + j] = rows[j][c];
}

// Eight rows from the i-th on, from[channel][row of the panel].
static void transpose_out(float* const (&rows)[8], const float* from, int64_t i, int64_t channels) {
  int64_t c = 0;
  for (; c + 8 <= channels; c += 8) {
    float* to[8];
    const float* columns[8];
    for (int j = 0; j < 8; j++) to[j] = rows[j] + c, columns[j] = from + (c + j) * WIDTH + i;
    transpose_8(to, columns);
  }
  for (; c < channels; c++)
    for (int j = 0; j < 8; j++) rows[j][c] = from[c * WIDTH + i + j];
}

INLINE bool sees(const Panel& rows, int64_t i) { return i < rows.count && rows.first[i] < rows.behind[i]; }

// The panel's rows of x as lanes; 0 for lanes without a row, and for rows that see nothing and may hold anything. `room`: 8 rows, and a
// ninth of zeros.
static void transpose_rows(float* to, const Problem& p, const Panel& rows, const char* x, const Strides& at, int64_t batch, int64_t channels, float* room) {
  float* none = room + 8 * channels;
  memset(none, 0, channels * sizeof(float));
  for (int64_t i = 0; i < WIDTH; i += 8) {
    const float* from[8];
    for (int j = 0; j < 8; j++)
      from[j] = sees(rows, i + j) ? row_of(p, x, at, batch, rows.head[i + j], rows.row[i + j], channels, room + j * channels) : none;
    transpose_in(to, i, from, channels);
  }
}
