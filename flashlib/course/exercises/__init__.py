'''Exercises: one module of checks for each, and how to write one.

An exercise `ex42` is three things that you write:

1. `solutions/ex42_topic.py`: the typed, complete solution. What the student writes stands between `# BEGIN SOLUTION`
   and `# END SOLUTION`; `python -m flashlib.course.stubs` puts `raise NotImplementedError` in its place and writes
   `exercises/ex42_topic.py`. Docstrings give shapes, dtypes and the contract, not the recipe. It imports torch and the
   standard library (triton, if preloaded), never flashlib.
2. `flashlib/course/exercises/ex42.py`: this.

   ```python
   from flashlib import reference
   from flashlib.course.grader.exercise import SDPA, Exercise, Misconception, Target
   from flashlib.course.grader.trial import Trial

   exercise = Exercise(
       name="ex42", file="ex42_topic.py", title="...", chapter="03_tiling",
       difficulty=3, importance=5, minutes=60, forbidden=SDPA,        # operations that PyTorch then does not have
   )

   def exact(q, k, v):                                  # the student's arguments; float64; a tensor or a tuple
       return reference.oracle(q, k, v)

   def budget(q, k, v):                                 # largest absolute error allowed, one for each output
       allowed = reference.error_budget(q, k, v)
       return allowed.out, allowed.lse                  # for other functions: `budget_of(naive, exact)`

   forward = Target(
       "tiled_attention", exact, budget,
       outputs={"out": None, "lse": torch.float32},     # None: the dtype of the first tensor argument
       misconceptions=[
           Misconception(
               "no-rescale",                            # its slug in reports and in the kill matrix
               "The accumulator was not rescaled when the maximum grew.",    # what the code seems to do
               "By which factor is the old sum too large?",                  # the first hint
               model=lambda q, k, v: ...,               # what such code computes from the same arguments
           ),
       ],
   )

   @exercise.property(points=2, hints=["a nudge", "more", "nearly the answer"])
   def rising_maxima(t: Trial) -> None:
       """the answer does not depend on where the maximum lies"""      # the title the student sees
       q, k, v = t.randn(1, 2, 40, 16), t.randn(1, 2, 70, 16), t.randn(1, 2, 70, 16)
       q, k = with_scores_along(q, k, ramp(70, -20, 20))               # flashlib/course/grader/inputs.py
       t.check(forward, q, k, v)
   ```

   A property draws inputs from `t` (`t.randn`, `t.uniform`, `t.integer`, `t.permutation`: seeded afresh on each run, so
   never use torch's global generator; q, k and v by `drawing.draw`), calls the student, and judges. It passes if it returns and fails by:

   - `t.check(target, *args, **kwargs)`: call, compare with the oracle within the budget, name the misconception whose
     model gives the same wrong answer, else wrong-shape, nan-produced, wrong-values, wrong-dtype. Returns the answer.
     `if_it_raises=misconception, but_not_on=(arguments, ...)` says what an exception means that other arguments do not raise.
   - `t.check_inputs_untouched(target, *args)`: check, and mutated-input, by the bytes that the student's process computed on.
   - `t.check_tiled(target, *args, largest=elements, memory=bytes, first=small, sample=lambda x: x[:, :, -64:])`: check (of the
     sampled queries), and untiled: by a meter in the process and by the process's peak memory seen from outside. 4096 x 4096 in
     float32 is enough to tell. Its result has `.meter` (`bytes_read`, `calls`, ...) if you bound more.
   - `t.watch(name, *args, first=small, room={"k": (k, bytes)}, memory=bytes, copied=misconception)`: the call, with these tensors
     handed out piece by piece; `.seen` of the result says how often, which and in which order, seen from outside. What a meter
     counts is the process's own word, and shown as such, until `t.confirmed()` says that all of it was seen so, too.
   - `t.expect_tensor(value, what, shape, dtype)`, `t.expect_tuple(value, *names)`: a student may return anything, so look
     before you compute with what `t.call` gave. An exception in a property earns nothing, and the instructor is told to look.
   - `t.expect_same(a, b, budget, diagnosis=..., says=...)`, `t.expect_equal(got, expected, what, misconceptions, *args)`
     for exact answers, `t.fail(...)` and `t.fail_as(misconception)` for anything else.
   - `t.results_on(*args)(function)`, a tuple: what an oracle, a budget or a model gives on these arguments, where you need it
     yourself. It is computed once for all submissions that get the same inputs, as the wrong solutions of a kill matrix do.

   `t.call(name, *args)` calls any function of the file and `t.make(name, *args)` keeps an object in the process
   (`cache = t.make("Cache", 2); cache.call("append", k, v)`); `t.ask(...)` tells all about a call. Tensors, numbers,
   strings, dtypes, None, lists, tuples and dicts of them cross; strides do too (`in_poison`, `transposed_in_poison`).
   A Triton exercise says `preload=("triton",)` and `environment={"TRITON_INTERPRET": "1"}`. `t.compile(name, *args)` makes the
   same call where launches are compiled for sm_80 and sm_90 instead: what no GPU runs is `compile-error`, and the answer says how
   each kernel multiplies tiles (`("ieee", "f32")`). Kernels in the interpreter are watched
   (`flashlib/measure/counting/kernel_watch.py`): an address outside of the tensors passed is `out-of-bounds-load` or
   `out-of-bounds-store`, programs that meet in one are `race`, each at the student's line, and `t.ask(..., meter={"k": k}).meter`
   counts their bytes among `bytes_read` and `bytes_written`, with `launches`, `programs` and `largest_block` (in elements).
   "Outside" means outside of a tensor's allocation: what a view leaves out of its storage, `in_poison` makes NaN. What the
   student only allocates (`torch.empty`) holds NaN there, too.
   Everything structural needs no word from you: exception (with the student's own traceback), missing, not-implemented,
   timeout, memory-limit, process-ended, exit, output-flood, forbidden operations.

   What is said to a student of a mistake that several exercises know stands in `mistakes.py` and is taken from there by name:
   `replace(HEADS_MODULO, model=...)`. Mistakes in attention's formula come with their models: `formula_mistakes`.

3. `tests/grader/wrong/ex42/<mistake>.py`, at least ten wrong solutions that people really write, each with a first line
   `# diagnosis: slug` (several, separated by commas, if one mistake rightly shows as several), and at least two
   differently written right ones in `tests/grader/right/ex42/`. A wrong one must earn less than full marks and every
   failed property must name one of its diagnoses, each at least once.

   python -m flashlib.course.stubs                    # write the stubs; --check only compares
   python -m flashlib.course.grader.matrix ex42 --seeds 5     # grade all of them on fresh inputs; writes KILL_MATRIX.md

Draw inputs on which mistakes differ: Sq != Sk, D != S, no square tiles, and lengths no tile size divides. A model is
recognized when the answer is twenty times nearer to it than it is to the truth, so two models that agree on an input
cannot be told apart there: the nearer, or the first, is named. Keep a property under half a second.
'''
